"""One way to draw: panels of one size, curves that can be told apart, saved without a window."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .figure import Drawing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colors for all kinds of sight, but the yellow, which fades on white."""

DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vph<>X"

MOST_LABELS = 12
"""Curves that can still be named at their ends."""


def panels(
    high: int, wide: int, width: float, height: float, **settings: Any
) -> tuple["Drawing", Any]:
    """Return a figure and its ``high`` x ``wide`` panels, each ``width`` x ``height`` inches."""
    from cycler import cycler

    from .figure import Drawing

    # Without pyplot: no window, no screen, and no notebook's settings are touched.
    figure = Drawing(figsize=(width * wide, height * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False, **settings)
    styles = [(color, DASHES[i % len(DASHES)]) for i, color in enumerate(COLORS * len(DASHES))]
    colors, dashes = zip(*styles, strict=True)
    for panel in grid.flat:
        panel.set_prop_cycle(cycler(color=colors) + cycler(linestyle=dashes))
    return figure, grid


def save(figure: Any, path: Path) -> Path:
    """Write a figure to a PNG file and a PDF beside it; return the path.

    The folder may be new. The PDF has its letters as fonts that publishers take (type 42), and no
    date: the same figure is the same file. The figure's layout is final after that.
    """
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    _lay_out(figure)
    figure.set_layout_engine("none")  # or each drawing finds the same places again
    figure.savefig(path, dpi=130)
    with mpl.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return path


def band(
    panel: Any,
    x: Any,
    values: NDArray[np.float64],
    label: str,
    least: float = -np.inf,
    number: int | None = None,
) -> None:
    """Draw the mean of curves (runs, t) over ``x`` (t,), and a standard deviation around it.

    Color, dashes and marker go by ``number``, the next in the panel unless it is given: curves that
    lie on each other show by their markers, which stand at other rounds.
    """
    number = len(panel.lines) if number is None else number
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        middle, spread = values.mean(0), values.std(0)
    color = COLORS[number % len(COLORS)]
    step = max(1, len(middle) // 5)
    panel.plot(
        x,
        middle,
        label=label,
        lw=1.6,
        color=color,
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        ms=5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=(number % step, step),
    )
    low = np.maximum(middle - spread, least)
    panel.fill_between(x, low, middle + spread, alpha=0.18, color=color, lw=0)


def name_ends(drawn: Sequence[Any], size: float = 7.0) -> None:
    """Write the name of each curve beside its end, in place of a legend; above many, a legend.

    ``drawn`` are the panels of a figure, whose curves are all there.
    """
    _lay_out(drawn[0].figure)  # which settles the panels' heights
    for panel in drawn:
        _name_ends(panel, size)


def _lay_out(figure: Any) -> None:
    """Put the panels where they will be drawn."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)


def _name_ends(panel: Any, size: float) -> None:
    curves = [line for line in panel.lines if np.isfinite(line.get_ydata()).any()]
    if len(curves) > MOST_LABELS:
        panel.legend(fontsize=size - 1, ncols=2)
        return
    height = panel.get_window_extent().height / panel.figure.dpi * 72
    to_panel = panel.transData + panel.transAxes.inverted()
    curves.sort(key=lambda line: _end_of(line)[1])
    ends = [_end_of(line) for line in curves]
    wanted = [float(to_panel.transform(end)[1]) for end in ends]
    places = spread_out(wanted, 1.25 * size / height)
    most = max((len(line.get_xdata()) for line in curves), default=0)
    for line, end, place in zip(curves, ends, places, strict=True):
        color = line.get_color()
        # It ends here, whatever the line to its name seems to say.
        if is_short := len(line.get_xdata()) < most:
            panel.plot(*end, "x", color=color, ms=7, mew=2, label="_end")
        panel.annotate(
            line.get_label(),
            end,
            xytext=(1.06, place),
            textcoords="axes fraction",
            fontsize=size,
            va="center",
            color=_darker(color),
            annotation_clip=False,
            arrowprops={
                **{"arrowstyle": "-", "color": color, "lw": 0.7},
                **({"linestyle": (0, (1, 4))} if is_short else {}),
                **{"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
            },
        )


def _end_of(line: Any) -> tuple[float, float]:
    """Return the last point of a curve that can be drawn."""
    place = int(np.flatnonzero(np.isfinite(line.get_ydata()))[-1])
    return float(line.get_xdata()[place]), float(line.get_ydata()[place])


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Return ascending places at least ``gap`` apart, as near to ``wanted`` as squares can tell.

    ``wanted`` ascends. Where they fit, places stay between 0 and 1.
    """
    # Without the gaps it is the nearest sequence that does not fall: neighbors that do are pooled.
    pools: list[list[float]] = []
    for number, place in enumerate(wanted):
        pools.append([place - number * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    most = 1 - (len(wanted) - 1) * gap
    level = [max(0.0, min(place, most)) for place in level] if most >= 0 else level
    return [place + number * gap for number, place in enumerate(level)]


def _darker(color: str) -> tuple[float, ...]:
    """Return a color that letters can have on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.75 * part for part in to_rgb(color))


Done = Callable[[str], None]
"""Called with a line after each step of a long computation."""
