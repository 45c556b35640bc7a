"""Figures of each round in MLflow, without a server: they go to a file."""

from collections.abc import Callable

import mlflow


def mlflow_figures(
    experiment: str, uri: str = "sqlite:///mlflow.db"
) -> Callable[[int, dict[str, float]], None]:
    """Return an ``on_round`` that writes to an MLflow run at a tracking URI."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment)
    run = mlflow.start_run().info.run_id
    return lambda number, figures: mlflow.log_metrics(figures, step=number, run_id=run)
