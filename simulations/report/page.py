"""The report of runs as one HTML file, which works offline: plotly stands in the file."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fl_bgmd.attacks import AttackPlan
from fl_bgmd.extras import require
from fl_bgmd.strategies import RobustResult

from ..experiment import RunResult, environment, history_of
from ..runner import Line, name_of, row_of
from .template import PAGE

MOST_RUNS = 24
"""Runs whose clients are shown: a study may have thousands, and a browser one memory."""

MOST_CELLS = 100_000
"""Cells of a map; of longer runs every other round is shown, or every third and so on."""

PHASES = ("waiting", "screening", "rule", "evaluation")

NO_PLOTLY = "report.html is not written: plotly is missing (pip install 'fl-bgmd[plots]')"


def has_plotly() -> bool:
    """Whether there is a plotly to embed."""
    return find_spec("plotly") is not None


def write_report(
    result: RobustResult,
    folder: Path | str,
    *,
    accuracy: str = "accuracy",
    config: Mapping[str, Any] | None = None,
    title: str = "Federated run",
) -> Path:
    """Write the report of a run of your own app; return the path of ``report.html``.

    Parameters
    ----------
    result : RobustResult
        What ``strategy.start`` of any strategy of :mod:`fl_bgmd.strategies` returned.
    folder : path
        For the file; it is made where it is not there.
    accuracy : str
        The metric, 0 to 1, to draw by round: of ``evaluate_fn``, or of the clients' evaluation.
    config : mapping, optional
        What else shall stand in the report, such as the app's ``context.run_config``.
    title : str
        The heading.

    Raises
    ------
    MissingExtraError
        Where plotly is not installed.
    ValueError
        For another ``accuracy`` than the default that no round has.
    """
    require("plotly", "report.html", "plots")
    rounds = [_with_accuracy(entry, accuracy) for entry in history_of(result)]
    if accuracy != "accuracy" and not any("accuracy" in entry for entry in rounds):
        names = sorted({key for entry in rounds for key in entry})
        raise ValueError(f"accuracy is {accuracy!r}; allowed: {', '.join(names)}")
    told = {**environment(), **(config or {})}
    run = RunResult({}, rounds, verdicts=result.verdicts, environment=told)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return write_page(place, [(title, title, run)], title=title)


def _with_accuracy(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a round whose ``accuracy`` is the metric called ``name``, if it has that."""
    others = {key: value for key, value in entry.items() if key != "accuracy"}
    found = entry.get(name, entry.get(f"clients-{name}"))
    return others if found is None else {**others, "accuracy": found}


def write_run_page(folder: Path, output: Path | None = None, *, title: str = "") -> Path:
    """Write the report of the run that a folder holds, there or to ``output``; return its path."""
    result = RunResult.read(folder)
    cell = f"{result.config['strategy']} under {result.config['attack']}"
    named = f"{cell}, seed {result.config['seed']}"
    return write_page(output or folder, [(cell, named, result)], title=title or cell)


def write_page(
    folder: Path,
    runs: Sequence[tuple[str, str, RunResult]],
    *,
    title: str,
    about: str = "",
    table: Sequence[Sequence[str]] = (),
) -> Path:
    """Write ``report.html``; return its path.

    Parameters
    ----------
    folder : Path
        For the file.
    runs : sequence of (str, str, RunResult)
        Name of the cell, ``row under column``, and of the run, and the run.
    title, about : str
        The heading, and what stands below it.
    table : sequence of sequence of str
        Of a study, its first row the headings.
    """
    from plotly.offline import get_plotlyjs

    data = {
        "curves": _curves(runs),
        "runs": [_run(cell, name, run) for cell, name, run in runs[:MOST_RUNS]],
        "left": max(0, len(runs) - MOST_RUNS),
    }
    # What is told comes from files: no tag in it ends the script.
    text = json.dumps(_finite(data), allow_nan=False).replace("<", "\\u003c")
    page = PAGE
    for mark, value in {
        "PLOTLY": get_plotlyjs(),
        "TITLE": escape(title),
        "ABOUT": escape(about),
        "TABLE": _table(table),
        "DATA": text,
    }.items():
        page = page.replace(f"<!--{mark}-->", value)
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def runs_in(lines: Sequence[Line], folder: Path) -> list[tuple[str, str, RunResult]]:
    """Return the runs of a study's lines that are in its folder, as :func:`write_page` takes them.

    Those of the same cell stand together, hostile columns first.
    """
    found = []
    for line in lines:
        home = folder / name_of(line)
        if (home / "run.json").is_file():
            cell = f"{row_of(line)} under {line['column']}"
            found.append((cell, f"{cell}, seed {line['seed']}", RunResult.read(home)))
    return sorted(found, key=lambda run: (run[0].endswith(" under none"), run[0]))


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = ([str(cell).replace("**", "") for cell in row] for row in rows)
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    inner = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f'<div class="wide"><table>{inner}</table></div>'
    return f"<section><h2>Final accuracy</h2>{table}</section>"


def _curves(runs: Sequence[tuple[str, str, RunResult]]) -> list[dict[str, Any]]:
    """Return the accuracy of each run by round, with the cell it belongs to."""
    return [
        {
            "cell": cell,
            "name": name,
            "x": list(run.accuracies),
            "y": [100 * value for value in run.accuracies.values()],
        }
        for cell, name, run in runs
    ]


def _run(cell: str, name: str, run: RunResult) -> dict[str, Any]:
    """Return what the page shows of a run."""
    rounds = [entry for entry in run.rounds if int(entry["round"]) > 0]
    classes = run.last("class-accuracies", [])
    reasons: dict[str, int] = {}
    for verdict in run.verdicts:
        if not verdict.accepted:
            reasons[verdict.verdict] = reasons.get(verdict.verdict, 0) + 1
    return {
        "name": name,
        "status": run.status,
        "error": run.error,
        "map": _map(run),
        "reasons": reasons,
        "rounds": [entry["round"] for entry in rounds],
        "bytes": {key: [e.get(key) for e in rounds] for key in ("bytes-up", "bytes-down")},
        "seconds": {key: [e.get(f"{key}-seconds") for e in rounds] for key in PHASES},
        "classes": [100 * value for value in classes],
        "config": {key: str(value) for key, value in run.config.items()},
        "versions": {key: str(value) for key, value in run.environment.items()},
    }


def _map(run: RunResult) -> dict[str, Any]:
    """Return a client x round map: verdicts, weights, distances and true roles."""
    partitions = {v.node: v.partition for v in run.verdicts if v.partition is not None}
    nodes = sorted(
        {v.node for v in run.verdicts}, key=lambda n: (n not in partitions, partitions.get(n, 0), n)
    )
    rounds = sorted({v.round for v in run.verdicts})
    step = max(1, -(-len(nodes) * len(rounds) // MOST_CELLS))
    rounds = rounds[step - 1 :: step]
    rows = {node: place for place, node in enumerate(nodes)}
    columns = {number: place for place, number in enumerate(rounds)}
    cells: list[list[Any]] = [[None] * len(rounds) for _ in nodes]
    for v in run.verdicts:
        if v.round in columns:
            cells[rows[v.node]][columns[v.round]] = [v.verdict, v.weight, v.norm, v.distance]
    plan, count = AttackPlan.from_config(run.config), int(run.config.get("num-clients", 0))
    hostile = [
        [rows[node], columns[number]]
        for number in rounds
        for roles in [plan.roles(count, number)]
        for node in nodes
        if partitions.get(node) in roles
    ]
    return {
        "labels": [
            f"client {partitions[node]}" if node in partitions else _short(node, nodes)
            for node in nodes
        ],
        "nodes": [str(node) for node in nodes],
        "rounds": rounds,
        "cells": cells,
        "hostile": hostile,
    }


def _short(node: int, nodes: Sequence[int]) -> str:
    """Return the last digits of a node's id, or all of them where two nodes would look alike."""
    last = node % 10**6
    alike = sum(other % 10**6 == last for other in nodes)
    return f"node {node}" if alike > 1 or node == last else f"node …{last:06d}"


def _finite(value: Any) -> Any:
    """Return ``value`` with None for what JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) <= 1e300):
        return None
    return value
