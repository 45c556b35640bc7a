"""The aggregation rules against a plain sum over the rows and against the peers' own code.

``python -m benchmarks.aggregators`` prints one table for each shape: time as a multiple of
``X.sum(0)`` in the same process on the same data (in seconds from 1,000 rows on), the geometric
median's objective as a multiple of the best one reached, and the peak of extra memory in multiples
of the (n, d) matrix. Needs ``pip install byzfl geom-median`` for the peers' rows; they are left
out, with a line that says so, where these are missing. All rules take their turns ``--repeats``
times, those of more than five seconds once, each beside the sum; the median of the ratios counts:
machines change their pace within a run.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import peak_extra_bytes, seconds
from fl_bgmd.aggregators import (
    BlockMemory,
    block_geometric_median,
    build_rule,
    bulyan,
    centered_clipping,
    coordinate_median,
    covariance_agnostic_filter,
    divide_and_conquer,
    flame,
    fltrust,
    fools_gold,
    gap_filter,
    geometric_median,
    krum,
    mean,
    mean_around_median,
    minimum_diameter_averaging,
    multi_krum,
    nearest_neighbor_averaging,
    norm_clip,
    norm_threshold,
    sign_guard,
    smallest_eigenvalue_averaging,
    spectral_filter,
    trimmed_mean,
)
from fl_bgmd.aggregators.mixing import nearest_neighbors

SHAPES = ((10, 11_173_962), (32, 1_163_978), (100, 1_163_978), (3_000, 1_000), (10_000, 1_000))
MANY_ROWS = 1_000  # from here on: no rule whose cost grows with n^3, no peers, times in seconds
MOST_FOR_SMEA = 10
SLOW_SECONDS = 5.0
CONSOLE = Console(width=120)

Rule = Callable[[Tensor], Any]

_BYZFL = ("TrMean", "Krum", "MultiKrum", "Meamed", "MDA", "SMEA", "MoNNA", "CAF", "NNM")
"""ByzFL's classes that are told how many rows are hostile."""


def own_rules(memory: BlockMemory | None, spare: Tensor) -> dict[str, Rule]:
    """Return this project's rules; the block rule starts with a memory, as in every later round.

    The mixing writes into ``spare`` (n, d): a strategy lets it write into the rows, which other
    rules here still need.
    """
    return {
        "geometric median": geometric_median,
        "geometric median, Weiszfeld": partial(geometric_median, solver="weiszfeld"),
        "block geometric median 10 %": partial(block_geometric_median, memory=memory),
        "coordinate median": coordinate_median,
        "trimmed mean": trimmed_mean,
        "norm threshold": norm_threshold,
        "spectral filter, mean": spectral_filter,
        "spectral filter, saddle": partial(spectral_filter, method="saddle"),
        "krum": krum,
        "multi-krum": multi_krum,
        "bulyan": bulyan,
        "mean around the median": mean_around_median,
        "minimum diameter averaging": minimum_diameter_averaging,
        "smallest eigenvalue averaging": smallest_eigenvalue_averaging,
        "MoNNA": nearest_neighbor_averaging,
        "CAF": covariance_agnostic_filter,
        "gap filter": gap_filter,
        "DnC": divide_and_conquer,
        "SignGuard": sign_guard,
        "FoolsGold": fools_gold,
        "FLAME": flame,
        "FLTrust": lambda rows: fltrust(rows, rows[0]),
        "norm clipping": norm_clip,
        "centered clipping": centered_clipping,
        "nearest-neighbor mixing": lambda rows: nearest_neighbors(rows).apply(rows, out=spare),
        "mean of clip + median clip + neighbors": build_rule(
            "mean+clipping+median-clipping+nearest-neighbor"
        ),
        "mean": mean,
    }


def peer_rules(n: int, device: torch.device) -> dict[str, Rule]:
    """Return what others offer for the same, where it is installed.

    ByzFL's SMEA passes over the rows for each set of n - 2 of them: it has to be few.
    """
    rules: dict[str, Rule] = {}
    try:
        byzfl = importlib.import_module("byzfl")
        rules["ByzFL GeometricMedian (3 steps)"] = byzfl.GeometricMedian()
        rules["ByzFL Median"] = byzfl.Median()
        for name in _BYZFL:
            if name != "SMEA" or n <= MOST_FOR_SMEA:
                rules[f"ByzFL {name}"] = getattr(byzfl, name)(f=2)
        rules["ByzFL ARC, of a copy"] = lambda rows: byzfl.ARC(f=2)(rows.clone())  # it overwrites
        # It starts where it ended: a new one for each call, as ours without a center.
        rules["ByzFL CenteredClipping"] = lambda rows: byzfl.CenteredClipping(L=3)(rows)
    except ImportError:
        CONSOLE.print("byzfl is not installed: its rows are left out")
    try:
        geom_median = importlib.import_module("geom_median.torch")
        rules["geom-median (100 steps)"] = lambda rows: (
            geom_median.compute_geometric_median(list(rows), weights=None).median
        )
    except ImportError:
        CONSOLE.print("geom-median is not installed: its row is left out")
    if device.type == "cpu":
        rules["numpy.median (the core of FedMedian)"] = lambda rows: np.median(rows.numpy(), axis=0)
    return rules


def objective(rows: Tensor, vector: Tensor) -> float:
    """Return the summed distance of ``vector`` to the rows, in float64, row by row."""
    return sum(float(torch.linalg.vector_norm(row.double() - vector.double())) for row in rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", metavar="NxD", help="default: the papers' models")
    parser.add_argument("--only", nargs="+", default=[""], help="rules whose name contains one")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = SHAPES
    if options.shapes:
        shapes = tuple(tuple(int(part) for part in text.split("x")) for text in options.shapes)
    for n, d in shapes:
        measure_shape(n, d, device, options)


def measure_shape(n: int, d: int, device: torch.device, options: argparse.Namespace) -> None:
    """Print the table of one shape."""
    torch.manual_seed(0)
    rows = torch.randn(n, d, device=device)
    rules = own_rules(block_geometric_median(rows).memory, rows.clone())
    if n >= MANY_ROWS:
        del rules["spectral filter, saddle"]
    elif not options.no_peers:
        rules |= peer_rules(n, device)
    rules = {name: rules[name] for name in rules if any(part in name for part in options.only)}
    baseline = seconds(lambda: rows.sum(0), options.repeats, device)
    reached: dict[str, float] = {}
    memory: dict[str, float] = {}
    for name, rule in rules.items():
        try:
            outcome = rule(rows)
        except (RuntimeError, MemoryError, ValueError) as error:
            # ByzFL's NNM asks for n^2 d values at once; some rules are for few rows.
            CONSOLE.print(f"{name} failed: {str(error)[:100]}")
            continue
        vector = torch.as_tensor(getattr(outcome, "vector", outcome))
        reached[name] = float("nan")
        if "eom" in name and "block" not in name:
            reached[name] = objective(rows, vector.reshape(-1))
        del outcome, vector
        memory[name] = peak_extra_bytes(partial(rule, rows), device) / (4 * n * d)
    ratios: dict[str, list[float]] = {name: [] for name in memory}
    slow: set[str] = set()
    for _ in range(options.repeats):
        for name in (name for name in ratios if name not in slow):
            beside = seconds(lambda: rows.sum(0), 5, device)
            taken = seconds(partial(rules[name], rows), 1, device)
            ratios[name].append(taken if n >= MANY_ROWS else taken / beside)
            if taken > SLOW_SECONDS:
                slow.add(name)
    best = min((value for value in reached.values() if value == value), default=1.0)
    table = Table(title=f"n = {n}, d = {d:,}, {device}; sum over the rows: {baseline * 1e3:.1f} ms")
    time = "seconds" if n >= MANY_ROWS else "time / sum"
    for column in ("rule", time, "objective / best - 1", "extra memory / (n d)"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name, found in ratios.items():
        shown = "" if reached[name] != reached[name] else f"{reached[name] / best - 1:.1e}"
        figure = f"{np.median(found):.{2 if n >= MANY_ROWS else 1}f}"
        table.add_row(name, figure, shown, f"{memory[name]:.2f}")
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
