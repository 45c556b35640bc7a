"""ByzFL's own pipelines as rules of this project, for comparisons in the same runs.

``pip install byzfl``, then ``benchmarks.byzfl_rules:pipeline:gm`` is a strategy like any other.
"""

import importlib
from typing import Any, Literal

from torch import Tensor

from fl_bgmd.aggregators import Aggregate, rule
from fl_bgmd.shares import hostile_count

Aggregator = Literal["gm", "caf", "trimmed-mean", "median", "multi-krum", "monna", "meamed"]
Before = Literal["arc-nnm", "nnm", "arc", "none"]

_CLASSES = {
    "gm": "GeometricMedian",
    "caf": "CAF",
    "trimmed-mean": "TrMean",
    "median": "Median",
    "multi-krum": "MultiKrum",
    "monna": "MoNNA",
    "meamed": "Meamed",
    "arc": "ARC",
    "nnm": "NNM",
}
_WITHOUT_COUNT = ("gm", "median")
"""Rules that are not told how many clients are hostile."""


@rule("byzfl")
def pipeline(
    updates: Tensor,
    *,
    byzantine_fraction: float = 0.25,
    aggregator: Aggregator = "gm",
    before: Before = "arc-nnm",
) -> Aggregate:
    """Apply ByzFL's pre-aggregators and its rule, as ByzFL has them.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        The hostile share; ByzFL is told the count that this project's rules reckon with.
    aggregator : str
        The rule.
    before : str
        What comes before it, in this order.

    Raises
    ------
    ModuleNotFoundError
        Where ByzFL is not installed.
    """
    hostile = hostile_count(byzantine_fraction, len(updates))
    rows = updates
    for name in before.split("-") if before != "none" else ():
        rows = _build(name, hostile)(rows)
    return Aggregate(_build(aggregator, hostile)(rows).to(updates.dtype), weights=None)


def _build(name: str, hostile: int) -> Any:
    made = getattr(importlib.import_module("byzfl"), _CLASSES[name])
    return made() if name in _WITHOUT_COUNT else made(f=hostile)
