"""Things by name, and the one notation for things with options.

``name``, ``name:value``, ``name:option=value,option=value``; several are joined by ``+``.
``package.module:NAME`` is one of somebody's own, with options after a second colon.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from .options import Option, OptionError, Options, near, nearest

T = TypeVar("T")

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(?=:|$)")
_PLUS = re.compile(r"(?<!\de)\+")  # not that of 1e+5


@dataclass(frozen=True)
class Spec:
    """A name with the options that were given in a text.

    Attributes
    ----------
    name : str
        Of a registry, or ``package.module:NAME``.
    value : str or None
        What stands alone behind the colon: of the first option.
    options : mapping of str to str
        The others, by their keys.
    """

    name: str
    value: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def values(self, options: Options) -> dict[str, Any]:
        """Return the values of declared options, by name.

        Raises :class:`OptionError` for one that does not exist, or a value that is not allowed.
        """
        by_key = {option.key: option for option in options.values()}
        texts = dict(self.options)
        if self.value is not None:
            if not by_key:
                raise OptionError(f"{self.name} has no option; allowed: {self.name!r} alone")
            first = next(iter(by_key))
            if first in texts:
                raise OptionError(f"{self.name}: {first} is given twice; allowed: once")
            texts = {first: self.value, **texts}
        found = {}
        for key, text in texts.items():
            option: Option | None = by_key.get(key.replace("_", "-"))
            if option is None:
                raise OptionError(f"{self.name} has no option {key!r}; {nearest(key, by_key)}")
            found[option.name] = replace(option, name=option.key).parse(text)
        return found


def parse_spec(text: str, names: Mapping[str, Any]) -> Spec:
    """Read one thing with its options; ``names`` are those of its registry.

    Raises :class:`OptionError` for a text that is none.
    """
    path = _PATH.match(text)
    head, colon, rest = text.partition(":")
    if path and head not in names:
        head, rest = path.group(), text[path.end() + 1 :]
        colon = text[path.end() : path.end() + 1]
    value, options = None, {}
    if colon and not rest:
        raise OptionError(f"{text!r} ends with a colon; allowed: {head!r}, or an option behind it")
    for i, part in enumerate(rest.split(",") if rest else ()):
        key, equals, given = part.partition("=")
        if not equals and i == 0:
            value = part
        elif not equals or not key or not given or key in options:
            raise OptionError(
                f"{text!r} holds {part!r}; allowed: name:value, name:option=value,option=value, "
                "each option once"
            )
        else:
            options[key] = given
    return Spec(head, value, options)


def value_text(value: Any) -> str:
    """Return an option's value as a spec has it: ``on``, ``none``, ``2``, ``0.5``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "none" if value is None else str(value)


def split_specs(text: str) -> list[str]:
    """Return the parts of a text that are joined by ``+``."""
    return _PLUS.split(text)


class Registry(Mapping[str, T], Generic[T]):
    """Things of one kind by name; ``registry["package.module:NAME"]`` imports somebody's own.

    Parameters
    ----------
    kind : str
        What they are, for error messages.
    accept : callable
        Returns the thing that an imported object stands for, or raises ``ValueError``.
    """

    def __init__(self, kind: str, accept: Callable[[Any], T]) -> None:
        self.kind = kind
        self._accept = accept
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Register a thing. Raises ``ValueError`` for a name that is taken by another."""
        taken = self._things.get(name)
        if taken is not None and _origin(taken) != _origin(thing):
            raise ValueError(f"{self.kind} {name!r} is registered twice; allowed: once")
        self._things[name] = thing

    def __getitem__(self, name: str) -> T:
        if name in self._things:
            return self._things[name]
        if not _PATH.fullmatch(name):
            allowed = f"allowed: {', '.join(self._things)}, or package.module:NAME"
            hints = filter(None, (near(name, self._things), allowed))
            raise OptionError(f"{self.kind} is {name!r}; {'; '.join(hints)}")
        try:
            return self._accept(load_object(name))
        except ValueError as error:
            raise OptionError(f"{self.kind} is {name!r}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def parse(self, text: str) -> tuple[T, Spec]:
        """Return the thing that a text names, and the text's options, not yet read."""
        spec = parse_spec(text, self._things)
        return self[spec.name], spec


def declared_under(name: str, kind: type[T]) -> Callable[[Any], T]:
    """Return what accepts a function under the decorator ``name``, which keeps a ``kind`` there."""

    def accept(found: Any) -> T:
        declaration = getattr(found, name, None)
        if not isinstance(declaration, kind):
            raise ValueError(f"it is a {type(found).__name__}; allowed: a function under @{name}")
        return declaration

    return accept


def _origin(thing: Any) -> tuple[str, str]:
    """Return where a thing was declared: a module that is loaded again declares it again."""
    made = getattr(thing, "function", thing)
    return getattr(made, "__module__", ""), getattr(made, "__qualname__", repr(made))


def is_path(name: str) -> bool:
    """Whether ``name`` is ``package.module:NAME`` rather than a name of this project's."""
    return bool(_PATH.fullmatch(name))


def load_object(path: str) -> Any:
    """Import what ``package.module:NAME`` stands for.

    Raises ``ValueError`` if there is no such module or nothing of that name in it.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
