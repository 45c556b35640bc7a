"""Tables in the terminal: what does not fit loses columns, the least important first."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNBOUNDED = 1000
"""Width of what no terminal shows: files and pipes get every column."""

LEAST_PROSE = 36
"""Characters of a line that prose can still be read in; numbers and names do not wrap at all."""


def room(console: Console) -> int:
    """Return the width of tables: the terminal's, or that of the variable COLUMNS."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else UNBOUNDED


def print_table(
    console: Console,
    columns: Mapping[str, Sequence[str]],
    *,
    dropped: Sequence[str],
    elsewhere: str,
    right: Collection[str] = (),
    prose: Collection[str] = (),
    title: str | None = None,
    caption: str | None = None,
) -> None:
    """Print a table, without the columns for which there is no room.

    Parameters
    ----------
    console : Console
        Where to.
    columns : mapping of str to sequence of str
        Headings and entries.
    dropped : sequence of str
        Headings, in the order in which they go.
    elsewhere : str
        Where all of them are, for the line that says which went.
    right, prose : collection of str
        Headings of numbers, and of text that may be folded.
    title, caption : str, optional
        Above and below the table.
    """
    width, kept = room(console), dict(columns)
    for name in dropped:
        if width_of(kept, prose) <= width:
            break
        del kept[name]
    table = Table(title=title, caption=caption and escape(caption), caption_justify="left")
    for name in kept:
        side: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(escape(name), justify=side, no_wrap=name not in prose)
    for row in zip(*kept.values(), strict=True):
        table.add_row(*map(escape, row))
    if width > console.width:  # it prints no wider than it thinks itself
        console = Console(file=console.file, width=width)
    console.print(table)
    if left_out := [name for name in columns if name not in kept]:
        console.print(f"left out: {', '.join(left_out)} ({elsewhere})", markup=False)


def width_of(columns: Mapping[str, Sequence[str]], prose: Collection[str] = ()) -> int:
    """Return the characters that a table needs."""
    widest = {
        name: max(cell_len(line) for text in (name, *cells) for line in (text.splitlines() or [""]))
        for name, cells in columns.items()
    }
    needed = [min(w, LEAST_PROSE) if name in prose else w for name, w in widest.items()]
    return sum(needed) + 3 * len(needed) + 1
