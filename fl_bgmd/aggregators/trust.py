"""Rules that hold the rows against one update of the server's own: FLTrust and MoNNA."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Share
from fl_bgmd.shares import floor_share

from .norms import euclidean_norms
from .results import Aggregate, FilteredAggregate, average_of
from .rows import (
    check_updates,
    combine,
    densest_row,
    in_range,
    pairwise_squared_distances,
    products_with,
    result_dtype,
    row_norms,
    vector_norm,
)
from .rule import rule


@rule("fltrust", sharded=True)
def fltrust(updates: Tensor, root: Tensor) -> Aggregate:
    """Weight rows by their cosine with the server's own update, all at its norm.

    FLTrust of Cao et al. (NDSS 2021), Algorithm 2: with the root update ``g_0``, trust scores
    ``TS_i = max(0, cos(g_i, g_0))`` and ``g_i`` at the norm of ``g_0``, the aggregate is
    ``sum_i TS_i g_i ||g_0|| / ||g_i|| / sum_i TS_i``. Where nobody is trusted, which the paper does
    not speak of, it is zero. It holds up against any number of hostile rows: what counts is how
    good the server's own data are.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    root : Tensor
        (d,): what the server's own data say, in the units of the rows (``global - trained``).

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    root = _checked_root(root, updates)
    rows, scales = in_range(updates)
    length = float(euclidean_norms(root[None])[0])
    trusted = root.double() / length if length else root.double()
    norms = row_norms(rows)
    along = products_with(rows, trusted)
    lengths = np.where(norms > 0, norms, np.inf)
    trust = np.maximum(along / lengths, 0.0)
    if trust.any():
        trust /= trust.sum()
    weights = trust * (length / lengths) / scales
    return Aggregate(combine(weights, updates, result_dtype(updates)), torch.from_numpy(weights))


@rule("monna", sharded=True)
def nearest_neighbor_averaging(
    updates: Tensor, root: Tensor | None = None, *, byzantine_fraction: Share = 0.25
) -> FilteredAggregate:
    """Average the ``n - f`` rows nearest to the server's own update, or to the densest row.

    MoNNA of Farhadkhani et al. (Robust Collaborative Learning with Linear Gradient Overhead, ICML
    2023), Algorithm 1, whose nearest-neighbor averaging takes a node's own vector, which it can
    trust, for the pivot; ``f = floor(byzantine_fraction * n)``. A server without data of its own
    has no such vector: then the pivot is the row to which ``n - f`` rows are nearest, by the
    distance of the last of them.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    root : Tensor, optional
        (d,): the server's own update.
    byzantine_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    count = n - floor_share(byzantine_fraction, n)
    if root is None:
        distances = pairwise_squared_distances(updates)
        distances = distances[densest_row(distances, count)[0]]
    else:
        distances = _distances_to(_checked_root(root, updates), updates)
    kept = np.zeros(n, dtype=bool)
    kept[np.argsort(distances, kind="stable")[:count]] = True
    return average_of(kept, updates)


def _distances_to(point: Tensor, updates: Tensor) -> NDArray[np.float64]:
    """Return the distances of the rows to a point (d,), in units that fit all of them."""
    rows, scales = in_range(updates)
    scale = float(scales.min())
    return row_norms(rows, -point.double().to(updates.device) / scale)


def _checked_root(root: Tensor, updates: Tensor) -> Tensor:
    """Return the root update without gradients; raise ``TypeError`` or ``ValueError``."""
    if not isinstance(root, Tensor):
        raise TypeError(f"root is {root}; allowed: a tensor (d,), the server's own update")
    d = updates.shape[1]
    if tuple(root.shape) != (d,):
        raise ValueError(f"root has shape {tuple(root.shape)}; allowed: ({d},)")
    if not math.isfinite(vector_norm(root.detach())):
        raise ValueError("root holds a NaN or an infinity; allowed: finite values")
    return root.detach()
