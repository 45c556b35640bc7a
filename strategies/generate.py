"""Writes ``typed.py``, what type checkers and editors know of the options: ``make config``."""

import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path

from fl_bgmd.options import Option, spelled

from . import rules
from .declared import options_of
from .robust import RobustStrategy
from .settings import FLOWERS_OPTIONS, OWN_OPTIONS

_HEADER = '''"""The strategies' options as types (PEP 692), for type checkers and editors.

Written by ``python -m strategies.generate`` (``make config``) from their declarations; not to be
edited.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fl_bgmd.checkpoints import Checkpoints
'''


def typed_module() -> str:
    """Return the text of ``typed.py``: the options of all strategies, and of each one's rule."""
    common = {**FLOWERS_OPTIONS, **OWN_OPTIONS}
    text = "The options of all strategies, and Flower's."
    parts = [_HEADER, _typed_dict("StrategyOptions", "TypedDict", text, common.values())]
    for name, cls in named_strategies().items():
        own = [o for key, o in options_of(cls).items() if key not in common]
        if own:
            text = f"The options of :class:`.rules.{name}`."
            parts.append(_typed_dict(f"{name}Options", "StrategyOptions", text, own))
    return "\n\n".join(parts)


def named_strategies() -> dict[str, type[RobustStrategy]]:
    """Return the strategies that name a rule of their own."""
    return {
        name: found
        for name, found in vars(rules).items()
        if inspect.isclass(found) and issubclass(found, RobustStrategy) and "spec" in vars(found)
        if found is not RobustStrategy
    }


def _typed_dict(name: str, base: str, text: str, options: Iterable[Option]) -> str:
    lines = [f"class {name}({base}, total=False):", f'    """{text}"""', ""]
    for option in options:
        lines.append(f"    {option.name}: {spelled(option.annotation)}")
        if option.help:
            wrapped = textwrap.fill(f'"""{option.help}."""', 96)
            lines.append(textwrap.indent(wrapped, "    "))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("typed.py").write_text(typed_module())
