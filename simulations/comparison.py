"""Studies from Python: :func:`compare` and what it returns."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_bgmd.extras import pandas

from .backends import ClientResources
from .config import named
from .experiment import RunResult
from .runner import Line, OnProgress, run_cells
from .study import Cell, Study, attack_columns, strategy_rows
from .trackers import check_log

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StudyResult:
    """What a study left behind.

    Attributes
    ----------
    study : Study
        What was run.
    lines : list of dict
        One for each run, as in ``cells.jsonl``.
    runs : dict
        ``(row, column, seed)`` to the run.
    """

    study: Study
    lines: list[Line]
    runs: Mapping[tuple[str, str, int], RunResult]

    @property
    def frame(self) -> "pd.DataFrame":
        """One line for each run: row, column, seed, status, accuracies, counts, seconds."""
        hidden = ("setting", "varies", "group")
        frame: pd.DataFrame = pandas().DataFrame(self.lines).drop(columns=list(hidden))
        return frame

    @property
    def table(self) -> "pd.DataFrame":
        """The table that ``fl-bgmd compare`` shows, as text."""
        pandas()
        from .report.study import table_of

        return table_of(self.study, self.lines)

    def figure(self, metric: str = "accuracy", axis: str = "rounds") -> "Figure":
        """Return a matplotlib figure of a number of the rounds: a panel for each column.

        Means over the seeds with their standard deviation as bands. ``axis`` is ``rounds``,
        ``seconds``, ``bytes`` or, where all clients ran in this process, ``cpu-seconds``. Raises
        ``ValueError`` for another one, and for a ``metric`` that no round has.
        """
        pandas()
        from .report.notebook import study_figure

        return study_figure(self, metric, axis)

    def heat_map(self) -> "Figure":
        """Return a matplotlib figure of the final accuracies, with the worst of each row."""
        pandas()
        from .report.notebook import study_heat_map

        return study_heat_map(self)

    def __repr__(self) -> str:
        """Return the table."""
        return f"<StudyResult: {len(self.lines)} runs>\n{self.table.to_string(index=False)}"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        pandas()
        from .report.notebook import study_html

        return study_html(self)


def compare(
    strategies: Sequence[str],
    attacks: Sequence[str] = ("none",),
    *,
    seeds: int = 1,
    backend: str = "inprocess",
    resources: ClientResources | None = None,
    jobs: int = 1,
    folder: Path | str | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> StudyResult:
    """Run strategies against attacks, from the same seeds.

    ``compare(["gmd", "bgmd+nearest-neighbor"], ["none", "alie"], byzantine_fraction=0.4)``.

    Parameters
    ----------
    strategies, attacks : sequence of str
        Specs; ``none`` is without hostile clients.
    seeds : int
        Runs of each cell.
    backend : str
        Where the clients are: one of :data:`.backends.BACKENDS`.
    resources : ClientResources, optional
        What Ray sets aside for a client.
    jobs : int
        Runs at a time, each in a process of its own. Scripts then need the usual
        ``if __name__ == "__main__"``.
    folder : path, optional
        Keeps the runs: those that it holds are not run again.
    on_progress : callable, optional
        Called after each round with the run's name, the round and the accuracy or None.
    **settings
        Keys of the run configuration (``fl-bgmd keys``), with underscores.

    Raises
    ------
    ConfigError
        For a key or value that is not allowed, before anything runs.
    """
    rows, columns = strategy_rows(strategies), attack_columns(attacks)
    study = Study(rows, columns, named(settings), seeds=seeds)
    cells = study.cells()
    for cell in cells:
        check_log(cell.config, None if folder is None else Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch if folder is None else folder)
        lines = run_cells(
            cells,
            home,
            backend=backend,
            resources=resources,
            jobs=jobs,
            on_progress=on_progress,
        )
        runs = {_place(cell): RunResult.read(home / cell.name) for cell in cells}
    return StudyResult(study, lines, runs)


def _place(cell: Cell) -> tuple[str, str, int]:
    return cell.row, cell.column, cell.seed
