"""What a compressor is, how one declares itself, and what a text such as ``top-k:0.01`` builds.

A compressor is a frozen dataclass under :func:`compressor`; its fields are its options, with bounds
in their annotations::

    @compressor("every-other")
    @dataclass(frozen=True)
    class EveryOther(Compressor):
        step: Count = 2
"""

import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Option, OptionError, Options, check_all, documentation
from fl_bgmd.registry import Registry, is_path, parse_spec, value_text

from .bits import check_length, pack_floats, unpack_floats

Shapes = tuple[tuple[int, ...], ...]


class Internal:
    """In a field's annotation: no option; :meth:`Compressor.for_round` and the like set it."""


class Compressor(ABC):
    """A compressor of flat updates: real bytes, and a stated bound on what they lose.

    The bytes of :meth:`encode` have the length that :meth:`num_bytes` says, for every vector of one
    size. :meth:`decode` raises ``ValueError`` for bytes that no ``encode`` of the same compressor
    and size has written, and never allocates more than the size calls for: what it reads may come
    from anybody.

    Attributes
    ----------
    carries_model : bool
        Whether a model survives it: every value is rounded a little, without bias, and none is left
        out.
    can_share_coordinates : bool
        Whether a server may choose the coordinates that all clients send.
    """

    kinds: ClassVar[tuple["Kind", ...]] = ()
    carries_model: ClassVar[bool] = False
    can_share_coordinates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options. Raises :class:`OptionError` for a value that is not allowed."""
        for option in _options(type(self)).values():
            option.check(getattr(self, option.parameter))

    @property
    def name(self) -> str:
        """The spec with all that differs from the defaults, as :func:`build_compressor` takes it.

        It travels: clients build their compressor from it.
        """
        for kind in vars(type(self)).get("kinds", ()):
            if all(getattr(self, key) == value for key, value in kind.fixed.items()):
                return str(kind.spec(self))
        raise TypeError(f"{type(self).__name__} has no name; allowed: a class under @compressor")

    @abstractmethod
    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return the message that stands for ``vector``, (d,) floating point, finite.

        ``generator`` is what random compressors draw from, torch's own by default.
        """

    @abstractmethod
    def decode(self, data: bytes, size: int) -> Tensor:
        """Return what a message of a vector of length ``size`` stands for, (size,) float32."""

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """Return the length of a message for a vector of length ``size``."""

    @abstractmethod
    def delta(self, size: int) -> float:
        """Return the guaranteed share of the squared norm that survives, 0 for no guarantee.

        The delta of Definition 4 of Ghosh et al., also where it holds in expectation only::

            E ||Q(x) - x||^2 <= (1 - delta) ||x||^2
        """

    def for_shapes(self, shapes: Shapes) -> Self:
        """Return the compressor of a vector that holds arrays of these shapes, in this order."""
        return self

    def for_round(self, seed: int) -> Self:
        """Return the compressor of a round in which the server's ``seed`` stands for coordinates.

        Itself where it chooses none.
        """
        return self

    def coordinates(self, size: int) -> NDArray[np.int64] | None:
        """Return the coordinates that the server chose for all, ascending, (k,).

        None where each client chooses its own.
        """
        return None

    def scale(self, size: int) -> float:
        """Return what a value that is sent is multiplied by, so that the result is unbiased."""
        return 1.0

    def as_plain(self, update: Tensor) -> Tensor:
        """Return the uncompressed update, (d,), that a server takes for the decoded ``update``.

        Another one where the server chose the coordinates: it scales what comes uncompressed.
        """
        return update


C = TypeVar("C", bound=Compressor)


@functools.cache
def _options(made: type[Compressor]) -> dict[str, Option]:
    """Return the options that the fields of a class declare."""
    hints = typing.get_type_hints(made, include_extras=True)
    help = documentation(inspect.getdoc(made) or "")
    return {
        field.name: Option(
            field.name, field.name, hints[field.name], field.default, help.get(field.name, "")
        )
        for field in fields(made)  # type: ignore[arg-type]
        if Internal not in getattr(hints[field.name], "__metadata__", ())
    }


@dataclass(frozen=True)
class Kind:
    """A compressor as it was declared.

    Attributes
    ----------
    name : str
        Kebab-case.
    function : type of Compressor
        What it builds.
    options : mapping of str to Option
        The first one's value may stand alone in a spec.
    fixed : mapping of str to object
        Values of the fields that the name stands for.
    """

    name: str
    function: type[Compressor]
    options: Options
    fixed: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.function.__doc__ or "").partition("\n")[0]

    def build(self, given: Mapping[str, Any]) -> Compressor:
        """Return the compressor with options by name, checked; the others have their defaults."""
        return self.function(**check_all(self.name, given, self.options), **self.fixed)

    def spec(self, compressor: Compressor) -> str:
        """Return the spec of a compressor of this kind: its first option, others if they differ."""
        told = []
        for number, option in enumerate(self.options.values()):
            value = getattr(compressor, option.parameter)
            if number == 0:
                told.append(value_text(value))
            elif value != option.default:
                told.append(f"{option.key}={value_text(value)}")
        return f"{self.name}:{','.join(told)}" if told else self.name


def _accept(found: Any) -> Kind:
    kinds = vars(found).get("kinds", ()) if isinstance(found, type) else ()
    if not kinds:
        shown = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ValueError(f"it is a {shown}; allowed: a class under @compressor")
    if len(kinds) > 1:
        names = ", ".join(kind.name for kind in kinds)
        raise ValueError(f"it has several names; allowed: one of {names}")
    kind: Kind = kinds[0]
    return kind


COMPRESSORS: Registry[Kind] = Registry("compressor", _accept)
"""Compressors by name."""


def compressor(name: str, **fixed: Any) -> Callable[[type[C]], type[C]]:
    """Declare a class as a compressor: see the module.

    ``fixed`` are values of fields that the name stands for; a class may have several names.
    """

    def declare(made: type[C]) -> type[C]:
        options = {key: option for key, option in _options(made).items() if key not in fixed}
        kind = Kind(name, made, options, fixed)
        COMPRESSORS.add(name, kind)
        made.kinds = (*vars(made).get("kinds", ()), kind)
        return made

    return declare


def names_of(holds: Callable[[type[Compressor]], bool]) -> str:
    """Return the names of the compressors whose class ``holds``, for a message."""
    return ", ".join(name for name, kind in COMPRESSORS.items() if holds(kind.function))


def build_compressor(text: str) -> Compressor:
    """Build a compressor from its spec, such as ``top-k:0.01`` or ``qsgd:levels=15,bucket=0``.

    ``name``, ``name:value`` (of the first option) or ``name:option=value,option=value``;
    ``package.module:NAME`` is a class of your own under :func:`compressor`, and is imported: not
    for texts from others, see :func:`build_received`. Raises :class:`OptionError`, a ``TypeError``
    and ``ValueError``, for an unknown name or option and for values that are not allowed.
    """
    kind, spec = COMPRESSORS.parse(text)
    try:
        return kind.build(spec.values(kind.options))
    except ValueError as error:
        raise OptionError(f"compressor is {text!r}: {error}") from None


def build_received(text: str, own: Iterable[object] = ()) -> Compressor:
    """Build a compressor from a spec that came in a message: nothing that it names is imported.

    ``own`` are specs of one's own configuration. What they name by ``package.module:NAME`` is
    imported where the text's name is not known, and known from then on. Raises
    :class:`OptionError` as :func:`build_compressor` does, and for a path.
    """
    name = parse_spec(text, COMPRESSORS).name
    for spec in own if name not in COMPRESSORS else ():
        path = parse_spec(spec, COMPRESSORS).name if isinstance(spec, str) else ""
        if is_path(path):
            COMPRESSORS[path]
    if name not in COMPRESSORS:
        raise OptionError(
            f"compressor is {text!r} in a message; allowed: {', '.join(COMPRESSORS)}, and those of "
            "your own whose module the app imports or its configuration names"
        )
    return build_compressor(text)


def build_downlink(
    text: str, build: Callable[[str], Compressor] = build_compressor
) -> Compressor | None:
    """Return the compressor of the model that ``text`` stands for, None for ``none``.

    Of those that carry a model. Raises :class:`OptionError` for the others: they would leave out
    or level most of it.
    """
    if text == "none":
        return None
    made = build(text)
    if not made.carries_model:
        carry = names_of(lambda kind: kind.carries_model)
        raise OptionError(f"downlink_compressor is {text!r}; allowed: none, {carry}")
    return made


@compressor("none")
@dataclass(frozen=True)
class NoCompression(Compressor):
    """The vector as float32: 4 bytes a value."""

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return the values."""
        return pack_floats(vector)

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return the values."""
        check_length(data, self.num_bytes(size), self.name)
        return torch.from_numpy(np.array(unpack_floats(data, size), dtype=np.float32))

    def num_bytes(self, size: int) -> int:
        """Return 4 bytes a value."""
        return 4 * size

    def delta(self, size: int) -> float:
        """Return 1: only the rounding to float32 is lost."""
        return 1.0
