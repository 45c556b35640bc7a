"""The ServerApp, written for Flower's older API: ``server_fn`` and ``ServerAppComponents``."""

import numpy as np
from flwr.common import Context, Metrics, NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from legacy_app.task import build_net, get_weights, set_weights, split_digits, test


def weighted_average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average the clients' accuracies, weighted by their numbers of examples."""
    total = sum(count for count, _ in metrics)
    return {"accuracy": sum(count * found["accuracy"] for count, found in metrics) / total}


def evaluate_and_save(
    server_round: int, weights: NDArrays, config: dict[str, Scalar]
) -> tuple[float, dict[str, Scalar]]:
    """Evaluate the global model on the test digits and save it."""
    net = build_net()
    set_weights(net, weights)
    loss, accuracy = test(net, split_digits()[1])
    print(f"round {server_round}: accuracy on the test digits {accuracy:.3f}")
    np.savez("final_model.npz", *weights)
    return loss, {"accuracy": accuracy}


def server_fn(context: Context) -> ServerAppComponents:
    """Return the strategy and its configuration."""
    config = context.run_config
    strategy = FedAvg(
        fraction_fit=config["fraction-fit"],
        fraction_evaluate=0.5,
        min_fit_clients=config["min-clients"],
        min_available_clients=config["min-clients"],
        initial_parameters=ndarrays_to_parameters(get_weights(build_net())),
        evaluate_metrics_aggregation_fn=weighted_average,
        evaluate_fn=evaluate_and_save,
    )
    return ServerAppComponents(
        strategy=strategy, config=ServerConfig(num_rounds=config["num-server-rounds"])
    )


app = ServerApp(server_fn=server_fn)
