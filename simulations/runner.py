"""Running the cells of a study, several at a time, and what is kept of them.

A study's folder holds ``ROW/COLUMN/seed-N/`` for each run (see :class:`.experiment.RunResult`) and
``cells.jsonl`` with a line for each. A study that is run again in its folder runs what is missing.
"""

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fl_bgmd.attacks.plan import FORMER
from fl_bgmd.options import Environment

from .backends import ON_RAY, ClientResources, run_validated
from .config import OLDER, SETTINGS, STRATEGY_KEYS, Config, ConfigError, defaults
from .experiment import OnRound, RunResult
from .processes import interrupts_held_back, take_over, workers
from .study import Cell, cell_name, told

Line = dict[str, Any]
"""What ``cells.jsonl`` says of a run."""

OnProgress = Callable[[str, int, float | None], None]
"""Called after each round of any run: its name, the round, the accuracy where it was evaluated."""

_PLACES = tuple(key for key, option in SETTINGS.items() if option.has(Environment))


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    backend: str = "inprocess",
    resources: ClientResources | None = None,
    jobs: int = 1,
    found: Mapping[str, Line] | None = None,
    on_progress: OnProgress | None = None,
    on_done: Callable[[Cell, RunResult], None] | None = None,
) -> list[Line]:
    """Run all cells, ``jobs`` at a time, and write each into its folder and ``cells.jsonl``.

    Cells that ``folder`` holds, finished with the same configuration, are not run again: an
    interrupted study resumes; ``found`` is what :func:`finished_before` said of it, where that has
    been asked already. Lines of other cells stay in ``cells.jsonl``. ``on_done`` is called
    after each cell that was run. More than one job runs in processes of their own, with the cores
    shared out among them; where a single run is left to do, in process, its clients do. Lines come
    in the order of ``cells``.

    Raises
    ------
    ConfigError
        For ``jobs`` below 1, or above 1 with the Ray backend, which shares out the cores itself;
        for a folder that holds one of the cells, finished with another configuration.
    """
    if jobs < 1 or (jobs > 1 and backend in ON_RAY):
        raise ConfigError(f"jobs is {jobs} with backend {backend}; allowed: 1, more without Ray")
    folder.mkdir(parents=True, exist_ok=True)
    written = finished_before(cells, folder) if found is None else dict(found)
    waiting = [cell for cell in cells if cell.name not in written]
    planned = {cell.name for cell in cells}
    file = folder / "cells.jsonl"
    others = [line for line in _lines_of(file) if name_of(line) not in planned]
    tell = on_progress or (lambda *_: None)
    with file.open("w", encoding="utf-8") as lines:
        for line in (*others, *written.values()):
            lines.write(json.dumps(line) + "\n")
        lines.flush()
        for cell, result in _finished(waiting, folder, backend, resources, jobs, tell):
            result.write(folder / cell.name)
            written[cell.name] = line_of(cell, result)
            lines.write(json.dumps(written[cell.name]) + "\n")
            lines.flush()
            if on_done is not None:
                on_done(cell, result)
    return [written[cell.name] for cell in cells]


# ---------------------------------------------------------------------------------- the pool


def _finished(
    cells: Sequence[Cell],
    folder: Path,
    backend: str,
    resources: ClientResources | None,
    jobs: int,
    tell: OnProgress,
) -> Iterator[tuple[Cell, RunResult]]:
    if jobs == 1 or (len(cells) == 1 and backend == "inprocess"):
        for cell in cells:
            heard, home = _teller(tell, cell.name), folder / cell.name
            given = resources or ClientResources()
            yield cell, run_validated(cell.config, backend, given, heard, home, jobs)
        return
    with pool(jobs, tell) as executor:
        try:
            with interrupts_held_back():
                waiting = {
                    executor.submit(_run_in_worker, cell.config, backend, cell.name, folder): cell
                    for cell in cells
                }
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except KeyboardInterrupt:
            # One that is still starting would miss the queues that end with this process.
            for worker in multiprocessing.active_children():
                worker.kill()
            executor.shutdown(cancel_futures=True)
            raise


def _teller(tell: OnProgress, name: str) -> OnRound:
    return lambda number, accuracy: tell(name, number, accuracy)


@contextmanager
def pool(jobs: int, tell: OnProgress | None = None) -> Iterator[ProcessPoolExecutor]:
    """Provide processes that share out the cores, end with this one and report their rounds."""
    context = workers()
    # Not a queue: it ends with a word of this process, which a worker that is killed while it
    # reports keeps from being said. This ends with those who report.
    news, sender = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // jobs)
    listener = threading.Thread(target=_listen, args=(news, tell), daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_prepare_worker,
            initargs=(
                *(dict(os.environ), threads, logging.getLogger("flwr").level),
                *(sender, context.Lock()),
            ),
        ) as executor:
            yield executor
    finally:
        sender.close()
        listener.join(timeout=1)


def _listen(news: Any, tell: OnProgress | None) -> None:
    while True:
        try:
            event = news.recv()
        except (EOFError, OSError):  # in between, or in the middle of a report
            return
        if tell is not None:
            tell(*event)


_NEWS: list[Any] = []
"""In a worker: where it reports its rounds, and what one at a time holds for that."""


def _prepare_worker(
    environment: dict[str, str], threads: int, log_level: int, sender: Any, one_at_a_time: Any
) -> None:
    take_over(environment)
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")  # NumPy's, which knows nothing of torch's
    logging.getLogger("flwr").setLevel(log_level)
    _NEWS[:] = [sender, one_at_a_time]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run_in_worker(config: Config, backend: str, name: str, folder: Path) -> RunResult:
    def tell(number: int, accuracy: float | None) -> None:
        sender, one_at_a_time = _NEWS
        with one_at_a_time:
            sender.send((name, number, accuracy))

    return run_validated(config, backend, ClientResources(), tell, folder / name)


def _end_with_parent() -> None:
    """End this worker when the study's process is killed: it would compute for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ------------------------------------------------------------------------------- what is kept


def finished_before(cells: Sequence[Cell], folder: Path) -> dict[str, Line]:
    """Return the lines of the finished cells that ``folder`` holds, by their names.

    A line of its ``cells.jsonl`` is enough: what is published of a study is continued by it.

    Raises :class:`ConfigError` for one that was run with another configuration.
    """
    found = {}
    told = {name_of(line): line for line in _lines_of(folder / "cells.jsonl")}
    for cell in cells:
        record = folder / cell.name / "run.json"
        if record.is_file():
            result = RunResult.read(record.parent)
            if result.status != "failed":
                _refuse_another(result.config, cell, folder)
                found[cell.name] = line_of(cell, result)
        elif record.parent.exists():
            continue  # what is there of it is not whole
        elif (line := told.get(cell.name)) is not None and line["status"] != "failed":
            _refuse_another(line["setting"], cell, folder)
            found[cell.name] = line
    return found


def result_of(line: Line, folder: Path) -> RunResult | None:
    """Return the run of a line: what its folder holds, or the line's own history, if any."""
    home = folder / name_of(line)
    if (home / "run.json").is_file():
        return RunResult.read(home)
    if "history" not in line:
        return None
    told = ("status", "error", "seconds", "played")
    config = {**defaults(), **OLDER, **line["setting"]}
    return RunResult(config, rounds=line["history"], **{key: line[key] for key in told})


def _refuse_another(stored: Config, cell: Cell, folder: Path) -> None:
    """Raise unless a stored run is what is wanted, wherever it was computed."""
    stored = {**defaults(), **OLDER, **stored}  # keys that are newer than the run
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


def line_of(cell: Cell, result: RunResult) -> Line:
    """Return what a run's line of ``cells.jsonl`` says."""
    return {
        "row": cell.row,
        "column": cell.column,
        "group": cell.group,
        "seed": cell.seed,
        "status": result.status,
        "error": result.error,
        "final-accuracy": result.final_accuracy,
        "best-accuracy": result.best_accuracy,
        "validation-accuracy": result.last("validation-accuracy", None),
        "backdoor-success": result.last("backdoor-success", None),
        "class-accuracies": result.last("class-accuracies", None),
        "accepted": result.total("accepted"),
        "rejected": result.total("rejected"),
        "bytes-up": result.total("bytes-up"),
        "bytes-down": result.total("bytes-down"),
        "played": result.played,
        "seconds": result.seconds,
        "seconds-per-round": result.seconds_per_round,
        "history": result.milestones,
        "choice": dict(cell.choice),
        "varies": list(cell.varies),
        "setting": {key: value for key, value in cell.config.items() if key not in _PLACES},
    }


def read_lines(folders: Sequence[Path]) -> list[Line]:
    """Read the ``cells.jsonl`` of studies, given as files or their folders.

    Raises
    ------
    ConfigError
        For a path without one, and for runs whose table would mean nothing: of settings that
        neither rows nor columns account for, or the same run twice.
    """
    lines: list[Line] = []
    for path in folders:
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

    Raises :class:`ConfigError` naming a line that describes no run.
    """
    found: list[Line] = []
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    complete = text[: text.rfind("\n") + 1]  # an interrupted study may leave half a line
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            found.append(json.loads(line))
            name_of(found[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"results holds {str(file)!r}, whose line {number} describes no run; allowed: what "
                "run and compare have written"
            ) from error
    return found


def name_of(line: Line) -> str:
    """Return the name of the cell that a line of ``cells.jsonl`` describes."""
    row, column, seed = (line[key] for key in ("row", "column", "seed"))
    return cell_name(row, column, seed, line.get("choice", {}))


def row_of(line: Line) -> str:
    """Return a row's name with the values that were chosen for it."""
    return " ".join([line["row"], *(f"({text})" for text in told(line.get("choice", {})))])


_OF_ROWS = {"strategy", *STRATEGY_KEYS.values()} - {"assumed-byzantine-fraction"}
"""What may differ from row to row, whether or not the study's rows set it."""


def _refuse_mixtures(lines: Sequence[Line]) -> None:
    settings: dict[tuple[str, str], Any] = {}
    runs = set()
    for line in lines:
        free = {*line.get("varies", ()), "byzantine-fraction"}
        for key, value in line.get("setting", {}).items():
            if key == "seed":
                continue
            of = ""
            if key in free:
                of = " ".join([line["row"], *told(line.get("choice", {})), "under", line["column"]])
            elif key in _OF_ROWS:
                of = line["row"]
            if (known := settings.setdefault((of, key), value)) != value:
                raise ConfigError(
                    f"results hold runs {of and f'of {of} '}with {key} {known!r} and {value!r}; "
                    "allowed: those of one setting"
                )
        if (name := name_of(line)) in runs:
            raise ConfigError(f"results hold the run {name} twice; allowed: once")
        runs.add(name)
