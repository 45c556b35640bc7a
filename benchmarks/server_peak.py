"""The memory of a server in a round: one matrix and one reply, where Flower's holds all replies.

``python -m benchmarks.server_peak`` sends real messages to clients that make their replies when
they are pulled, and prints the peak of the round above what was in use before it, in multiples of
the (n, d) matrix: at 10 clients of 11.2 million parameters and at 100 of 1.2 million.
"""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from benchmarks.measure import peak_extra_bytes
from fl_bgmd.arrivals import arriving
from fl_bgmd.flower import empty_run, enter_run, number_message
from fl_bgmd.strategies import RobustStrategy

CASES = ("10x11173962", "100x1163978")
ARRAYS = 20
"""Of which a model is made."""


class Clients(Grid):
    """Clients of this process that take no memory but for the replies which were pulled."""

    pull_interval = 0.001

    def __init__(self, count: int) -> None:
        enter_run()
        self._count = count
        self._sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take in the messages."""
        for message in messages:
            number = f"{len(self._sent)}-{message.metadata.dst_node_id}"
            number_message(message, number)
            self._sent[number] = message
        return list(self._sent)

    def pull_messages(self, ids: Iterable[str], /) -> Iterable[Message]:
        """Make the replies."""
        return [self._reply(self._sent.pop(key)) for key in ids if key in self._sent]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message) -> Message:
        [sent] = message.content.array_records.values()
        draw = np.random.default_rng(message.metadata.dst_node_id)
        trained = ArrayRecord()
        for key, array in sent.items():
            values = array.numpy()
            values += draw.standard_normal(values.shape, np.float32)
            trained[key] = Array(values)
        content = {"arrays": trained, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    def set_run(self, run: Any) -> None:
        """Belong to no run."""

    @property
    def run(self) -> Any:
        """No run."""
        return empty_run()

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Create no message."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' ids."""
        return list(range(1, self._count + 1))


def peak(strategy: str, n: int, d: int, at_once: bool = False) -> float:
    """Return how far memory rises in the second round of a run, in multiples of the matrix.

    ``at_once`` is for all replies in a list, as Flower's ``send_and_receive`` returns them.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sizes = np.diff(np.linspace(0, d, ARRAYS + 1).astype(int))
    model = ArrayRecord({f"{i}": Array(np.zeros(size, np.float32)) for i, size in enumerate(sizes)})
    counts = {"min_train_nodes": n, "min_available_nodes": n}
    own: Any = FedAvg(**counts) if strategy == "fedavg" else RobustStrategy(strategy, **counts)
    grid = Clients(n)

    def round_of(number: int) -> None:
        messages = list(own.configure_train(number, model, ConfigRecord(), grid))
        waited = arriving(grid, messages, None)
        own.aggregate_train(number, list(waited) if at_once or strategy == "fedavg" else waited)

    round_of(1)
    return peak_extra_bytes(lambda: round_of(2), torch.device("cpu")) / (4 * n * d)


def main() -> None:
    """Measure each case in a process of its own and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NxD")
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "mean", "gmd", "cmd", "bgmd"])
    parser.add_argument("--at-once", action="store_true", help="all replies in a list")
    options = parser.parse_args()
    for case in options.cases:
        n, d = map(int, case.split("x"))
        for name in options.strategies:
            given = f"{name!r}, {n}, {d}, {options.at_once}"
            code = f"from benchmarks.server_peak import peak; print(peak({given}))"
            found = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            ratio = float(found.stdout)
            line = {"n": n, "d": d, "strategy": name, "peak-of-matrix": round(ratio, 3)}
            line["replies-beyond-1.1"] = round((ratio - 1.1) * n, 2)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
