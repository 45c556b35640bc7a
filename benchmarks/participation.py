"""Two unknowns of a round: who is sampled, and how many lie. MNIST, ``mlp``, in this process.

``python -m benchmarks.participation --output FILE`` measures what the file lacks: part
``participation`` (100 clients, 10 sampled, with and without ``stale_updates``) and part ``share``
(20 clients, all asked, the hostile share assumed too low, right, too high, and ``auto``). A fifth
of the clients is hostile throughout, and clients have a momentum of 0.9. ``--table`` prints it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.cells import measured
from fl_bgmd.simulations import run
from simulations.report.tables import markdown

ATTACKS = ("none", "sign-flip", "ipm:10", "ipm:0.5", "alie")


@dataclass(frozen=True)
class Cell:
    """One run."""

    part: str
    rule: str
    attack: str
    assumed: str
    """``assumed-byzantine-fraction``."""
    stale_updates: int = 0
    learning_rate: float = 0.1
    rounds: int = 80
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """Return the run's configuration."""
        sampled = self.part == "participation"
        return {
            "dataset": "mnist",
            "model": "mlp",
            "partition": "dirichlet:1",
            "num-clients": 100 if sampled else 20,
            "fraction-train": 0.1 if sampled else 1.0,
            "byzantine-fraction": 0.0 if self.attack == "none" else 0.2,
            "byzantine-selection": "fixed",
            "attack": self.attack,
            "strategy": self.rule,
            "assumed-byzantine-fraction": self.assumed,
            "stale-updates": self.stale_updates,
            "client-momentum": 0.9,
            "local-steps": 1,
            "momentum": 0.0,
            "learning-rate": self.learning_rate,
            "num-server-rounds": self.rounds,
            "model-average": 0.0,
            "evaluate-every": 10,
            "seed": self.seed,
        }


Found = dict[Cell, dict[str, Any]]
"""What runs came to: accuracy after the last round and the least after half of them, in percent;
the mean of what was assumed, where it was estimated."""


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield what the options ask for."""
    for seed, attack in itertools.product(options.seeds, options.attacks):
        if options.part == "participation":
            for rule, stale in itertools.product(options.rules, options.stale):
                yield Cell(
                    options.part, rule, attack, "0.25", stale, rounds=options.rounds, seed=seed
                )
        else:
            for rule, assumed in itertools.product(options.rules, options.assumed):
                yield Cell(options.part, rule, attack, assumed, rounds=options.rounds, seed=seed)


def measure(cell: Cell) -> dict[str, Any]:
    """Train as the cell says."""
    result = run(cell.config())
    late = [a for number, a in result.accuracies.items() if number >= cell.rounds / 2]
    estimates = [r["byzantine-fraction"] for r in result.rounds if "byzantine-fraction" in r]
    return {
        "status": result.status,
        "accuracy": round(100 * result.final_accuracy, 2),
        "least": round(100 * min(late), 2) if late else float("nan"),
        "estimate": round(sum(estimates) / len(estimates), 3) if estimates else None,
        "seconds": round(result.seconds, 1),
    }


def read(path: Path) -> Found:
    """Return the finished cells of a file."""
    found: Found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        cell = Cell(**{each.name: line.pop(each.name) for each in fields(Cell)})
        found[cell] = line
    return found


def measure_all(wanted: Sequence[Cell], path: Path, jobs: int) -> None:
    """Measure what the file lacks in ``jobs`` processes; add each cell to it as it ends."""
    done = read(path)
    missing = [cell for cell in wanted if cell not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell, outcome in measured(measure, missing, jobs):
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(cell) | outcome) + "\n")
        print(cell, outcome, file=sys.stderr)


def tables(found: Found) -> str:
    """Return a Markdown table of each part: mean final accuracy, and each seed's."""
    return "\n\n".join(
        _table(part, {cell: line for cell, line in found.items() if cell.part == part})
        for part in sorted({cell.part for cell in found})
    )


def _table(part: str, found: Found) -> str:
    attacks = [name for name in ATTACKS if any(cell.attack == name for cell in found)]
    column = "stale_updates" if part == "participation" else "assumed"
    lines = []
    for rule, value in sorted({(cell.rule, str(getattr(cell, column))) for cell in found}):
        entries = []
        for attack in attacks:
            own = {
                cell: line
                for cell, line in found.items()
                if (cell.rule, str(getattr(cell, column)), cell.attack) == (rule, value, attack)
            }
            entries.append(_entry(list(own.values())))
        lines.append([rule, value, *entries])
    return markdown(pd.DataFrame(lines, columns=["rule", column, *attacks]))


def _entry(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return "-"
    accuracies = [line["accuracy"] for line in runs]
    text = f"{sum(accuracies) / len(runs):.1f}"
    if len(runs) > 1:
        text += f" ({min(accuracies):.1f} to {max(accuracies):.1f})"
    estimates = [line["estimate"] for line in runs if line["estimate"] is not None]
    return text + (f", assumed {sum(estimates) / len(estimates):.2f}" if estimates else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("participation", "share"), default="participation")
    parser.add_argument("--rules", nargs="+", default=("gmd", "trimmed-mean"), metavar="RULE")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS[:3], metavar="ATTACK")
    parser.add_argument("--stale", nargs="+", type=int, default=(0, 30), metavar="ROUNDS")
    parser.add_argument(
        "--assumed", nargs="+", default=("0.1", "0.2", "0.3", "auto"), metavar="SHARE"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1), metavar="SEED")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--output", type=Path, default=Path("results/participation.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what there is, measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(read(options.output)))
    else:
        measure_all(list(cells(options)), options.output, options.jobs)


if __name__ == "__main__":
    main()
