"""The progress of a study in the terminal: runs, rounds a second, time left, the worst so far."""

import math
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from .experiment import RunResult
from .runner import Line
from .study import Cell


class StudyProgress:
    """A bar over the rounds of all runs.

    Parameters
    ----------
    console : Console
        Where it is shown.
    cells : sequence of Cell
        All runs of the study.
    done : mapping
        Lines of those that were finished before, by their names.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], done: Mapping[str, Line]) -> None:
        self._rounds = {cell.name: int(cell.config["num-server-rounds"]) for cell in cells}
        self._at = dict.fromkeys(self._rounds, 0)
        for name in done:
            self._at[name] = self._rounds[name]
        self._finished = len(done)
        self._worst: tuple[float, str, str] | None = None
        for line in done.values():
            self._note(float(line["final-accuracy"]), line["row"], line["column"])
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            _Speed(table_column=Column(no_wrap=True)),
            # So that in 80 columns there is room for the times, however long the names are.
            TextColumn(
                "{task.fields[said]}",
                table_column=Column(no_wrap=True, max_width=29, overflow="ellipsis"),
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,  # a round may take a minute
        )
        self._task = self._progress.add_task(
            self._runs(),
            total=sum(self._rounds.values()),
            completed=sum(self._at.values()),
            said="",
        )

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it as it is."""
        self._progress.stop()

    def round_done(self, name: str, number: int, accuracy: float | None) -> None:
        """Count a round of a run."""
        self._at[name] = max(self._at[name], number)
        self._progress.update(self._task, completed=sum(self._at.values()))
        if accuracy is not None:
            self._progress.update(self._task, said=self._said(accuracy))

    def cell_done(self, cell: Cell, result: RunResult) -> None:
        """Count a run, and all rounds that it did not need."""
        self._finished += 1
        self._at[cell.name] = self._rounds[cell.name]
        final = result.final_accuracy
        self._note(final, cell.row, cell.column)
        self._progress.update(
            self._task,
            description=self._runs(),
            completed=sum(self._at.values()),
            said=self._said(final),
        )

    def _note(self, accuracy: float, row: str, column: str) -> None:
        """Remember the worst of the runs that have an accuracy."""
        if not math.isnan(accuracy):
            found = accuracy, row, column
            self._worst = found if self._worst is None else min(self._worst, found)

    def _runs(self) -> str:
        return f"{self._finished}/{len(self._rounds)} runs"

    def _said(self, accuracy: float) -> str:
        if self._worst is None:
            return f"accuracy {accuracy:.1%}"
        worst, row, column = self._worst
        return f"worst {worst:.1%} ({row}, {column})"


class _Speed(ProgressColumn):
    """Rounds of all runs a second."""

    def render(self, task: Task) -> Text:
        """Return it, or nothing before the second round."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2g}/s")
