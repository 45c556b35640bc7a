"""A client that does not train: it moves the model a little, array by array; client 0 lies."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from deployed_app.model import drawn

app = ClientApp()

FAR = np.float16(3.0)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the model a tenth of its spread away, or far away; never a second copy of it."""
    client = int(context.node_config["partition-id"])
    number = int(message.content["config"]["server-round"])
    record = message.content["arrays"]
    for place, key in enumerate(record):
        values = record[key].numpy()
        record[key] = Array("float32", (), "", b"")  # the received bytes go before new ones come
        if client == 0:
            values += FAR
        else:
            step = drawn(values.shape, values.dtype.name, [number, client, place])
            step *= np.float16(0.1)
            values += step
            del step
        record[key] = Array(values)
        del values
    assert isinstance(record, ArrayRecord)
    metrics = MetricRecord({"num-examples": 1, "partition-id": client})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
