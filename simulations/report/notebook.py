"""What a notebook shows of a run and of a study: a table, what it stands on, and the figure."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..experiment import RunResult
from .plots import MOST_PANELS, Runs, axes_of, draw_curves, draw_heat_map
from .study import heading, title_of
from .tables import accuracy_means

if TYPE_CHECKING:
    from ..comparison import StudyResult
    from .figure import Drawing


def run_html(run: RunResult) -> str:
    """Return a run as HTML."""
    table = pd.DataFrame(
        [
            {
                **{"strategy": run.config["strategy"], "attack": run.config["attack"]},
                **{"status": run.status, "rounds": max(0, len(run.rounds) - 1)},
                **{"final": f"{run.final_accuracy:.2%}", "best": f"{run.best_accuracy:.2%}"},
                **{"accepted": run.total("accepted"), "rejected": run.total("rejected")},
                "seconds": f"{run.seconds:.1f}",
            }
        ]
    )
    about = f"{run_title(run)}. {run.error}" if run.error else run_title(run)
    return _html(table, about, run_figure(run) if run.accuracies and _can_draw() else None)


def study_html(result: "StudyResult") -> str:
    """Return a study as HTML."""
    about = heading(result.study, result.study, result.lines).replace("*", "")
    figure = None
    if _can_draw():
        few = len(result.study.columns) <= MOST_PANELS
        figure = study_figure(result) if few else study_heat_map(result)
    return _html(result.table, about, figure)


def run_title(run: RunResult) -> str:
    """Return what a run was, in a line."""
    return title_of([{"setting": run.config}])


def run_figure(run: RunResult, metric: str = "accuracy", axis: str = "rounds") -> "Drawing":
    """Return the curve of a run."""
    place = str(run.config["strategy"]), str(run.config["attack"])
    return _curves({place: [run]}, metric, axis, run_title(run))


def study_figure(
    result: "StudyResult", metric: str = "accuracy", axis: str = "rounds"
) -> "Drawing":
    """Return the curves of a study."""
    runs: dict[tuple[str, str], list[RunResult]] = {}
    for (row, column, _), run in result.runs.items():
        runs.setdefault((row, column), []).append(run)
    return _curves(runs, metric, axis, result.study.title or title_of(result.lines))


def study_heat_map(result: "StudyResult") -> "Drawing":
    """Return mean accuracies, rows x columns, and the worst of each row."""
    return draw_heat_map(accuracy_means(result.lines), title_of(result.lines))


def _curves(runs: Runs, metric: str, axis: str, title: str) -> "Drawing":
    if axis not in (axes := axes_of(runs)):
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(axes)}")
    entries = [entry for of in runs.values() for run in of for entry in run.rounds]
    if metric not in (known := _numbers(entries)):
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(known)}")
    return draw_curves(runs, metric, axis, title)


def _numbers(entries: list[dict[str, Any]]) -> Mapping[str, None]:
    """Return the names of numbers in the rounds, the round itself left out."""
    names = (k for e in entries for k, v in e.items() if isinstance(v, int | float))
    return dict.fromkeys(name for name in names if name != "round")


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _html(table: pd.DataFrame, about: str, figure: "Drawing | None") -> str:
    parts = [table.to_html(index=False, border=0), f"<p>{escape(about)}</p>"]
    if figure is not None:
        picture = b64encode(figure._repr_png_()).decode()
        parts.append(f'<img alt="test accuracy" src="data:image/png;base64,{picture}">')
    return "\n".join(parts)
