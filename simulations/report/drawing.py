"""One way to draw: panels of one size, saved without a window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def panels(high: int, wide: int, width: float, height: float, **settings: Any) -> tuple[Any, Any]:
    """Return a figure and its ``high`` x ``wide`` panels, each ``width`` x ``height`` inches."""
    import matplotlib as mpl

    mpl.use("Agg")  # draws into files, also where there is no screen
    from matplotlib import pyplot as plt

    size = (width * wide, height * high)
    return plt.subplots(high, wide, figsize=size, layout="constrained", squeeze=False, **settings)


def save(figure: Any, path: Path) -> Path:
    """Write a figure to a file whose folder may be new, and forget it; return the path."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def band(
    panel: Any, x: Any, values: NDArray[np.float64], label: str, least: float = -np.inf
) -> None:
    """Draw the mean of curves (runs, t) over ``x`` (t,), and a standard deviation around it."""
    middle, spread = values.mean(0), values.std(0)
    [line] = panel.plot(x, middle, label=label, lw=1.6)
    low = np.maximum(middle - spread, least)
    panel.fill_between(x, low, middle + spread, alpha=0.2, color=line.get_color(), lw=0)


Done = Callable[[str], None]
"""Called with a line after each step of a long computation."""
