"""What plain ``pip install fl-bgmd`` leaves out, and what to install for it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["MissingExtraError", "pandas", "require"]


class MissingExtraError(ImportError):
    """A package of one of the extras that is needed and not installed."""


def require(module: str, purpose: str, extra: str) -> None:
    """Check, before it is imported, that a package of an extra is installed.

    Parameters
    ----------
    module : str
        Top-level module of the package.
    purpose : str
        What needs it, as in "matplotlib is needed for plots".
    extra : str
        The extra of ``pyproject.toml`` that brings it.

    Raises
    ------
    MissingExtraError
        If it is not; the message says what to install.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{module} is needed for {purpose}: pip install 'fl-bgmd[{extra}]'", name=module
        )


def pandas() -> Any:
    """Return pandas, which tables are made of; see :func:`require`."""
    require("pandas", "tables", "plots")
    return import_module("pandas")
