"""What the terminal tells of a study while it runs."""

import io

from rich.console import Console

from simulations.experiment import RunResult
from simulations.progress import StudyProgress
from simulations.study import Cell


def test_runs_rounds_a_second_and_the_worst_are_told() -> None:
    config = {"num-server-rounds": 10}
    cells = [Cell("mean", "none", 0, config), Cell("mean", "ipm", 0, config)]
    screen = io.StringIO()
    with StudyProgress(Console(file=screen, force_terminal=True, width=80), cells, {}) as progress:
        for number in range(1, 11):
            progress.round_done(cells[0].name, number, 0.5)
        progress.cell_done(cells[0], RunResult(config, [{"round": 10, "accuracy": 0.9}]))
        progress.cell_done(cells[1], RunResult(config, [{"round": 10, "accuracy": 0.125}]))
    for told in ("2/2 runs", "/s", "worst 12.5% (mean, ipm)"):
        assert told in screen.getvalue()


def test_what_was_run_before_counts_among_the_worst() -> None:
    config = {"num-server-rounds": 10}
    cells = [Cell("gmd", "alie", 0, config), Cell("gmd", "none", 0, config)]
    line = {"row": "gmd", "column": "alie", "final-accuracy": 0.25}
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with StudyProgress(console, cells, {cells[0].name: line}) as progress:
        progress.round_done(cells[1].name, 1, 0.5)
    assert "1/2 runs" in screen.getvalue()
    assert "worst 25.0% (gmd, alie)" in screen.getvalue()
