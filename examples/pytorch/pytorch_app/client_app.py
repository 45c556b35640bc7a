"""The ClientApp: train and evaluate on the client's own examples."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from pytorch_app.task import Example, Net, load_data
from pytorch_app.task import test as test_fn
from pytorch_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model that came with the message."""
    net, (examples, _), device = prepare(msg, context)
    loss = train_fn(
        net, examples, context.run_config["local-epochs"], msg.content["config"]["lr"], device
    )
    metrics = {"train_loss": loss, "num-examples": len(examples.dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model that came with the message."""
    net, (_, examples), device = prepare(msg, context)
    loss, accuracy = test_fn(net, examples, device)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(examples.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def prepare(
    msg: Message, context: Context
) -> tuple[Net, tuple[DataLoader[Example], DataLoader[Example]], torch.device]:
    """Return the received model, this client's data and the device to use."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data = load_data(
        context.run_config["data-dir"],
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )
    return net, data, torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
