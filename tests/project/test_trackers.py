"""The examples with W&B and MLflow, offline, where these are installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_bgmd.strategies import GMD
from simulations.grid import InProcessGrid

TRACKERS = Path(__file__).resolve().parents[2] / "examples" / "trackers"


def run(on_round: object) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord([np.ones(3)]), "metrics": metrics})
        return Message(content, reply_to=message)

    strategy = GMD(fraction_evaluate=0.0, on_round=on_round)
    strategy.start(InProcessGrid(app, 4, {}), ArrayRecord([np.zeros(3)]), num_rounds=2)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setattr(sys, "path", [str(TRACKERS), *sys.path])
    from with_wandb import wandb_figures  # type: ignore[import-not-found]

    run(wandb_figures("bgmd", str(tmp_path)))
    assert wandb.run.summary["accepted"] == 4
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's database is not installed")
    monkeypatch.setattr(sys, "path", [str(TRACKERS), *sys.path])
    from with_mlflow import mlflow_figures  # type: ignore[import-not-found]

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run(mlflow_figures("bgmd", uri))
    number = mlflow.active_run().info.run_id
    mlflow.end_run()
    history = mlflow.MlflowClient(uri).get_metric_history(number, "accepted")
    assert [(each.step, each.value) for each in history] == [(1, 4.0), (2, 4.0)]
