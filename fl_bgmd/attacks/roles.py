"""Who is hostile in which round, and how: computed alike by everyone who knows the seed."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeVar, get_args

import numpy as np

from fl_bgmd.shares import floor_share

A = TypeVar("A")

Selection = Literal["per-round", "fixed"]
"""Whether the hostile clients are redrawn in each round."""

SELECTIONS: tuple[str, ...] = get_args(Selection)

# Fixed roles have a stream of their own: that of round 0 is the stream that deals out the data.
_NO_ROUND = 2**32 - 1


def byzantine_clients(
    num_clients: int, fraction: float, round: int, seed: int, selection: str = "per-round"
) -> frozenset[int]:
    """Return the partition ids that are hostile in a round.

    Exactly ``floor(fraction * num_clients)`` of ``0 .. num_clients - 1``, drawn from the seed and
    the round alone, so that clients on different machines agree without a word.

    Parameters
    ----------
    num_clients : int
        1 or more.
    fraction : float
        0 to 1.
    round : int
        The server's round, 0 or more.
    seed : int
        0 or more.
    selection : {"per-round", "fixed"}
        Redrawn in each round, or the same in all.

    Raises
    ------
    ValueError
        For a value outside of the above.
    """
    return frozenset(_drawn(num_clients, fraction, round, seed, selection))


def byzantine_roles(
    attacks: Sequence[A],
    num_clients: int,
    fraction: float,
    round: int,
    seed: int,
    selection: str = "per-round",
) -> dict[int, A]:
    """Return which attack each hostile client runs in a round, by partition id.

    The clients are those of :func:`byzantine_clients`; several ``attacks`` are dealt out to them
    in turns, in the order in which they were drawn. Raises ``ValueError`` as that does, and for
    no attacks.
    """
    if not attacks:
        raise ValueError("attacks is empty; allowed: one or more")
    drawn = _drawn(num_clients, fraction, round, seed, selection)
    return {client: attacks[i % len(attacks)] for i, client in enumerate(drawn)}


@lru_cache(maxsize=64)
def _drawn(
    num_clients: int, fraction: float, round: int, seed: int, selection: str
) -> tuple[int, ...]:
    """Draw the hostile clients, once for all clients of a process that ask who they are."""
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}; allowed: 1 or more")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; allowed: 0 to 1")
    if round < 0 or seed < 0:
        raise ValueError(f"round is {round} and seed is {seed}; allowed: 0 or more")
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}; allowed: {', '.join(SELECTIONS)}")
    drawn_for = _NO_ROUND if selection == "fixed" else round
    count = floor_share(fraction, num_clients)
    order = np.random.default_rng([seed, drawn_for]).permutation(num_clients)
    return tuple(int(client) for client in order[:count])
