"""Learning rates over the rounds, the clients' and the server's: those of torch's schedulers.

To the bit, but without them: they need one of torch's optimizers, which load its compiler: seconds
in every process.
"""

import math
from itertools import repeat
from typing import Literal, get_args

Schedule = Literal["constant", "cosine", "cosine-restarts", "exponential"]


def scheduled_learning_rate(
    learning_rate: float,
    schedule: Schedule,
    server_round: int,
    num_rounds: int,
    *,
    period: int = 1,
    decay: float = 0.99,
) -> float:
    """Return the learning rate of a round: that of torch's scheduler after a step a round.

    Parameters
    ----------
    learning_rate : float
        That of the first round.
    schedule : {"constant", "cosine", "cosine-restarts", "exponential"}
        ``cosine-restarts`` falls to 0 over each ``period`` rounds (Loshchilov and Hutter, SGDR,
        Equation 5: ``CosineAnnealingWarmRestarts``), ``cosine`` over the run, ``exponential`` by
        the factor ``decay`` every ``period`` rounds (``StepLR``).
    server_round : int
        From 1 up.
    num_rounds : int
        Of the run.
    period, decay
        See above.

    Raises
    ------
    ValueError
        For an unknown schedule.
    """
    if schedule not in get_args(Schedule):
        allowed = ", ".join(get_args(Schedule))
        raise ValueError(f"lr-schedule is {schedule!r}; allowed: {allowed}")
    step = max(0, server_round - 1)
    if schedule == "constant":
        return learning_rate
    if schedule == "exponential":
        return math.prod(repeat(decay, step // period), start=learning_rate)
    # The whole run is one cycle of cosine: each rate from its round alone, while torch's
    # CosineAnnealingLR makes it from the one before and gathers rounding errors.
    cycle = num_rounds if schedule == "cosine" else period
    return learning_rate * (1 + math.cos(math.pi * (step % cycle) / cycle)) / 2
