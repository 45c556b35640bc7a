"""The ClientApp: a few steps of the solver on the client's own examples."""

import warnings

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from sklearn_app.task import Examples, create_model, get_parameters, load_data, set_parameters

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Fit the model that came with the message."""
    model, (images, labels) = prepare(msg, context)
    with warnings.catch_warnings():
        # The solver is stopped early on purpose.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(images, labels)
    loss = log_loss(labels, model.predict_proba(images), labels=model.classes_)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_parameters(model)),
            "metrics": MetricRecord({"train-loss": loss, "num-examples": len(labels)}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model that came with the message."""
    model, (images, labels) = prepare(msg, context)
    metrics = {"accuracy": model.score(images, labels), "num-examples": len(labels)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def prepare(msg: Message, context: Context) -> tuple[LogisticRegression, Examples]:
    """Return the received model and this client's data."""
    model = create_model(context.run_config["local-epochs"])
    set_parameters(model, msg.content["arrays"].to_numpy_ndarrays())
    data = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    return model, data
