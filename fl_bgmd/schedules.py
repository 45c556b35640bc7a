"""Learning rates over the rounds, the clients' and the server's: torch's schedulers."""

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler, StepLR

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
    if schedule == "constant":
        return learning_rate
    count = max(num_rounds, server_round)
    rates = _rates(learning_rate, schedule, num_rounds, period, decay, count)
    return rates[max(0, server_round - 1)]


@lru_cache(maxsize=8)
def _rates(
    learning_rate: float, schedule: str, num_rounds: int, period: int, decay: float, count: int
) -> list[float]:
    """Return the rates of the first ``count`` rounds: torch steps from one to the next."""
    optimizer = SGD([torch.zeros(())], learning_rate)
    scheduler: LRScheduler
    if schedule == "exponential":
        scheduler = StepLR(optimizer, period, decay)
    else:
        # The whole run is one cycle of cosine: here torch computes each rate from its round alone,
        # while CosineAnnealingLR makes it from the one before and gathers rounding errors.
        cycle = num_rounds if schedule == "cosine" else period
        scheduler = CosineAnnealingWarmRestarts(optimizer, cycle)
    rates: list[float] = []
    for _ in range(count):
        rates += map(float, scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return rates
