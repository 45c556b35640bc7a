"""What there is, for the terminal: keys of the run configuration, attacks."""

import re
from collections.abc import Iterable

from rich.console import Console

from fl_bgmd.attacks import ATTACKS
from fl_bgmd.options import Option

from .terminal import print_table


def print_attacks(console: Console) -> None:
    """Print the list of attacks."""
    rows = [
        {
            "name": name,
            "place": attack.place,
            "knows": attack.knows,
            "options": "\n".join(
                f"{option.key}={plain(option.default)}: {in_words(option.help)}"
                for option in attack.options.values()
            ),
            "authors' code": ", ".join(f"{v:g} {data}" for data, v in attack.authors_code.items()),
            "source": attack.source,
        }
        for name, attack in ATTACKS.items()
    ]
    print_table(
        console,
        {heading: [row[heading] for row in rows] for heading in rows[0]},
        dropped=("authors' code", "options", "place"),
        elsewhere="all columns: fl-bgmd attacks | less -S",
        prose=("options", "authors' code", "source"),
        title="Attacks",
    )


def print_keys(console: Console, options: Iterable[Option]) -> None:
    """Print keys of the run configuration."""
    columns: dict[str, list[str]] = {"key": [], "default": [], "allowed": [], "help": []}
    for option in options:
        given = option.default
        default = (given or "(empty)") if isinstance(given, str) else plain(given)
        entries = (option.name, default, option.allowed, in_words(option.help))
        for column, text in zip(columns.values(), entries, strict=True):
            column.append(text)
    print_table(
        console,
        columns,
        dropped=("allowed", "default"),
        elsewhere="all columns: fl-bgmd keys | less -S",
        prose=("allowed", "help"),
        title="Run configuration",
    )


def plain(value: object) -> str:
    """Return a value of an option as the run configuration writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def in_words(help_text: str) -> str:
    """Return a help text without the markup that docstrings have."""
    return re.sub(r"(?::\w+:)?`+[~.]?([^`]+)`+", r"\1", help_text)
