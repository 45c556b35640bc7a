"""The worst case of a rule: colluders that search their strength against it every 12 rounds.

``python -m benchmarks.collusion`` trains on MNIST with 14 clients, 4 of them hostile throughout.
Finished cells are lines of a file and are not measured again; ``--table`` prints them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.cells import measured
from benchmarks.searched_run import Cell, Outcome, measure
from simulations.report.tables import markdown

RULES = ("bgmd", "gmd")
ATTACKS = (
    *("memory-takeover", "memory-consistent", "fang-krum", "fang"),
    *("ipm", "alie", "consistent", "none"),
)

Found = dict[Cell, float]
"""Accuracies by cell."""


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return what the options ask for, an attack with all its rules before the next."""
    return [
        Cell(rule, attack, momentum, rate, options.steps, options.hidden, seed)
        for attack, rule, momentum, rate, seed in itertools.product(
            options.attacks, options.rules, options.momentum, options.learning_rate, options.seeds
        )
    ]


def read(path: Path, what: str = "accuracy") -> Found:
    """Return the finished cells of a file that hold ``what`` (cells of old lack ``averaged``).

    Raises ``ValueError`` for a line that is none.
    """
    found: Found = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            cell = Cell(**{entry.name: line[entry.name] for entry in fields(Cell)})
            accuracy = line["accuracy"] if what == "accuracy" else line.get(what)
            if accuracy is not None:
                found[cell] = float(accuracy)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no finished cell: {error!r}") from error
    return found


def write(path: Path, cell: Cell, outcome: Outcome) -> None:
    """Add a finished cell to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(cell) | asdict(outcome)) + "\n")


def run(wanted: Iterable[Cell], path: Path, jobs: int, what: str = "accuracy") -> None:
    """Measure the cells that the file lacks, ``jobs`` at a time, and add each as it ends."""
    done = read(path, what) if path.exists() else {}
    missing = [cell for cell in wanted if cell not in done]
    print(f"{len(missing)} cells to measure, results in {path}", file=sys.stderr)
    for cell, outcome in measured(measure, missing, jobs):
        write(path, cell, outcome)
        print(f"{cell}: {outcome.accuracy} in {outcome.seconds:.0f} s", file=sys.stderr)


def tables(found: Found) -> str:
    """Return a Markdown table of each setting: mean accuracy, least and largest of the seeds."""
    groups: dict[tuple[float, float, int, int], list[Cell]] = {}
    for cell in found:
        setting = cell.momentum, cell.learning_rate, cell.steps, cell.hidden
        groups.setdefault(setting, []).append(cell)
    return "\n\n".join(
        f"Worker momentum {momentum:g}, learning rate {rate:g}, {steps} steps, {hidden} hidden "
        f"units, seeds {_seeds(groups[momentum, rate, steps, hidden])}:\n\n"
        + _table(groups[momentum, rate, steps, hidden], found)
        for momentum, rate, steps, hidden in sorted(groups)
    )


def _seeds(group: Sequence[Cell]) -> str:
    return ", ".join(str(seed) for seed in sorted({cell.seed for cell in group}))


def _table(group: Sequence[Cell], found: Found) -> str:
    attacks = sorted({cell.attack for cell in group}, key=partial(_place, ATTACKS))
    rules = sorted({cell.rule for cell in group}, key=partial(_place, RULES))
    seeds = len({cell.seed for cell in group})
    lines = []
    for rule in rules:
        accuracies = {
            attack: [found[cell] for cell in group if (cell.rule, cell.attack) == (rule, attack)]
            for attack in attacks
        }
        means = {name: sum(values) / len(values) for name, values in accuracies.items() if values}
        worst = min(means, key=lambda name: means[name])
        missing = any(len(values) < seeds for values in accuracies.values())
        lines.append(
            [
                rule,
                *(_entry(values, seeds) for values in accuracies.values()),
                f"{means[worst]:.1f} ({worst}{', incomplete' if missing else ''})",
            ]
        )
    return markdown(pd.DataFrame(lines, columns=["rule", *attacks, "worst case"]))


def _entry(accuracies: Sequence[float], seeds: int) -> str:
    """Return the mean with the least and the largest, and how many there are if some lack."""
    if not accuracies:
        return "-"
    if seeds == 1:
        return f"{accuracies[0]:.1f}"
    lack = f", {len(accuracies)} of {seeds} seeds" if len(accuracies) < seeds else ""
    average = sum(accuracies) / len(accuracies)
    return f"{average:.1f} ({min(accuracies):.1f} to {max(accuracies):.1f}{lack})"


def _place(order: Sequence[str], name: str) -> tuple[int, str]:
    """Return a key that sorts the known in their order, and the others by name before the last."""
    return (order.index(name) if name in order else len(order) - 1, name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=RULES, metavar="RULE")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS, metavar="ATTACK")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--momentum", nargs="+", type=float, default=(0.0, 0.9), metavar="BETA")
    parser.add_argument("--learning-rate", nargs="+", type=float, default=(0.2,), metavar="RATE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128, help="units of the hidden layer")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument(
        "--output",
        type=lambda text: Path(text).expanduser(),
        default=Path("results/collusion.jsonl"),
    )
    parser.add_argument("--table", action="store_true", help="print what there is, measure nothing")
    parser.add_argument(
        "--averaged", action="store_true", help="the averaged models, not the last ones"
    )
    options = parser.parse_args(arguments)
    try:
        wanted = cells(options)
    except ValueError as error:
        parser.error(str(error))
    what = "averaged" if options.averaged else "accuracy"
    if options.table:
        print(tables(read(options.output, what)))
    else:
        run(wanted, options.output, options.jobs, what)


if __name__ == "__main__":
    main()
