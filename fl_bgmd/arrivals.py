"""Replies as they arrive: the grid's push and pull in the place of its ``send_and_receive``.

A round that waits for all replies before it looks at the first one holds all of them in memory, and
has its work still to do when the slowest client is done. Here each reply is handed on as soon as it
is there, and nobody keeps it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fl_bgmd.held import num_bytes

PULL_BYTES = 2**24
"""About what one pull may bring: smaller replies are pulled together."""

_SHARE = 32  # one pull brings at most one reply in this many, whatever their size
_FIRST_PAUSE, _LONGER, _LONGEST_PAUSE = 0.02, 1.5, 3.0  # seconds between two looks at the grid

Method = TypeVar("Method", bound=Callable[..., Any])


class Arrivals:
    """The replies to some messages, to be taken once, while they come.

    Parameters
    ----------
    count : int
        How many there are at most.
    replies : iterator of Message
        Whoever takes one is the only one who has it.
    """

    def __init__(self, count: int, replies: Iterator[Message]) -> None:
        self._count, self._replies = count, replies

    def __len__(self) -> int:
        """Return how many there are at most."""
        return self._count

    def __iter__(self) -> Iterator[Message]:
        """Return those that have not been taken yet."""
        return self._replies


def as_they_arrive(method: Method) -> Method:
    """Mark an ``aggregate_train`` that looks at its replies once, one after the other.

    Others, of a subclass for example, are given a list, as Flower gives them one.
    """
    method.as_they_arrive = True  # type: ignore[attr-defined]
    return method


def arriving(grid: Grid, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
    """Send the messages; return the replies that come within ``timeout`` seconds.

    They are an :class:`Arrivals` unless the grid has a ``send_and_receive`` of its own behind its
    push and pull: whoever wraps or overrides that one alone means it to be called. A grid with a
    ``stream(messages, timeout=...)`` knows best how to wait.
    """
    if _receives_its_own_way(grid):
        return list(grid.send_and_receive(messages, timeout=timeout))
    if hasattr(grid, "stream"):
        return Arrivals(len(messages), iter(grid.stream(messages, timeout=timeout)))
    per_pull = _replies_per_pull(messages)  # first: a grid may take the messages apart
    started = time.monotonic()
    try:
        pushed = list(grid.push_messages(messages))
    except NotImplementedError:
        return list(grid.send_and_receive(messages, timeout=timeout))
    deadline = None if timeout is None else started + timeout
    # What could not be pushed is marked by None, from Flower 1.43 on by "".
    numbers = [number for number in pushed if number]
    return Arrivals(len(messages), _pulled(grid, numbers, per_pull, deadline))


def handed_to(aggregate: Callable[..., Any], replies: Iterable[Message]) -> Iterable[Message]:
    """Return the replies in the form in which a strategy's method expects them."""
    marked = getattr(aggregate, as_they_arrive.__name__, False)
    return replies if marked or isinstance(replies, list) else list(replies)


def _receives_its_own_way(grid: Grid) -> bool:
    """Whether ``send_and_receive`` is not just push and pull: it alone was overridden."""
    whole, *parts = (
        next((base for base in type(grid).__mro__ if name in vars(base)), None)
        for name in ("send_and_receive", "push_messages", "pull_messages")
    )
    if whole is None or None in parts or "send_and_receive" in vars(grid):
        return True
    return any(whole is not part and issubclass(whole, part) for part in parts if part is not None)


def _replies_per_pull(messages: Sequence[Message]) -> int:
    """Return how many replies are pulled at a time."""
    records = messages[0].content.array_records.values() if messages else ()
    size = sum(num_bytes(array) for record in records for array in record.values())
    return max(1, len(messages) // _SHARE, PULL_BYTES // max(1, size))


def _pulled(
    grid: Grid, waiting: list[str], per_pull: int, deadline: float | None
) -> Iterator[Message]:
    """Yield replies as they come; after the deadline those that have come by then."""
    longest = min(_LONGEST_PAUSE, getattr(grid, "pull_interval", _LONGEST_PAUSE))
    pause = shortest = min(longest, _FIRST_PAUSE)
    while waiting:
        is_last_look = deadline is not None and time.monotonic() >= deadline
        answered: set[str] = set()
        for start in range(0, len(waiting), per_pull):
            # By position: the parameter has another name from Flower 1.43 on.
            found = deque(grid.pull_messages(waiting[start : start + per_pull]))
            answered |= {reply.metadata.reply_to_message_id for reply in found}
            while found:  # nothing here holds what was handed on
                yield found.popleft()
        waiting = [number for number in waiting if number not in answered]
        if is_last_look or not waiting:
            return
        pause = shortest if answered else min(longest, pause * _LONGER)
        left = pause if deadline is None else deadline - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))
