"""A figure: how BGMD's memories fail with honest clients and with colluders, and the present one.

``python -m benchmarks.memory`` draws ``docs/memory.png`` and prints its numbers. Left and middle:
honest clients on a quadratic that cover a share of their way in each round, and where the model
ends. Right: clients that sit on the median where the block looks and push against the honest mean
elsewhere, and their weight in what the memory takes in.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fl_bgmd.aggregators import BlockMemory, block_geometric_median, geometric_median
from fl_bgmd.aggregators.location import robust_weights

DIMENSIONS, CLIENTS, COLLUDERS = 12_000, 10, 4
SHARES = (0.03, 0.1, 0.3, 0.5, 0.9, 1.0)
SPREADS = (1.0, 20.0)
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
CEILING = 1e4

Lines = dict[str, list[float]]


class Rule(Protocol):
    """A rule from round to round."""

    taken_in: NDArray[np.float64]
    """Weights of the rows in what the memory took in last, (n,); NaN without one."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the step of a round."""


class Median:
    """GMD: every coordinate moves in every round."""

    taken_in = np.full(CLIENTS + COLLUDERS, math.nan)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the step of a round."""
        return geometric_median(rows).vector


class Block:
    """BGMD with a memory of the library, from round to round."""

    def __init__(self, memory_rule: str) -> None:
        self.memory_rule = memory_rule
        self.memory: BlockMemory | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.taken_in = np.zeros(0)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the step of a round."""
        result = block_geometric_median(
            rows, self.memory, memory_rule=self.memory_rule, generator=self.generator
        )
        self.memory = result.memory
        self.taken_in = np.full(len(rows), 1 / len(rows))
        if self.memory_rule == "robust":
            # What the library sees is a sketch of this, exact with so few coordinates.
            outside = rows.double().index_fill(1, result.block, 0.0)
            self.taken_in = robust_weights(outside.numpy())
        return result.vector


class FirstGuarded:
    """BGMD with this project's first memory, which is gone from the library.

    It went by the weights of the block's median, clipped the residuals to their median norm, and
    came back in full.
    """

    def __init__(self) -> None:
        self.memory = torch.zeros(DIMENSIONS)
        self.generator = torch.Generator().manual_seed(0)
        self.taken_in = np.zeros(0)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the step of a round."""
        rows = rows + self.memory
        result = block_geometric_median(rows, memory_rule="none", generator=self.generator)
        assert result.weights is not None
        residuals = rows.index_fill(1, result.block, 0.0)
        norms = residuals.norm(dim=1).double()
        weights = result.weights * (norms.median() / norms.clip(min=1e-30)).clip(max=1.0)
        self.memory = weights.float() @ residuals
        self.taken_in = (weights / weights.sum()).numpy()
        return result.vector


RULES: dict[str, Callable[[], Rule]] = {
    "GMD": Median,
    "printed memory": partial(Block, "mean"),
    "first guarded memory": FirstGuarded,
    "guarded memory": partial(Block, "robust"),
}
STYLES = {
    "GMD": ("black", "--", "x"),
    "printed memory": ("tab:orange", "-.", "s"),
    "first guarded memory": ("tab:red", ":", "^"),
    "guarded memory": ("tab:blue", "-", "o"),
}


def honest(rule: Rule, share: float, spread: float, rounds: int = 150) -> float:
    """Return how far from the optimum a quadratic ends that starts at 10."""
    generator = torch.Generator().manual_seed(0)
    model = torch.randn(DIMENSIONS, generator=generator)
    model *= 10 / model.norm()
    curvature = torch.logspace(-math.log10(spread), 0, DIMENSIONS)
    curvature = curvature[torch.randperm(DIMENSIONS, generator=generator)]
    for _ in range(rounds):
        noise = 0.01 * torch.randn(CLIENTS, DIMENSIONS, generator=generator)
        model = model - rule(share * (curvature * model + noise / math.sqrt(DIMENSIONS)))
        if not float(model.norm()) < CEILING:
            return CEILING
    return float(model.norm())


def colluding(rows: Tensor, strength: float) -> Tensor:
    """Return a row on the median where the block looks, against the honest mean elsewhere."""
    mean = rows.mean(0)
    lie: Tensor = -strength * mean * (rows.norm(dim=1).median() / mean.norm())
    strong = torch.topk(rows.square().sum(0), DIMENSIONS // 4).indices
    lie[strong] = geometric_median(rows).vector[strong]
    return lie


def attacked(rule: Rule, share: float, strength: float, rounds: int = 60) -> tuple[float, float]:
    """Return the largest gradient of a run that starts at about 0.5, and the colluders' weight.

    Honest clients differ by three times what they agree on at first.
    """
    generator = torch.Generator().manual_seed(0)
    n = CLIENTS + COLLUDERS
    model = torch.randn(DIMENSIONS, generator=generator) / math.sqrt(DIMENSIONS)
    apart = torch.randn(n, DIMENSIONS, generator=generator) * 3 / math.sqrt(DIMENSIONS)
    apart -= apart[COLLUDERS:].mean(0)
    scales = torch.logspace(-1, 0, DIMENSIONS)
    worst, weights = 0.0, []
    for _ in range(rounds):
        rows = share * scales * (model + apart)
        rows[:COLLUDERS] = colluding(rows[COLLUDERS:], strength)
        model = model - rule(rows)
        worst = max(worst, float((scales * model).norm()))
        weights.append(float(rule.taken_in[:COLLUDERS].sum()))
    return min(worst, CEILING), float(np.mean(weights))


def draw(distances: dict[float, Lines], weights: Lines, output: Path) -> None:
    """Write the figure."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for panel, (spread, lines) in zip(panels, distances.items(), strict=False):
        for name, values in lines.items():
            color, line, marker = STYLES[name]
            panel.loglog(SHARES, values, color=color, ls=line, marker=marker, ms=5, label=name)
        panel.set(
            xlabel="share of its way that a client covers in a round",
            ylabel="distance after 150 rounds (10 at first)",
            title="Honest clients, "
            + ("equal curvature" if spread == 1 else f"curvature spread over {spread:.0f}"),
            ylim=(3e-4, 2 * CEILING),
        )
        panel.set_xticks(SHARES, [f"{share:g}" for share in SHARES], fontsize=7, rotation=45)
        panel.minorticks_off()
        panel.axhline(CEILING, color="0.7", lw=0.8)
        panel.text(SHARES[0], CEILING, "diverged", va="top", color="0.4", fontsize=8)
    for name, values in weights.items():
        color, line, marker = STYLES[name]
        panels[2].semilogx(STRENGTHS, values, color=color, ls=line, marker=marker, ms=5, label=name)
    rows = COLLUDERS / (CLIENTS + COLLUDERS)
    panels[2].axhline(rows, color="0.4", lw=0.8, label="their share of the rows")
    panels[2].set(
        xlabel="length of their lie, in honest updates",
        ylabel="their weight in the memory",
        title=f"{COLLUDERS} colluders of {CLIENTS + COLLUDERS}",
        ylim=(-0.03, 1.05),
    )
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.93))
    panels[2].legend(fontsize=8)
    figure.savefig(output, dpi=130)
    print(f"written: {output}")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def show(console: Console, title: str, columns: tuple[float, ...], lines: Lines) -> None:
    """Print one table: a line of figures for each rule."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(f"{column:g}", justify="right")
    for name, values in lines.items():
        table.add_row(
            name, *("diverged" if value >= CEILING else f"{value:.3f}" for value in values)
        )
    console.print(table)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=_path, default=Path("docs/memory.png"))
    options = parser.parse_args()
    console = Console(width=100)
    distances = {}
    for spread in SPREADS:
        distances[spread] = {
            name: [honest(make(), share, spread) for share in SHARES]
            for name, make in RULES.items()
        }
        title = f"Honest clients, curvature spread over {spread:g}: distance, by share of the way"
        show(console, title, SHARES, distances[spread])
    found = {
        name: [attacked(make(), 0.9, strength) for strength in STRENGTHS]
        for name, make in RULES.items()
    }
    worst = {name: [error for error, _ in pairs] for name, pairs in found.items()}
    weights = {
        name: [weight for _, weight in pairs] for name, pairs in found.items() if name != "GMD"
    }
    show(console, "Colluders: largest gradient, by length of their lie", STRENGTHS, worst)
    show(console, "Colluders: their weight in the memory", STRENGTHS, weights)
    draw(distances, weights, options.output)


if __name__ == "__main__":
    main()
