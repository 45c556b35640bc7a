"""What there is, for the terminal: keys of the run configuration, attacks."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from fl_bgmd.attacks import ATTACKS
from fl_bgmd.options import Option


def attacks_table() -> Table:
    """Return the list of attacks for the terminal."""
    table = Table(title="Attacks")
    for column in ("name", "place", "knows", "options", "authors' code", "source"):
        table.add_column(column, no_wrap=column in ("name", "place", "knows"))
    for name, attack in ATTACKS.items():
        options = "\n".join(
            f"{option.key}={plain(option.default)}: {option.help}"
            for option in attack.options.values()
        )
        codes = ", ".join(f"{value:g} {data}" for data, value in attack.authors_code.items())
        table.add_row(name, attack.place, attack.knows, options, codes.strip(), attack.source)
    return table


def keys_table(options: Iterable[Option]) -> Table:
    """Return keys of the run configuration for the terminal."""
    table = Table(title="Run configuration")
    for column in ("key", "default", "allowed", "help"):
        table.add_column(column, no_wrap=column == "key")
    for option in options:
        given = option.default
        default = (given or "(empty)") if isinstance(given, str) else plain(given)
        table.add_row(option.name, default, escape(option.allowed), escape(option.help))
    return table


def plain(value: object) -> str:
    """Return a value of an option as the run configuration writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
