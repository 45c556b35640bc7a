"""A whole ``aggregate_train`` call against Flower's own FedAvg on the same replies.

``python -m benchmarks.aggregate_train`` decodes, screens, aggregates and encodes the replies of
10 clients of 11.2 million parameters; time as a multiple of ``FedAvg.aggregate_train``, peak extra
memory in multiples of the decoded (n, d) matrix.
"""

import argparse
import logging

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from benchmarks.measure import peak_extra_bytes, seconds
from fl_bgmd.aggregators import geometric_median
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.models import build
from fl_bgmd.replies import screen
from fl_bgmd.strategies import BGMD, CMD, GMD, Mean, NormThreshold, RobustFilter
from simulations.grid import InProcessGrid


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    n, cpu = options.clients, torch.device("cpu")
    torch.manual_seed(0)
    sent = build(options.model).state_dict()
    size = sum(value.numel() for value in sent.values())
    app = ClientApp()

    @app.train()
    def echo(message: Message, context: object) -> Message:
        moved = {
            key: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
            for key, value in sent.items()
        }
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    grid = InProcessGrid(app, n, {})
    counts = {"min_train_nodes": n, "min_available_nodes": n}
    arrays = ArrayRecord(sent)
    rules = {cls.__name__: cls(**counts) for cls in (Mean, GMD, BGMD, CMD, NormThreshold)}
    rules["RobustFilter"] = RobustFilter(**counts)
    rules["GMD + nearest-neighbor"] = GMD(**counts, mixing="nearest-neighbor")
    baseline = FedAvg(**counts)
    messages = list(rules["Mean"].configure_train(1, arrays, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    table = Table(title=f"aggregate_train, {n} replies of {size:,} values")
    for column in ("strategy", "time / FedAvg", "extra memory / matrix"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    own = seconds(lambda: baseline.aggregate_train(1, replies), options.repeats, cpu)
    memory = peak_extra_bytes(lambda: baseline.aggregate_train(1, replies), cpu)
    table.add_row("FedAvg (Flower)", "1.0", f"{memory / (4 * n * size):.2f}")
    for name, strategy in rules.items():
        list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        memory = peak_extra_bytes(lambda s=strategy: s.aggregate_train(1, replies), cpu)
        taken = seconds(lambda s=strategy: s.aggregate_train(1, replies), options.repeats, cpu)
        table.add_row(name, f"{taken / own:.1f}", f"{memory / (4 * n * size):.2f}")
    console = Console(width=100)
    console.print(table)

    layout = ModelLayout(arrays)
    rows = torch.zeros(n, layout.num_directions).numpy()
    buffers = np.empty(layout.num_buffers, BUFFER_DTYPE)

    def fill() -> None:
        for reply, row in zip(replies, rows, strict=True):
            trained = reply.content.array_records["arrays"]
            for spec in layout.directions:
                part = slice(spec.offset, spec.offset + spec.size)
                data = trained[spec.key].data
                received = np.frombuffer(data, np.float32, spec.size, len(data) - 4 * spec.size)
                np.subtract(layout.values[part], received, out=row[part])

    def screen_all() -> None:
        for reply, row in zip(replies, rows, strict=True):
            assert screen(reply, layout, row, buffers).reason is None

    filled = seconds(fill, options.repeats, cpu)
    screened = seconds(screen_all, options.repeats, cpu)
    rule = seconds(lambda: geometric_median(torch.from_numpy(rows)), options.repeats, cpu)
    console.print(
        f"screening with row fill: {screened:.2f} s, row fill alone: {filled:.2f} s, geometric "
        f"median: {rule:.2f} s; screening adds {(screened - filled) / rule:.0%} of the rule's time"
    )


if __name__ == "__main__":
    main()
