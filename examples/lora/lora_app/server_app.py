"""The ServerApp: federated averaging of adapters, evaluated on the test images after each round."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from lora_app.task import Transformer, adapters, set_adapters, split_digits, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the adapters and save them."""
    config = context.run_config
    strategy = FedAvg(
        fraction_evaluate=config["fraction-evaluate"],
        min_train_nodes=config["min-nodes"],
        min_available_nodes=config["min-nodes"],
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(adapters(Transformer())),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=lambda _, arrays: global_evaluate(arrays),
    )
    torch.save(result.arrays.to_torch_state_dict(), "adapters.pt")


def global_evaluate(arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the base model with the global adapters on all test images."""
    net = Transformer()
    set_adapters(net, arrays.to_torch_state_dict())
    loss, accuracy = test(net, split_digits()[1])
    return MetricRecord({"accuracy": accuracy, "loss": loss})
