"""Learning rates over the rounds, the clients' and the server's."""

import math
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
    """Return the learning rate of a round.

    ``cosine`` falls to 0 over the run, ``cosine-restarts`` over each ``period`` rounds (Loshchilov
    and Hutter, SGDR, Equation 5), ``exponential`` by the factor ``decay`` every ``period`` rounds.

    Raises ``ValueError`` for an unknown schedule.
    """
    if schedule not in get_args(Schedule):
        allowed = ", ".join(get_args(Schedule))
        raise ValueError(f"lr-schedule is {schedule!r}; allowed: {allowed}")
    step = server_round - 1
    if schedule == "constant":
        return learning_rate
    if schedule == "cosine":
        return learning_rate * (1 + math.cos(math.pi * step / num_rounds)) / 2
    if schedule == "cosine-restarts":
        return learning_rate * (1 + math.cos(math.pi * (step % period) / period)) / 2
    return learning_rate * decay ** (step // period)
