"""Grids of runs: strategies against attacks, each attack with several options, several seeds."""

import json
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fl_bgmd.attacks import ATTACKS, base_name, build_attacks
from fl_bgmd.attacks.plan import FORMER
from fl_bgmd.options import OptionError

from .backends import ClientResources, run
from .config import (
    SETTINGS,
    STRATEGY_KEYS,
    Config,
    ConfigError,
    Environment,
    Value,
    defaults,
    validate,
)
from .experiment import RunResult

ALL_ATTACKS = "all"

Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    strategy: str
    attack: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return cell_name(self.strategy, self.attack, self.seed)


def cell_name(strategy: str, attack: str, seed: int) -> str:
    """Return the name of a run's folder in its grid's."""
    return f"{strategy}/{attack}/seed-{seed}"


def plan_grid(
    given: Mapping[str, Value],
    strategies: Mapping[str, Mapping[str, Value]],
    attacks: Sequence[str],
    num_seeds: int,
    *,
    sweep: bool,
) -> list[Cell]:
    """Return the runs of a grid, validated.

    Parameters
    ----------
    given : mapping
        Run-configuration keys for all runs.
    strategies : mapping
        Name of each row to its own keys.
    attacks : sequence of str
        Specs of the columns; ``none`` runs without hostile clients.
    num_seeds : int
        Seeds ``given["seed"]`` and the next ones.
    sweep : bool
        Whether attacks that are named without options run with all values of their sweep.

    Raises
    ------
    ConfigError
        If any of the runs cannot be configured, or an attack is there twice.
    """
    first = int(given.get("seed", 0))
    if num_seeds < 1:
        raise ConfigError(f"seeds is {num_seeds}; allowed: 1 or more")
    specs = [spec for attack in attacks for spec in _specs(attack, sweep)]
    if twice := [spec for spec in dict.fromkeys(specs) if specs.count(spec) > 1]:
        raise ConfigError(f"attack holds {', '.join(twice)} twice; allowed: each once")
    cells = []
    for strategy, own in strategies.items():
        for spec in specs:
            for seed in range(first, first + num_seeds):
                keys: dict[str, Value] = {**given, **own, "attack": spec, "seed": seed}
                if spec == "none":
                    keys["byzantine-fraction"] = 0.0
                cells.append(Cell(strategy, spec, seed, validate(keys)))
    return cells


def columns(text: str) -> list[str]:
    """Return the attacks that ``--attack`` names: ``all``, or specs joined by commas."""
    # A comma within a spec stands before the next of its options.
    return ["none", *ATTACKS] if text == ALL_ATTACKS else re.split(r",(?![\w-]+=)", text)


def _specs(attack: str, sweep: bool) -> list[str]:
    """Return the specs that an attack runs with, in the form that its cells are named by."""
    try:
        bounds = build_attacks(attack)
    except OptionError as error:
        raise ConfigError(str(error)) from None
    if sweep and len(bounds) == 1 and attack == bounds[0].name:
        return [str(bound) for bound in bounds[0].attack.swept(bounds[0].path)]
    return ["+".join(map(str, bounds)) or "none"]


def run_grid(
    cells: Sequence[Cell],
    *,
    backend: str,
    resources: ClientResources,
    jobs: int,
    folder: Path,
    done: Callable[[Cell, RunResult], None],
) -> list[Line]:
    """Run all cells, ``jobs`` at a time, and write each into its folder and ``cells.jsonl``.

    Cells that ``folder`` already holds, finished with the same configuration, are not run again:
    an interrupted grid goes on. Lines of other cells stay in ``cells.jsonl``. ``done`` is called
    after each that was run. More than one job runs in-process grids in processes of their own,
    with the cores shared out among them. Lines come in the order of ``cells``.

    Raises
    ------
    ConfigError
        For ``jobs`` below 1, or above 1 with the Ray backend, which shares out the cores itself;
        for a folder that holds one of the cells, finished with another configuration.
    """
    if jobs < 1 or (jobs > 1 and backend == "ray"):
        raise ConfigError(f"jobs is {jobs} with backend {backend}; allowed: 1, more without Ray")
    folder.mkdir(parents=True, exist_ok=True)
    written = finished_before(cells, folder)
    waiting = [cell for cell in cells if cell.name not in written]
    planned = {cell.name for cell in cells}
    file = folder / "cells.jsonl"
    others = [line for line in _lines_of(file) if _name_of(line) not in planned]
    with file.open("w", encoding="utf-8") as lines:
        for line in (*others, *written.values()):
            lines.write(json.dumps(line) + "\n")
        lines.flush()
        for cell, result in _finished(waiting, backend, resources, jobs):
            result.write(folder / cell.name)
            written[cell.name] = line_of(cell, result)
            lines.write(json.dumps(written[cell.name]) + "\n")
            lines.flush()
            done(cell, result)
    return [written[cell.name] for cell in cells]


def finished_before(cells: Sequence[Cell], folder: Path) -> dict[str, Line]:
    """Return the lines of the finished cells that ``folder`` holds, by their names.

    Raises :class:`ConfigError` for one that was run with another configuration.
    """
    found = {}
    for cell in cells:
        record = folder / cell.name / "run.json"
        if record.is_file():
            result = RunResult.read(record.parent)
            if result.status != "failed":
                _refuse_another(result.config, cell, folder)
                found[cell.name] = line_of(cell, result)
    return found


def _refuse_another(stored: Config, cell: Cell, folder: Path) -> None:
    """Raise unless a stored run is what is wanted, wherever it was computed."""
    stored = {**defaults(), **stored}  # keys that are newer than the run have their defaults
    for key, default in FORMER.items():
        if stored.get(key, default) != default:
            raise ConfigError(
                f"folder is {str(folder)!r}, whose {cell.name} was run with {key} {stored[key]!r} "
                "by an older version; allowed: a new folder"
            )
    for key, wanted in cell.config.items():
        if key not in _PLACES and stored[key] != wanted:
            raise ConfigError(
                f"folder is {str(folder)!r}, whose {cell.name} was run with {key} {stored[key]!r} "
                f"and not {wanted!r}; allowed: a new folder, or the same settings"
            )


def _name_of(line: Line) -> str:
    """Return the name of the cell that a line of ``cells.jsonl`` is of."""
    if line.get("strength"):  # of an older version, which had it beside the attack
        raise ValueError("strength")
    return cell_name(*(line[key] for key in ("strategy", "attack", "seed")))


def _finished(
    cells: Sequence[Cell], backend: str, resources: ClientResources, jobs: int
) -> Iterator[tuple[Cell, RunResult]]:
    if jobs == 1:
        for cell in cells:
            yield cell, run(cell.config, backend=backend, resources=resources)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(threads, logging.getLogger("flwr").level),
    ) as pool:
        # Interrupts are the parent's to answer: the workers inherit that they are blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waiting = {pool.submit(run, cell.config, backend=backend): cell for cell in cells}
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare_worker(threads: int, log_level: int) -> None:
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")  # NumPy's, which knows nothing of torch's
    logging.getLogger("flwr").setLevel(log_level)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the grid's process is killed: it would go on computing for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_PLACES = tuple(key for key, option in SETTINGS.items() if option.has(Environment))

_OF_STRATEGIES = {"strategy", *STRATEGY_KEYS.values()} - {"assumed-byzantine-fraction"}
"""What the cells of a strategy share; all else is shared by the cells of a table.

But for the attack, the seed, and the hostile share where nobody attacks.
"""


def line_of(cell: Cell, result: RunResult) -> Line:
    """Return what a run's line of ``cells.jsonl`` says."""
    return {
        "strategy": cell.strategy,
        "attack": cell.attack,
        "seed": cell.seed,
        "status": result.status,
        "error": result.error,
        "final-accuracy": result.final_accuracy,
        "backdoor-success": result.last("backdoor-success", None),
        "class-accuracies": result.last("class-accuracies", None),
        "played": result.played,
        "seconds": result.seconds,
        "setting": {
            key: value
            for key, value in cell.config.items()
            if key not in (*_PLACES, "attack", "seed")
        },
    }


def read_cells(paths: Sequence[Path]) -> list[Line]:
    """Read the ``cells.jsonl`` of finished grids, given as files or their folders.

    Raises :class:`ConfigError` for a path without one.
    """
    lines: list[Line] = []
    for path in paths:
        file = path / "cells.jsonl" if path.is_dir() else path
        found = _lines_of(file)
        if not found:
            raise ConfigError(
                f"results is {str(path)!r}; allowed: a folder with a cells.jsonl of finished runs"
            )
        lines += found
    _refuse_mixtures(lines)
    return lines


def _lines_of(file: Path) -> list[Line]:
    """Return the lines of a ``cells.jsonl``, none where there is no file.

    Raises :class:`ConfigError` naming the line that is none of a run.
    """
    found: list[Line] = []
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    complete = text[: text.rfind("\n") + 1]  # an interrupted grid may leave half a line
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            found.append(json.loads(line))
            _name_of(found[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"results holds {str(file)!r}, whose line {number} is none of a run; allowed: what "
                "compare has written"
            ) from error
    return found


def _refuse_mixtures(lines: Sequence[Line]) -> None:
    """Raise for cells whose mean would mean nothing: of other settings, or the same run twice."""
    settings: dict[tuple[str, str], Any] = {}
    runs = set()
    for line in lines:
        for key, value in line.get("setting", {}).items():
            if key == "byzantine-fraction" and line["attack"] == "none":
                continue
            of = line["strategy"] if key in _OF_STRATEGIES else ""
            if (known := settings.setdefault((of, key), value)) != value:
                raise ConfigError(
                    f"results hold runs {of and f'of {of} '}with {key} {known!r} and {value!r}; "
                    "allowed: those of one setting"
                )
        run = (line["strategy"], line["attack"], line["seed"])
        if run in runs:
            raise ConfigError(f"results hold the run {run} twice; allowed: once")
        runs.add(run)


def accuracy_table(lines: Sequence[Line]) -> tuple[list[str], dict[str, list[float]]]:
    """Return ``(attacks, rows)``: mean final accuracy over seeds, the worst of an attack's options.

    Each row ends with the worst of its attacks. A failed run makes its cell NaN, and so does one
    that was not run: each strategy needs the seeds and options that any of them has.
    """
    means = _over_seeds(lines, lambda line: line["final-accuracy"])
    found = {attack for _, attack in means}
    attacks = [attack for attack in ("none", *ATTACKS) if attack in found]
    attacks += sorted(found - set(attacks))
    rows: dict[str, list[float]] = {}
    for strategy in _strategies(lines):
        row = [_worst(means.get((strategy, attack), [])) for attack in attacks]
        rows[strategy] = [*row, _worst(row)]
    return [*attacks, "worst"], rows


def detailed_table(lines: Sequence[Line]) -> tuple[list[str], dict[str, list[float]]]:
    """Return :func:`accuracy_table` with what the accuracy does not say, as far as it was run.

    ``worst class``, behind ``none``, is the accuracy on the class that is recognised least where
    nobody attacks; ``... success``, behind an attack with a target, such as ``backdoor``, the share
    of the other classes' examples that are taken for it, the most over the attack's options. Both
    are means over seeds.
    """
    attacks, accuracies = accuracy_table(lines)
    classes = _over_seeds(lines, lambda line: min(line["class-accuracies"] or [math.nan]))
    successes = _over_seeds(lines, lambda line: line["backdoor-success"])
    targeted = {base_name(line["attack"]) for line in lines if line["backdoor-success"] is not None}
    table: dict[str, Sequence[float]] = {}
    for attack, values in zip(attacks, zip(*accuracies.values(), strict=True), strict=True):
        table[attack] = values
        if attack == "none":
            table["worst class"] = [_worst(classes.get((s, attack), [])) for s in accuracies]
        if attack in targeted:
            table[f"{attack} success"] = [
                float(np.max(successes.get((s, attack), [math.nan]))) for s in accuracies
            ]
    rows = zip(*table.values(), strict=True)
    return list(table), {s: list(row) for s, row in zip(accuracies, rows, strict=True)}


def _strategies(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["strategy"] for line in lines))


def _over_seeds(
    lines: Sequence[Line], value: Callable[[Line], float | None]
) -> dict[tuple[str, str], list[float]]:
    """Return means over seeds by strategy and attack without options, one for each spec of it.

    NaN where a run failed or is missing that another strategy has.
    """
    found: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    wanted: dict[str, dict[str, set[int]]] = {}
    for line in lines:
        of, spec, seed = (line[key] for key in ("strategy", "attack", "seed"))
        attack = base_name(spec)
        wanted.setdefault(attack, {}).setdefault(spec, set()).add(seed)
        result = None if line["status"] == "failed" else value(line)
        result = math.nan if result is None else result
        found.setdefault((of, attack), {})[spec, seed] = result
    return {
        (of, attack): [
            sum(values.get((spec, seed), math.nan) for seed in seeds) / len(seeds)
            for spec, seeds in wanted[attack].items()
        ]
        for (of, attack), values in found.items()
    }


def _worst(values: Sequence[float]) -> float:
    return float(np.min(values)) if values else math.nan  # NaN if there is one
