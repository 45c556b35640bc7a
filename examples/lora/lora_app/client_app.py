"""The ClientApp: train and evaluate the adapters on the client's own examples."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from lora_app.task import Transformer, adapters, set_adapters, split_digits
from lora_app.task import test as test_fn
from lora_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the adapters that came with the message."""
    net, own = prepare(msg, context)
    config = context.run_config
    loss = train_fn(net, own, config["local-steps"], config["learning-rate"])
    metrics = {"train_loss": loss, "num-examples": len(own[1])}
    content = RecordDict({"arrays": ArrayRecord(adapters(net)), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the adapters that came with the message."""
    net, own = prepare(msg, context)
    loss, accuracy = test_fn(net, own)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(own[1])}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def prepare(msg: Message, context: Context) -> tuple[Transformer, tuple[Tensor, Tensor]]:
    """Return the model with the received adapters, and this client's examples."""
    net = Transformer()
    set_adapters(net, msg.content["arrays"].to_torch_state_dict())
    images, labels = split_digits()[0]
    number, of = context.node_config["partition-id"], context.node_config["num-partitions"]
    return net, (images[number::of], labels[number::of])
