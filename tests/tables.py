"""Markdown tables in tests: what their cells hold, whatever their width."""


def cells_of(text: str) -> list[list[str]]:
    """Return the cells of each line; a line that is none of a table is one cell."""
    lines = [line for line in text.splitlines() if not set(line) <= set("|-: ") or not line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
