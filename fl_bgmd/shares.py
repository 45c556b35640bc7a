"""Fractions of a number of clients, in whole clients.

The margin is for products that are off by their last digit: 0.29 * 100 is 28.999999999999996 and
0.1 * 30 is 3.0000000000000004.
"""

import math

FEWEST = 3
"""With fewer clients nobody has a majority: who lies cannot be told from who does not."""

_MARGIN = 1e-9


def floor_share(fraction: float, n: int) -> int:
    """Return ``floor(fraction * n)`` of the numbers as they are written."""
    return int(fraction * n + _MARGIN)


def ceil_share(fraction: float, n: int) -> int:
    """Return ``ceil(fraction * n)`` of the numbers as they are written."""
    return math.ceil(fraction * n - _MARGIN)


def hostile_count(fraction: float, n: int) -> int:
    """Return how many of n clients have to be expected to lie.

    ``floor(fraction * n)``, and from :data:`FEWEST` clients on at least one where ``fraction`` is
    above 0: who assumes that a quarter of the clients lie does not mean that three may be trusted
    blindly. This is how strategies read ``byzantine_fraction``; the pure functions of
    :mod:`fl_bgmd.aggregators` keep to the printed ``floor(fraction * n)`` of their papers.
    """
    count = floor_share(fraction, n)
    return max(1, count) if fraction > 0 and n >= FEWEST else count


def largest_bucket(most: int, hostile: int, n: int) -> int:
    """Return the largest bucket size up to ``most`` that leaves hostile buckets the minority.

    Each of ``hostile`` of n rows may spoil a bucket of its own.
    """
    sizes = range(most, 1, -1)
    return next((size for size in sizes if 2 * hostile < math.ceil(n / size)), 1)
