"""Figures that need no study: the toy picture, what aggregation costs, the speed-up."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from fl_bgmd.aggregators import RULES as RULE_KINDS
from fl_bgmd.aggregators import (
    block_geometric_median,
    build_rule,
    coordinate_median,
    geometric_median,
    mean,
    spectral_filter,
)
from fl_bgmd.devices import repeatable

from ..backends import run
from ..config import Value, validate
from ..report.drawing import Done, name_ends, panels, save
from ..report.tables import write_markdown

CENTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: mean(rows).vector,
    "CM": lambda rows: coordinate_median(rows).vector,
    "GM": lambda rows: geometric_median(rows).vector,
}


# ------------------------------------------------------------------------- Figure 5: the toy


def draw_toy(folder: Path, *, seeds: int, done: Done, count: int = 100) -> Path:
    """Mean, coordinate-wise and geometric median of 2-D points of which a part is corrupt.

    As Figure 5 of Acharya et al., whose corrupt points carry additive Gaussian noise: N(0, 100) as
    elsewhere in the paper. The table adds what such noise, around the true center, cannot show:
    the same points moved together to one side. Writes ``toy.png`` and ``table.md``; returns it.
    """
    fractions = (0.0, 0.1, 0.3, 0.45)
    figure, grid = panels(2, len(fractions), 3.0, 3.1)
    for row, kind in zip(grid, ("noise", "shifted"), strict=True):
        for panel, fraction in zip(row, fractions, strict=True):
            points, hostile = toy_points(fraction, kind, 0, count)
            panel.scatter(*points[~hostile].T, s=6, c="lightgray", label="honest")
            panel.scatter(*points[hostile].T, s=6, c="tab:red", alpha=0.4, label="corrupt")
            panel.scatter(0, 0, marker="+", s=150, c="black", label="true mean")
            for (name, center), mark in zip(CENTERS.items(), "xsD", strict=True):
                panel.scatter(*center(points), marker=mark, s=28, label=name, zorder=3)
            panel.set(title=f"{kind}, {fraction:.0%} corrupt", xlim=(-4, 8), ylim=(-4, 8))
            panel.set_aspect("equal")
    grid[0][0].legend(fontsize=6)
    save(figure, folder / "toy.png")
    lines = []
    for kind in ("noise", "shifted"):
        for fraction in fractions:
            line = {"corrupt points": kind, "fraction": f"{fraction:.0%}"}
            draws = [toy_points(fraction, kind, seed, count)[0] for seed in range(seeds)]
            for name, center in CENTERS.items():
                errors = [float(center(points).norm()) for points in draws]
                line[name] = f"{statistics.mean(errors):.3f}"
            lines.append(line)
            done(f"{kind}, {fraction:.0%}")
    note = (
        f"Distance from the true mean, average of {seeds} draws of {count} points from N(0, I); "
        "corrupt points are x + N(0, 100 I), or x + (10, 10)."
    )
    return write_markdown(folder, note, pd.DataFrame(lines))


def toy_points(fraction: float, kind: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` points of N(0, I) in the plane and which of them were corrupted."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    hostile = torch.arange(count) < math.floor(fraction * count)
    noise = 10 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    points[hostile] += noise[hostile] if kind == "noise" else 10.0
    return points, hostile


# --------------------------------------------------------------- Table 1: what a rule costs

PRINTED: Mapping[str, Any] = {"memory_rule": "mean", "score": "squared-norm"}
"""Algorithm 1 with Algorithm 2 as the slides have them: memory of the mean, squared norms."""


@dataclass(frozen=True)
class Block:
    """The block rule as a run calls it: with the memory that an earlier round has left.

    Attributes
    ----------
    options : mapping
        Of :func:`fl_bgmd.aggregators.block_geometric_median`.
    """

    options: Mapping[str, Any]

    def after(self, rows: Tensor) -> Callable[[Tensor], Any]:
        """Return the rule of the round after one of such rows, (n, d)."""
        memory = block_geometric_median(rows, **self.options).memory
        return partial(block_geometric_median, memory=memory, **self.options)


RULES: dict[str, Callable[[Tensor], Any] | Block] = {
    "mean": mean,
    "CmD": coordinate_median,
    "GmD, Weiszfeld": partial(geometric_median, solver="weiszfeld"),
    "GmD, Gram": geometric_median,
    "BGmD printed, Weiszfeld": Block({**PRINTED, "solver": "weiszfeld"}),
    "BGmD printed, Gram": Block(PRINTED),
    "BGmD guarded, Weiszfeld": Block({"solver": "weiszfeld"}),
    "BGmD guarded, Gram": Block({}),
    "spectral filter": spectral_filter,
}

SOLVERS = ("Weiszfeld", "Gram")
VERSIONS = ("printed", "guarded")
"""Of the block rule: the paper's, and this project's default."""


def draw_complexity(
    folder: Path,
    *,
    seeds: int,
    done: Done,
    sizes: Sequence[int] = (10_000, 100_000, 1_000_000),
    counts: Sequence[int] = (8, 16, 32, 64, 128),
) -> Path:
    """Time of each rule against d at n = 32 and against n at d = 100,000, measured.

    The rows are those of a round: N(0, I) around a common direction, 40 % of them times -100.
    Blocks are of a tenth of the columns and have the memory of a round before. Each time is the
    least of ``seeds`` calls, CPU time on one thread. Writes ``complexity.png`` and ``table.md``;
    returns it.
    """
    shapes = [(32, d) for d in sizes] + [(n, 100_000) for n in counts]
    taken: dict[tuple[str, int, int], float] = {}
    for n, d in dict.fromkeys(shapes):
        rows = round_rows(n, d)
        for name, kind in RULES.items():
            rule = kind.after(rows) if isinstance(kind, Block) else kind
            taken[name, n, d] = _least_seconds(rule, rows, seeds)
        done(f"n = {n}, d = {d:,}")
    figure, grid = panels(1, 2, 5.2, 4.0)
    for name in RULES:
        grid[0][0].plot(sizes, [taken[name, 32, d] for d in sizes], "o-", ms=4, label=name)
        grid[0][1].plot(counts, [taken[name, n, 100_000] for n in counts], "o-", ms=4)
    for panel, axis, title in zip(grid[0], ("d", "n"), ("n = 32", "d = 100,000"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds", title=title)
        panel.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=7)
    save(figure, folder / "complexity.png")
    lines = [
        {"rule": name}
        | {f"{n} x {d:,}": f"{1000 * taken[name, n, d]:.1f}" for n, d in dict.fromkeys(shapes)}
        for name in RULES
    ]
    ratios = []
    for version, solver in itertools.product(VERSIONS, SOLVERS):
        line = {"GmD / BGmD": f"{version}, {solver}"}
        for n, d in dict.fromkeys(shapes):
            whole, block = (taken[f"{rule}, {solver}", n, d] for rule in ("GmD", f"BGmD {version}"))
            line[f"{n} x {d:,}"] = f"{whole / block:.2f}"
        ratios.append(line)
    note = (
        f"Milliseconds for n x d rows in float32, the least of {seeds} calls, CPU time on one "
        "thread; medians certified to 1e-6, blocks of 10 %."
    )
    return write_markdown(folder, note, pd.DataFrame(lines), pd.DataFrame(ratios))


# ------------------------------------------------------- Table 1: breakdown, cost against epsilon


ROUNDS = 20
"""Of the rules with a memory."""

BLOCKS = {
    "bgmd printed, 10 %": "bgmd:memory=mean,score=squared-norm,min-block-size=1",
    "bgmd guarded, 10 %": "bgmd:min-block-size=1",
}
"""The block rule with a block of a tenth of the coordinates, over :data:`ROUNDS` rounds."""

SIZES = (1.0, 10.0, 1e3, 1e6)
"""How far liars go, in honest deviations."""

UNBOUNDED = 1e3
"""An error far above what honest rows can do to each other, far below the largest lie."""


def draw_breakdown(
    folder: Path, *, seeds: int, done: Done, clients: int = 20, dimensions: int = 200
) -> Path:
    """Error of every rule against the corrupt share that it is told: Table 1's last column.

    Honest rows are N(0, I). The corrupt ones are equal and lie in one direction, at one of
    :data:`SIZES` times ``sqrt(d)``; or each is its honest row times minus that. Of these the worst
    counts, as the mean over ``seeds`` draws of the distance from the honest mean. A block moves
    some coordinates only, and its memory the others later: :data:`BLOCKS` are measured over
    rounds of fresh rows, by the distance of the mean of all that they returned from that of the
    honest means. A share that a rule does not take leaves a gap; rules that need examples of the
    server's own are left out. Writes ``breakdown.png`` and ``table.md``; returns it.
    """
    hostile = range(clients // 2)
    errors: dict[str, list[float]] = {}
    specs = {name: (name, 1) for name, kind in RULE_KINDS.items() if not kind.needs_root}
    specs |= {name: (spec, ROUNDS) for name, spec in BLOCKS.items()}
    for name, (spec, rounds) in specs.items():
        errors[name] = [
            worst_error(spec, f, clients, dimensions, seeds, rounds=rounds) for f in hostile
        ]
        done(name)
    shares = [f / clients for f in hostile]
    figure, grid = panels(1, 2, 5.4, 5.6)
    everything, held_only = grid[0]
    for name, found in errors.items():
        # Both panels draw all, so that a rule has one look; a label with _ is in no legend.
        is_broken = np.nanmax(found) > UNBOUNDED
        everything.plot(shares, found, label=name if is_broken else f"_{name}")
        visible = [math.nan for _ in found] if is_broken else found
        held_only.plot(shares, visible, label=f"_{name}" if is_broken else name)
    for panel in grid[0]:
        panel.set(xlabel="corrupt share", ylabel="distance from the honest mean")
        panel.grid(alpha=0.3)
    everything.set(yscale="log", ylim=(0.1, None))
    held_only.set(ylim=(0, 20))
    name_ends([held_only])
    everything.legend(fontsize=6)
    save(figure, folder / "breakdown.png")
    lines = []
    for name, found in errors.items():
        held = [share for share, error in zip(shares, found, strict=True) if error < UNBOUNDED]
        lines.append(
            {"rule": name, "holds to": f"{max(held, default=0.0):.0%}"}
            | {f"{share:.0%}": f"{e:.3g}" for share, e in zip(shares, found, strict=True)}
        )
    note = (
        f"{clients} rows of {dimensions} values, {seeds} draws; the largest lie is "
        f"{SIZES[-1] * math.sqrt(dimensions):.0f} long. *holds to*: the largest share with an "
        f"error below {UNBOUNDED:.0f}; nan: the rule does not take that share. Blocks of 10 %: the "
        f"mean of {ROUNDS} rounds."
    )
    return write_markdown(folder, note, pd.DataFrame(lines))


def worst_error(
    spec: str, hostile: int, clients: int, dimensions: int, seeds: int, *, rounds: int = 1
) -> float:
    """Return a rule's largest mean error over kinds and sizes of lies, nan where it takes none."""
    rule = build_rule(spec, byzantine_fraction=hostile / clients)
    worst = 0.0
    for size, equal in itertools.product(SIZES, (True, False)):
        errors = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            apart = torch.zeros(dimensions, dtype=torch.float64)
            memory = None
            torch.manual_seed(seed)  # what the rule draws
            for _ in range(rounds):
                rows = torch.randn(clients, dimensions, generator=generator, dtype=torch.float64)
                apart -= rows[hostile:].mean(0)
                lie = torch.ones(dimensions, dtype=torch.float64)
                rows[:hostile] = size * (lie if equal else -rows[:hostile])
                try:
                    result = rule(rows, memory)
                except ValueError:
                    return math.nan
                apart += result.vector
                memory = result.memory
            errors.append(float(apart.norm()) / rounds)
        worst = max(worst, statistics.mean(errors))
    return worst


def draw_tolerance(
    folder: Path,
    *,
    seeds: int,
    done: Done,
    shape: tuple[int, int] = (32, 100_000),
    tolerances: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8),
) -> Path:
    """Cost of the geometric median against its accuracy, which Table 1 puts at eps^-2.

    Iterations and milliseconds (the least of ``seeds`` calls) of Weiszfeld's steps in R^d and of
    this project's solver on the Gram matrix, to a certified gap. Writes ``tolerance.png`` and
    ``table.md``; returns it.
    """
    rows, lines = round_rows(*shape), []
    solvers: tuple[Literal["weiszfeld", "gram"], ...] = ("weiszfeld", "gram")
    for tol in tolerances:
        line: dict[str, Any] = {"eps": f"{tol:g}"}
        for solver in solvers:
            find = partial(geometric_median, tol=tol, solver=solver, max_iter=100_000)
            line[f"{solver}, iterations"] = find(rows).iterations
            line[f"{solver}, ms"] = round(1000 * _least_seconds(find, rows, seeds), 1)
        lines.append(line)
        done(f"eps = {tol:g}")
    frame = pd.DataFrame(lines)
    figure, grid = panels(1, 2, 5.2, 4.0)
    for panel, unit in zip(grid[0], ("iterations", "ms"), strict=True):
        for solver in solvers:
            panel.plot(tolerances, frame[f"{solver}, {unit}"], "o-", ms=4, label=solver)
        panel.set(xscale="log", yscale="log", xlabel="eps", ylabel=unit)
        panel.invert_xaxis()
        panel.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=7)
    save(figure, folder / "tolerance.png")
    note = f"{shape[0]} x {shape[1]:,} rows in float32, the least of {seeds} calls; gaps certified."
    return write_markdown(folder, note, frame)


def round_rows(n: int, d: int) -> Tensor:
    """Return n rows like those of a round under the bit flip, (n, d) float32."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator) + torch.randn(d, generator=generator)
    rows[: math.floor(0.4 * n)] *= -100
    return rows


def _least_seconds(rule: Callable[[Tensor], Any], rows: Tensor, repeats: int) -> float:
    """Return the CPU seconds of a call on one thread."""
    with repeatable(1), threadpool_limits(1, user_api="blas"):
        rule(rows)
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            rule(rows)
            taken.append(time.process_time() - started)
    return min(taken)  # the least, as timeit advises: the rest is the machine's other work


# ------------------------------------------------------------- Figures 1 to 3: the speed-up

SPEEDUP_ROWS: dict[str, Mapping[str, str]] = {
    "SGD": {"strategy": "mean"},
    "GmD, Weiszfeld": {"strategy": "gmd:solver=weiszfeld"},
    "GmD, Gram": {"strategy": "gmd"},
    "BGmD printed, Weiszfeld": {"strategy": "bgmd:memory=mean,score=squared-norm,solver=weiszfeld"},
    "BGmD printed, Gram": {"strategy": "bgmd:memory=mean,score=squared-norm"},
    "BGmD guarded, Weiszfeld": {"strategy": "bgmd:solver=weiszfeld"},
    "BGmD guarded, Gram": {"strategy": "bgmd"},
}


def draw_speedup(
    folder: Path,
    *,
    seeds: int,
    done: Done,
    rounds: int = 5,
    model: str = "lenet",
    clients: int = 32,
) -> Path:
    """Time of whole rounds: GmD against BGmD, each with both solvers of the median.

    The set-up of Table 2 (Fashion-MNIST, 32 clients x 64, bit flip at 40 %), ``seeds`` runs of
    ``rounds`` rounds each, on one thread and in CPU time, which is the wall clock of a core that
    has nothing else to do. Writes ``speedup.png`` and ``table.md``; returns it.
    """
    times: dict[str, float] = {}
    for name, own in SPEEDUP_ROWS.items():
        taken = []
        for seed in range(seeds):
            taken += run_rounds(own, seed, rounds, model, clients)
            done(f"{name}, run {seed + 1}")
        times[name] = min(taken)
    figure, [[panel]] = panels(1, 1, 7.0, 3.2)
    panel.barh(list(times), list(times.values()))
    panel.set(xlabel="seconds a round, gradients included")
    panel.invert_yaxis()
    save(figure, folder / "speedup.png")
    lines = [
        {"": name, "s / round": f"{taken:.2f}", "beyond SGD": f"{taken - times['SGD']:.2f}"}
        for name, taken in times.items()
    ]
    ratios = [
        {"": f"{left} / {right}", "whole round": f"{times[left] / times[right]:.2f}"}
        for version in VERSIONS
        for left, right in (
            ("GmD, Weiszfeld", f"BGmD {version}, Weiszfeld"),
            ("GmD, Weiszfeld", f"BGmD {version}, Gram"),
            ("GmD, Gram", f"BGmD {version}, Gram"),
        )
    ]
    note = (
        f"Fashion-MNIST, {model}, {clients} clients x 64, bit flip at 40 % redrawn in each round; "
        f"CPU time on one thread, the fastest round of {seeds} runs of {rounds} rounds, evaluation "
        "left out."
    )
    return write_markdown(folder, note, pd.DataFrame(lines), pd.DataFrame(ratios))


def run_rounds(
    own: Mapping[str, str], seed: int, rounds: int, model: str, clients: int
) -> list[float]:
    """Run a few rounds of Table 2 under the bit flip at 40 %; return the CPU seconds of each.

    The first and the last, which is evaluated, are left out.
    """
    config: dict[str, Value] = {
        "dataset": "fashion-mnist",
        "model": model,
        "partition": "iid",
        "num-clients": clients,
        "batch-size": 64,
        "local-steps": 1,
        "learning-rate": 1.0,
        "momentum": 0.0,
        "weight-decay": 1e-4,
        "server-learning-rate": 0.01,
        "attack": "bit-flip",
        "byzantine-fraction": 0.4,
        "num-server-rounds": rounds,
        "model-average": 0.0,
        "evaluate-every": rounds,
        "seed": seed,
        **own,
    }
    moments: list[float] = []
    with repeatable(1), threadpool_limits(1, user_api="blas"):
        result = run(
            validate(config),
            backend="inprocess",
            on_round=lambda number, accuracy: moments.append(time.process_time()),
        )
    if result.status == "failed":
        raise RuntimeError(result.error)
    return [after - before for before, after in pairwise(moments)][1:-1]
