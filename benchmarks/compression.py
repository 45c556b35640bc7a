"""Bytes and seconds of the compressors at the size of a ResNet-18.

``python -m benchmarks.compression`` packs and unpacks one update of 11,173,962 values with each
compressor, on the CPU. Seconds are of this machine; compare them with the plain copy in the first
row.
"""

import argparse

import torch
from flwr.app import ArrayRecord
from rich.console import Console
from rich.table import Table

from benchmarks.measure import seconds
from fl_bgmd.compression import build_compressor
from fl_bgmd.layout import ModelLayout
from fl_bgmd.models import build

NAMES = (
    "none",
    "top-k:0.1",
    "top-k:0.01",
    "rand-k:0.1",
    "scaled-rand-k:0.1",
    "qsgd:1",
    "qsgd:7",
    "qsgd:63",
    "l1-sign",
    "sign",
    "low-rank:2",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    layout = ModelLayout(ArrayRecord(build(options.model).state_dict()))
    size = layout.num_directions
    update = torch.randn(size) * 0.01
    cpu = torch.device("cpu")
    table = Table(title=f"{options.model}, {size:,} values, {torch.get_num_threads()} threads")
    for column in ("compressor", "bytes", "of float32", "encode (s)", "decode (s)"):
        table.add_column(column, justify="left" if column == "compressor" else "right")
    for name in NAMES:
        compressor = build_compressor(name).for_shapes(layout.shapes)
        message = compressor.encode(update)
        packing = seconds(lambda c=compressor: c.encode(update), options.repeats, cpu)
        unpacking = seconds(lambda c=compressor, m=message: c.decode(m, size), options.repeats, cpu)
        table.add_row(
            name,
            f"{len(message):,}",
            f"{len(message) / (4 * size):.1%}",
            f"{packing:.2f}",
            f"{unpacking:.2f}",
        )
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
