"""Matplotlib's figure, which notebooks show when it is a cell's last value."""

import io

from matplotlib.figure import Figure


class Drawing(Figure):
    """A figure that belongs to no window and to no list of open figures."""

    def _repr_png_(self) -> bytes:
        """Return the picture."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()
