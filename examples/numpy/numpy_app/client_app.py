"""The ClientApp: gradient descent on the client's own examples."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpy_app.task import accuracy, load_data
from numpy_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model that came with the message."""
    examples = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    weights, bias = train_fn(
        msg.content["arrays"]["weights"].numpy(),
        msg.content["arrays"]["bias"].numpy(),
        examples,
        context.run_config["local-steps"],
        context.run_config["learning-rate"],
    )
    arrays = ArrayRecord({"weights": Array(weights), "bias": Array(np.asarray(bias))})
    metrics = MetricRecord({"num-examples": len(examples[1])})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model that came with the message."""
    examples = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    found = accuracy(*(array.numpy() for array in msg.content["arrays"].values()), examples)
    metrics = MetricRecord({"accuracy": found, "num-examples": len(examples[1])})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
