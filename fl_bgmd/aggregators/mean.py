"""The mean: what every robust rule is compared with."""

import math

import torch
from torch import Tensor

from .results import Aggregate
from .rows import (
    check_updates,
    check_weights,
    combine,
    refuse_non_finite,
    result_dtype,
    vector_norm,
)
from .rule import rule


@rule("mean", robust=False, sharded=True)
def mean(updates: Tensor, *, weights: Tensor | None = None) -> Aggregate:
    """Return the (weighted) mean of the rows. Breakdown point 0.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    weights : Tensor, optional
        (n,), finite, not negative, not all zero; normalized to sum to one.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    coefficients = check_weights(weights, updates.shape[0])
    coefficients /= coefficients.sum()
    vector = combine(coefficients, updates, result_dtype(updates))
    if not math.isfinite(vector_norm(vector)):
        refuse_non_finite(updates)
    return Aggregate(vector, torch.from_numpy(coefficients))
