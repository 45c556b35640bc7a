"""Options, declared once: a parameter's annotation, default and docstring say all there is to say.

``def rule(updates, *, trim_fraction: Share | None = None)`` is the whole declaration. Checks, error
messages, configuration keys, command line and :func:`help` are derived from it.
"""

import difflib
import functools
import inspect
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

Share = Annotated[float, Ge(0), Lt(0.5)]
"""A share of the clients that leaves the others the majority."""

Fraction = Annotated[float, Gt(0), Le(1)]
NonNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
Count = Annotated[int, Ge(1)]

P = ParamSpec("P")
R = TypeVar("R")


class OptionError(TypeError, ValueError):
    """An option that does not exist, or a value that is not allowed."""


@dataclass(frozen=True)
class Named:
    """In an annotation: what the option is called where it is not the parameter's name."""

    name: str


@dataclass(frozen=True)
class Allowed:
    """In an annotation: what may be given, in words, where bounds and type do not say it."""

    text: str


class Operation:
    """Marks an option that affects how a run is operated, not what it computes.

    A checkpoint may be resumed with another value.
    """


class Environment:
    """Marks an option that says where a run is computed, which its results do not depend on."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes
    ----------
    name : str
        As in Python; :attr:`key` is its kebab-case form in configurations.
    parameter : str
        The parameter of the function or class that takes it.
    annotation : type
        With its bounds (``annotated_types``).
    default : object
        ``inspect.Parameter.empty`` where there is none.
    help : str
        The first sentence of its documentation.
    """

    name: str
    parameter: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    help: str = ""

    @property
    def key(self) -> str:
        """The name in run configurations and on the command line."""
        return self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        return allowed_by(self.annotation)

    @property
    def is_operation(self) -> bool:
        """Whether it is no part of what a run computes."""
        return self.has(Operation)

    def has(self, mark: type) -> bool:
        """Whether its annotation carries a mark of a kind."""
        marks = getattr(self.annotation, "__metadata__", ())
        return any(isinstance(each, mark) for each in marks)

    def check(self, value: Any) -> Any:
        """Return the value; raise :class:`OptionError` unless it is allowed."""
        if value is self.default:
            return value
        try:
            found = _adapter(self.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise self._error(value, error) from None
        except (PydanticUserError, TypeError):  # a protocol, for example: unchecked
            return value
        return self._within_64_bits(found)

    def parse(self, text: Any) -> Any:
        """Return what a text stands for; values of other types are checked as they are."""
        if not isinstance(text, str):
            return self.check(text)
        types = _types(self.annotation)
        if text == "none" and type(None) in types:
            return None
        if types <= {int, type(None)} and not _WHOLE.fullmatch(text):
            raise self._error(text)
        try:
            found = _adapter(self.annotation).validate_python(text)
        except ValidationError as error:
            raise self._error(text, error) from None
        return self._within_64_bits(found)

    def _within_64_bits(self, value: Any) -> Any:
        """Refuse whole numbers that no message or tensor can hold."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OptionError(f"{self.name} is {value}; allowed: {self.allowed}, within 64 bits")
        return value

    def _error(self, value: Any, error: ValidationError | None = None) -> OptionError:
        errors = [] if error is None else error.errors()
        reasons = [e["ctx"]["error"] for e in errors if e["type"] == "value_error"]
        allowed = self.allowed
        if reasons and str(reasons[0]).startswith(f"{self.name} is "):
            said = str(reasons[0])
            return OptionError(said if "allowed: " in said else f"{said}; allowed: {allowed}")
        if reasons and "allowed: " in str(reasons[0]):
            return OptionError(f"{self.name} is {value!r}: {reasons[0]}")
        why = f" ({reasons[0]})" if reasons else ""
        is_number = allowed[:1].isdigit() or allowed.startswith("above")
        if is_number and isinstance(value, bool | str):
            allowed = f"a number, {allowed}"  # not a text that looks like one
        return OptionError(f"{self.name} is {value!r}{why}; allowed: {allowed}")


Options = Mapping[str, Option]

_HEADER = "Parameters\n----------\n"


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def declared(
    function: Callable[..., Any], but: Iterable[str] = (), *, positional: bool = False
) -> dict[str, Option]:
    """Return the keyword options that a function or class takes, by their names.

    ``but`` names parameters that are no options. ``positional`` takes in those that may also be
    given by their place. Help comes from the NumPy docstring.
    """
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError):  # imported for type checkers only: values are not checked
        hints = {}
    help = documentation(inspect.getdoc(function) or "")
    kinds: list[Any] = [inspect.Parameter.KEYWORD_ONLY]
    if positional:
        kinds.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in kinds or parameter.name in but:
            continue
        annotation = hints.get(parameter.name, Any)
        marks = getattr(annotation, "__metadata__", ())
        name = next((m.name for m in marks if isinstance(m, Named)), parameter.name)
        text = help.get(parameter.name, help.get(name, ""))
        found[name] = Option(name, parameter.name, annotation, parameter.default, text)
    return found


def documentation(text: str) -> dict[str, str]:
    """Return the first sentence that a NumPy docstring has on each parameter."""
    section = _parameters_of(text)[1]
    found = {}
    for names, body in re.findall(
        r"^(\S[^\n]*?)(?: : [^\n]*)?\n((?:[ \t]+[^\n]*\n?|\n)*)", section, re.M
    ):
        sentence = re.split(r"(?<=[.:;])\s", " ".join(body.split()), maxsplit=1)[0].rstrip(".:;")
        for name in names.split(","):
            found[name.strip().lstrip("*")] = sentence
    return found


def _parameters_of(text: str) -> tuple[str, str, str]:
    """Split a NumPy docstring into what is before, in and after its section on parameters."""
    before, _, rest = text.partition(_HEADER)
    section, *after = re.split(r"\n(?=\w[\w ]*\n-{3,}\n)", rest, maxsplit=1)
    return before, section, "".join(after)


def with_parameters(text: str, options: Iterable[Option], others: str = "") -> str:
    """Return a NumPy docstring that has an entry for each of the options.

    ``others`` says what ``**options`` takes beside them. Entries that are there stay as they are.
    """
    before, section, after = _parameters_of(inspect.cleandoc(text))
    known = documentation(f"{_HEADER}{section}")
    entries = [section.rstrip("\n")] if section else []
    for option in options:
        if option.name in known:
            continue
        has_default = option.default is not inspect.Parameter.empty
        default = f", default {option.default!r}" if has_default else ""
        entries.append(f"{option.name} : {spelled(option.annotation)}{default}")
        entries += [f"    {option.help}."] if option.help else []
    if others and "options" not in known:
        entries += ["**options", f"    {others}"]
    parts = [before.rstrip("\n"), _HEADER + "\n".join(entries), after.strip("\n")]
    return "\n\n".join(part for part in parts if part)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest known name, or at all of them."""
    known = list(known)
    return near(name, known) or f"it has: {', '.join(sorted(known)) or 'none'}"


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest known name, empty where none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def check_all(owner: str, given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the given options by their parameters' names, each checked.

    Raises :class:`OptionError` for one that does not exist, with the nearest that does, or whose
    value is not allowed.
    """
    for name in given:
        if name not in options:
            raise OptionError(f"{owner} has no option {name!r}; {nearest(name, options)}")
    return {options[name].parameter: options[name].check(value) for name, value in given.items()}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check a function's keyword options by their declaration whenever it is called."""
    options = {o.parameter: replace(o, name=o.parameter) for o in declared(function).values()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name in options:
                options[name].check(value)
        return function(*args, **kwargs)

    return call


# ------------------------------------------------------------------------------------ as types


def unmarked(annotation: Any) -> Any:
    """Return the type of an annotation without bounds and marks."""
    if hasattr(annotation, "__metadata__"):
        return unmarked(annotation.__origin__)
    members = _members(annotation)
    if len(members) == 1:
        return annotation
    return functools.reduce(operator.or_, (unmarked(member) for member in members))


def spelled(annotation: Any) -> str:
    """Return how an annotation is written, without bounds and marks."""
    if hasattr(annotation, "__metadata__"):
        return spelled(annotation.__origin__)
    members = _members(annotation)
    if len(members) > 1:
        return " | ".join(spelled(member) for member in members)
    if annotation in (None, type(None)):
        return "None"
    if isinstance(annotation, list):
        return f"[{', '.join(spelled(each) for each in annotation)}]"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"Literal[{', '.join(json.dumps(value) for value in inner)}]"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(spelled(each) for each in inner)}]" if inner else name


# ------------------------------------------------------------------------------------ in words

_WORDS: dict[Any, str] = {
    int: "a whole number (int)",
    float: "a number (int or float)",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}


def allowed_by(annotation: Any) -> str:
    """Return what an annotation allows, in words."""
    marks = getattr(annotation, "__metadata__", ())
    for mark in marks:
        if isinstance(mark, Allowed):
            return mark.text
    if marks:
        inner = annotation.__origin__
        members = _members(inner)
        if len(members) == 1 and inner in (int, float):
            return _bounds(inner, marks)
        return allowed_by(inner)
    members = _members(annotation)
    if len(members) > 1:
        # None last: it is the exception.
        ordered = sorted(members, key=lambda member: member is type(None))
        return ", or ".join(allowed_by(member) for member in ordered)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(str(value) for value in typing.get_args(annotation))
    origin = typing.get_origin(annotation) or annotation
    if origin is Callable or origin is typing.get_origin(Callable[..., Any]):
        return "a function"
    return _WORDS.get(origin) or f"a {getattr(origin, '__name__', origin)}"


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one that there is."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _types(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows, without their bounds."""
    if hasattr(annotation, "__metadata__"):
        return _types(annotation.__origin__)
    members = _members(annotation)
    return {annotation} if len(members) == 1 else set().union(*map(_types, members))


_WHOLE = re.compile(r"[+-]?[0-9]+")


def _bounds(kind: type, marks: Sequence[Any]) -> str:
    low, high, above, below = -math.inf, math.inf, False, False
    for mark in marks:
        if isinstance(mark, Ge | Gt):
            low, above = float(getattr(mark, "ge", getattr(mark, "gt", 0))), isinstance(mark, Gt)
        if isinstance(mark, Le | Lt):
            high, below = float(getattr(mark, "le", getattr(mark, "lt", 0))), isinstance(mark, Lt)
    whole = "a whole number, " if kind is int else ""
    if high == math.inf:
        finite = ", and finite" if any(isinstance(m, AllowInfNan) for m in marks) else ""
        return (f"{whole}above {low:g}" if above else f"{whole}{low:g} or more") + finite
    return f"{whole}{'above ' if above else ''}{low:g} to {'below ' if below else ''}{high:g}"
