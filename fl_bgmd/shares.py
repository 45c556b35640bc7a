"""Fractions of a number of clients, in whole clients.

The margin is for products that are off by their last digit: 0.29 * 100 is 28.999999999999996 and
0.1 * 30 is 3.0000000000000004.
"""

import math

_MARGIN = 1e-9


def floor_share(fraction: float, n: int) -> int:
    """Return ``floor(fraction * n)`` of the numbers as they are written."""
    return int(fraction * n + _MARGIN)


def ceil_share(fraction: float, n: int) -> int:
    """Return ``ceil(fraction * n)`` of the numbers as they are written."""
    return math.ceil(fraction * n - _MARGIN)
