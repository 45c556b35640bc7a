"""Checks of the strategies' arguments."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any

import torch

Options = dict[str, tuple[Any, Any]]
"""Annotation and default of each option, by name."""


class OptionError(TypeError, ValueError):
    """An option that a strategy does not have, or a value that is of another type."""


def options_of(cls: type) -> Options:
    """Return what can be given to a class by keyword.

    From the signatures of its constructor and of those that this hands its ``**options`` to.
    """
    found: Options = {}
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        try:
            hints = typing.get_type_hints(constructor)
        except (
            NameError,
            AttributeError,
        ):  # imported for type checkers only: its values are not checked
            hints = {}
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(
                    parameter.name, (hints.get(parameter.name, Any), parameter.default)
                )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def check_options(owner: str, given: Mapping[str, object], known: Options) -> None:
    """Raise :class:`OptionError` for an option not in ``known``, or a value of another type."""
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(sorted(known))}"
            raise OptionError(f"{owner} has no option {name!r}; {hint}")
        annotation, default = known[name]
        if value is not default and not _fits(value, annotation):
            raise OptionError(f"{name} is {value!r}; allowed: {_words(annotation)}")


def _members(annotation: Any) -> Iterable[Any]:
    """Return the types of a union, or the one that there is."""
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value is of a type; a bool is no number, and a string no sequence of strings."""
    return any(_fits_one(value, member) for member in _members(annotation))


def _fits_one(value: object, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin in (int, float):
        return isinstance(value, origin | int) and not isinstance(value, bool)
    if origin is Callable:
        return callable(value)
    if not isinstance(origin, type):  # nothing that a value could be held against
        return True
    try:
        fits = isinstance(value, origin)
    except TypeError:  # a protocol, for example
        return True
    return fits and not (isinstance(value, str) and origin is not str and kind is not origin)


_WORDS: dict[Any, str] = {
    int: "a whole number (int)",
    float: "a number (int or float)",
    bool: "True or False",
    str: "a string",
    NoneType: "None",
    Callable: "a function",
}


def _words(annotation: Any) -> str:
    """Return what may be given, in words."""
    kinds = (typing.get_origin(member) or member for member in _members(annotation))
    return " or ".join(_WORDS.get(kind) or f"a {kind.__name__}" for kind in kinds)


def require(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise ``ValueError`` naming the argument, its value and what is allowed unless ``holds``."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises ``ValueError`` for a name torch does not know or a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; this machine has {torch.cuda.device_count()}")
    return resolved
