"""Rows whose columns are divided among several holders, each in a process or machine of its own.

What rules ask of their rows adds up over columns, as a Gram matrix does, or is one column after
the other, as a weighted sum is: functions under :func:`over_shards` are computed where the columns
are, and only their results travel. Who the holders are is a :class:`Crew`'s to say.
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Call:
    """A function of a shard's rows and the values that it takes behind them."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, rows: Tensor) -> Any:
        """Return the function's result."""
        return self.function(rows, *self.args, **dict(self.options))

    def at(self, columns: slice) -> "Call":
        """Return the call for a range of the columns."""
        return Call(
            self.function,
            tuple(part_of(value, columns) for value in self.args),
            tuple((name, part_of(value, columns)) for name, value in self.options),
        )


@dataclass(frozen=True)
class PerShard:
    """A value that depends on the columns: ``make(columns)``."""

    make: Callable[[slice], Any]


def part_of(value: Any, columns: slice) -> Any:
    """Return what is a range of the columns' of a value.

    Tensors of one dimension have a value for each column, also those that a dataclass holds.
    """
    if isinstance(value, PerShard):
        return value.make(columns)
    if isinstance(value, Tensor) and value.ndim == 1:
        return value[columns].clone()  # a view would travel with all that it is a view of
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        cut = {name: part_of(inner, columns) for name, inner in held.items()}
        changed = {name: part for name, part in cut.items() if part is not held[name]}
        return replace(value, **changed) if changed else value
    return value


@dataclass(frozen=True)
class Step:
    """A call that makes rows of rows: ``instead`` of those before, where it writes."""

    call: Call
    instead: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)


class ShardsError(RuntimeError):
    """There are no holders for shards, or they die as often as they are replaced."""


class RowsGoneError(LookupError):
    """A holder does not have the rows that it is asked about: they must be sent again."""


def within(columns: Tensor, part: slice) -> Tensor:
    """Return which of some columns, ascending, are in a range, counted from where it begins."""
    low, high = torch.searchsorted(columns, torch.tensor([part.start, part.stop])).tolist()
    found: Tensor = columns[low:high] - part.start
    return found


class Shard:
    """What a holder has: the rows of its columns, and what was made of them."""

    def __init__(self, rows: Tensor) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {(): rows}

    def call(self, steps: Sequence[Step], call: Call) -> Any:
        """Return a call's result on the rows after some steps, which are taken once.

        Raises :class:`RowsGoneError` where others have taken their place.
        """
        path = tuple(step.number for step in steps)
        known = [made for made in self._made if made == path[: len(made)]]
        if not known:
            raise RowsGoneError
        at = max(known, key=len)
        # What was made on another way is not asked for again.
        self._made = {made: self._made[made] for made in known}
        for step in steps[len(at) :]:
            rows = step.call(self._made.pop(at) if step.instead else self._made[at])
            at = (*at, step.number)
            self._made[at] = rows
        return call(self._made[at])


class Crew(ABC):
    """The holders of a matrix's columns."""

    @abstractmethod
    def hold(self, rows: Tensor) -> "Sharded":
        """Return the rows (n, d), divided among the holders.

        They stay with the caller, too, and must not change while what is returned is in use.
        """

    @contextmanager
    def holding(self, rows: Tensor) -> Iterator[Any]:
        """Hold rows in a ``with`` statement, which has them as :class:`Sharded`."""
        try:
            yield self.hold(rows)
        finally:
            self.release()

    @abstractmethod
    def call(self, rows: "Sharded", call: Call) -> list[Any]:
        """Return what a call comes to on each shard, in the order of the columns.

        Raises :class:`ShardsError` if a shard cannot return it.
        """

    @abstractmethod
    def release(self) -> None:
        """Let the holders forget the rows."""

    @abstractmethod
    def close(self) -> None:
        """Let the holders go."""


@dataclass(frozen=True, eq=False)
class Sharded:
    """Rows (n, d) in shards: what a rule is given in the place of a tensor.

    Attributes
    ----------
    crew : Crew
        Who holds them.
    source : Tensor
        (m, d): the rows that they were made of.
    edges : tuple of int
        Where the shards begin, and d.
    shape : torch.Size
        (n, d).
    dtype : torch.dtype
        Of the rows.
    steps : tuple of Step
        What was made of ``source``, in this order.
    """

    crew: Crew
    source: Tensor
    edges: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    ndim = 2
    device = torch.device("cpu")

    def __len__(self) -> int:
        """Return n."""
        return self.shape[0]

    def __getitem__(self, row: int) -> Tensor:
        """Return a row, (d,)."""
        return torch.cat(self.each(_row, row))

    def detach(self) -> "Sharded":
        """Return the rows: they have no gradients."""
        return self

    @property
    def columns(self) -> list[slice]:
        """The range of columns of each shard."""
        return [slice(a, b) for a, b in itertools.pairwise(self.edges)]

    def each(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Return ``function(rows, *args, **options)`` of each shard, in the order of the columns.

        See :func:`part_of` for what becomes of the arguments.
        """
        return self.crew.call(self, Call(function, args, tuple(options.items())))

    def made(
        self,
        function: Callable[..., Tensor],
        *args: Any,
        rows: int,
        dtype: torch.dtype,
        instead: bool = False,
    ) -> "Sharded":
        """Return what a function makes of the rows of each shard: ``rows`` rows of ``dtype``.

        It is computed with the first question that is asked of it. ``instead`` says that the
        function may write into the rows, which are not asked about any more.
        """
        step = Step(Call(function, args), instead)
        shape = torch.Size((rows, self.shape[1]))
        return replace(self, shape=shape, dtype=dtype, steps=(*self.steps, step))


def _row(rows: Tensor, row: int) -> Tensor:
    return rows[row].clone()


def over_shards(join: Callable[[list[Any]], Any]) -> Callable[[F], F]:
    """Let a function of rows take :class:`Sharded` ones: ``join`` makes one result of the shards'.

    Its tensors of one dimension must have a value for each column.
    """

    def declare(function: F) -> F:
        @functools.wraps(function)
        def call(rows: Any, *args: Any, **options: Any) -> Any:
            if isinstance(rows, Sharded):
                return join(rows.each(call, *args, **options))
            return function(rows, *args, **options)

        return call  # type: ignore[return-value]

    return declare


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Join vectors, or matrices, of columns."""
    return torch.cat(list(parts), dim=-1)


def root_of_squares(parts: Sequence[Any]) -> Any:
    """Join norms."""
    return functools.reduce(np.hypot, parts)


def even_edges(d: int, count: int) -> tuple[int, ...]:
    """Return where to cut d columns into ``count`` shards, or one for each column."""
    count = min(count, d)
    return tuple(d * i // count for i in range(count + 1))
