"""Rules and attacks of somebody else, named as ``package.module:NAME``."""

import importlib
from typing import Any

__all__ = ["is_path", "load_object"]


def is_path(name: str) -> bool:
    """Whether ``name`` is ``package.module:NAME`` rather than a name of this project's."""
    module, _, attribute = name.partition(":")
    return bool(attribute) and all(part.isidentifier() for part in (*module.split("."), attribute))


def load_object(path: str) -> Any:
    """Import what ``package.module:NAME`` stands for.

    Raises
    ------
    ValueError
        If there is no such module or nothing of that name in it.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
