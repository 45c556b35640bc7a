"""The options of the command line: one for each key of the run configuration, and the others."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from .backends import BACKENDS
from .config import SETTINGS, expand_home, parse
from .listings import in_words

SHOWN = (
    *("strategy", "attack", "byzantine-fraction", "num-server-rounds", "num-clients", "dataset"),
    *("model", "partition", "local-steps", "learning-rate", "seed", "results-dir"),
)
"""Keys that the help lists; ``fl-bgmd keys`` has them all."""


def folder_path(text: str | Path) -> Path:
    """Return the folder that an option names, ``~`` and all."""
    try:
        return Path(expand_home(str(text)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def takes_settings(*left_out: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Add an option for each key of the run configuration; the command gets ``given``."""
    keys = {key.replace("-", "_"): key for key in SETTINGS if key not in left_out}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @wraps(command)
        def wrapped(**values: Any) -> int:
            texts = {key: values.pop(name) for name, key in keys.items()}
            given = {key: parse(key, text) for key, text in texts.items() if text is not None}
            return command(given=given, **values)

        own = [p for n, p in inspect.signature(command).parameters.items() if n != "given"]
        settings = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None, _option(key)],
            )
            for name, key in keys.items()
        ]
        signature = inspect.Signature([*own, *settings])
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
        wrapped.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
        del wrapped.__wrapped__
        return wrapped

    return decorate


def _option(key: str) -> Any:
    setting = SETTINGS[key]
    return Option(
        f"--{key}",
        help=f"{in_words(setting.help)} ({setting.default!r})".replace("[", r"\["),
        metavar="V",
        show_default=False,
        hidden=key not in SHOWN,
        rich_help_panel="Run configuration: all keys are in fl-bgmd keys",
    )


Folder = Annotated[
    Path | None,
    Option(
        parser=folder_path, metavar="DIR", help="Folder of the runs; those in it are not run again"
    ),
]
Backend = Annotated[
    Literal[BACKENDS],  # type: ignore[valid-type]
    Option(help=f"Where the clients run: {', '.join(BACKENDS)}", metavar="NAME"),
]
Jobs = Annotated[
    int,
    Option(help="Processes for runs, or for a single run's clients (not on Ray)", metavar="N"),
]
Seeds = Annotated[int | None, Option(help="Repeat with N seeds, from --seed up", metavar="N")]
OneRow = Annotated[list[str] | None, Option(help="Run only this row (repeatable)", metavar="NAME")]
OneColumn = Annotated[
    list[str] | None, Option(help="Run only this column (repeatable)", metavar="NAME")
]
Cpus = Annotated[float, Option("--client-resources-num-cpus", metavar="X", hidden=True)]
Gpus = Annotated[float, Option("--client-resources-num-gpus", metavar="X", hidden=True)]
Verbose = Annotated[bool, Option("--verbose", help="Show Flower's log")]
Output = Annotated[
    Path | None,
    Option(
        parser=folder_path, metavar="DIR", help="Folder for the table and figures, if not the runs'"
    ),
]
DataDir = Annotated[str, Option(help="Default: $FL_BGMD_DATA, or ~/.cache/fl-bgmd", metavar="DIR")]
