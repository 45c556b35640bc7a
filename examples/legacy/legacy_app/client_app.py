"""The ClientApp, written for Flower's older API: ``NumPyClient`` and ``client_fn``."""

from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, NDArrays, Scalar

from legacy_app.task import Examples, build_net, get_weights, load_data, set_weights, test, train


class FlowerClient(NumPyClient):
    """Train and evaluate on a client's own examples."""

    def __init__(self, examples: Examples, epochs: int, learning_rate: float) -> None:
        self.net = build_net()
        self.examples, self.epochs, self.learning_rate = examples, epochs, learning_rate

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train the received model."""
        set_weights(self.net, parameters)
        loss = train(self.net, self.examples, self.epochs, self.learning_rate)
        return get_weights(self.net), len(self.examples[1]), {"train_loss": loss}

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the received model."""
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.examples)
        return loss, len(self.examples[1]), {"accuracy": accuracy}


def client_fn(context: Context) -> Client:
    """Return the client of a node."""
    node, run = context.node_config, context.run_config
    examples = load_data(node["partition-id"], node["num-partitions"])
    return FlowerClient(examples, run["local-epochs"], run["learning-rate"]).to_client()


app = ClientApp(client_fn=client_fn)
