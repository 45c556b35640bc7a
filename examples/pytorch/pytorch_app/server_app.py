"""The ServerApp: federated averaging, evaluated on the test images after each round."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.utils.data import DataLoader

from pytorch_app.task import Net, load_mnist, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the network and save it."""
    config = context.run_config
    strategy = FedAvg(
        fraction_evaluate=config["fraction-evaluate"],
        min_train_nodes=config["min-nodes"],
        min_available_nodes=config["min-nodes"],
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=lambda _, arrays: global_evaluate(arrays, config["data-dir"]),
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")


def global_evaluate(arrays: ArrayRecord, data_dir: str) -> MetricRecord:
    """Evaluate the global model on all test images."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    loss, accuracy = test(net, DataLoader(load_mnist(data_dir, train=False), 512), device)
    return MetricRecord({"accuracy": accuracy, "loss": loss})
