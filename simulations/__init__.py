"""The ServerApp, the command line and the experiments: ``fl-bgmd --help``."""

import importlib
from typing import TYPE_CHECKING

__all__ = ["compare", "main", "run", "validate", "write_report"]

if TYPE_CHECKING:
    from .__main__ import main
    from .backends import run
    from .comparison import compare
    from .config import validate
    from .report.page import write_report
else:
    _HOMES = {
        "compare": "comparison",
        "main": "__main__",
        "run": "backends",
        "validate": "config",
        "write_report": "report.page",
    }

    def __getattr__(name: str) -> object:
        """Import what the package offers when it is asked for.

        Not before: the command line sets what Flower and Ray read when they are imported, and
        answers Ctrl-C during the seconds that takes.
        """
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
