"""Choosing a block of k of d coordinates from their scores (Algorithm 2 of Acharya et al.)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import checked

from .rows import Result, on_cores

Selection = Literal["sample", "top-k", "uniform"]

_COLUMNS, _TALL = 1 << 13, 32  # shape of a block of scores
_PIECE = 512  # of them are added in float32
_PASSES = 8  # over a block of scores: as long as looking for hits takes

Scores = NDArray[np.float32]
Indices = NDArray[np.int64]


@checked
def select_block(
    scores: Tensor,
    k: int,
    *,
    selection: Selection = "sample",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``k`` distinct coordinates, int64 ascending, on the device of ``scores``.

    Parameters
    ----------
    scores : Tensor
        (d,), float32, 0 or more.
    k : int
        1 to d.
    selection : {"sample", "top-k", "uniform"}
        ``sample`` draws without replacement with inclusion probabilities ``min(1, score / tau)``,
        tau such that they sum to k; ``top-k`` takes the largest scores; ``uniform`` ignores them.
    generator : torch.Generator, optional
        CPU generator; torch's global one by default.

    Raises
    ------
    ValueError
        For an unknown ``selection``.
    """
    d = scores.shape[0]
    device = scores.device
    if k >= d:
        return torch.arange(d, device=device)
    if selection == "top-k":
        return torch.topk(scores, k, sorted=False).indices.sort().values
    if selection == "uniform":
        return torch.randperm(d, generator=generator)[:k].sort().values.to(device)
    # On the CPU, in NumPy.
    scores = scores.cpu()
    values = scores.numpy()
    blocks = _blocks(values)
    threshold, others = certainty_threshold(blocks, k)
    if threshold == 0.0:  # fewer than k are above 0
        chosen = torch.from_numpy(np.flatnonzero(values))
        rest = torch.from_numpy(np.flatnonzero(values == 0))
        fill = torch.randperm(len(rest), generator=generator)[: k - len(chosen)]
        return torch.cat((chosen, rest[fill])).sort().values.to(device)
    certain = _flat_nonzero(values, threshold)
    if len(certain) >= k:
        # More only by rounding: above 2^24 nearly equal scores float32 cannot hold tau.
        return torch.topk(scores, k, sorted=False).indices.sort().values.to(device)
    drawn = _systematic(blocks, others, k - len(certain), threshold, generator)
    if len(certain):
        # Two ascending runs: a stable sort merges them.
        drawn = np.sort(np.concatenate((certain, drawn)), kind="stable")
    if len(drawn) != k:
        drawn = _exactly(k, drawn, scores)
    return torch.from_numpy(drawn).to(device)


def _exactly(k: int, block: Indices, scores: Tensor) -> Indices:
    """Leave out the last of too many coordinates; fill up too few with the best they lack.

    Only rounding makes them not k: two teeth of the comb hit one coordinate whose probability is
    1 to the last digit, or one falls where two pieces of the sum meet.
    """
    chosen = torch.from_numpy(block[:k])
    best = torch.topk(scores.index_fill(0, chosen, -1.0), k - len(chosen)).indices
    return np.asarray(torch.cat((chosen, best)).sort().values)


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """Return the probabilities with which :func:`select_block` samples each coordinate, (d,).

    ``min(1, score / tau)`` with tau such that they sum to k; needs more than k positive scores.
    """
    certain = scores >= certainty_threshold(_blocks(scores.cpu().numpy()), k)[0]
    rest = torch.where(certain, 0.0, scores.double())
    share = rest * ((k - int(certain.sum())) / rest.sum().clamp_min(1e-300))
    return torch.where(certain, 1.0, share)


def certainty_threshold(blocks: Sequence[Scores], k: int) -> tuple[float, NDArray[np.float64]]:
    """Return the score from which a coordinate is taken for certain, and each block's other sum.

    With ``tau = sum of the other scores / (k - number of certain ones)`` a score of tau has
    probability 1; taking those for certain lowers tau, until nothing changes.
    """
    sums, maxima = np.array(_each(lambda block: (_sum(block), block.max()), blocks)).T
    threshold, counts, others = float(sums.sum()) / k, np.zeros(len(blocks), dtype=int), sums.copy()

    def split(i: int) -> tuple[int, float]:
        """How many scores of a block are certain, and the sum of the others."""
        certain = np.flatnonzero(blocks[i] >= threshold)
        if len(certain) == counts[i]:  # the threshold falls: these are the same
            return len(certain), others[i]
        # Not the sum less the certain ones: scores may differ by any factor.
        rest = blocks[i].copy()
        rest[certain] = 0.0
        return len(certain), _sum(rest)

    while True:
        before = int(counts.sum())
        above = np.flatnonzero(maxima >= threshold)
        for i, (count, other) in zip(above, _each(split, above), strict=True):
            counts[i], others[i] = count, other
        certain = int(counts.sum())
        if certain == before or certain >= k:
            return threshold, others
        threshold = min(threshold, float(others.sum()) / (k - certain))


def _sum(scores: Scores) -> float:
    """Return the sum of many scores, to about eight digits: BLAS adds pieces in float32."""
    whole = len(scores) // _PIECE * _PIECE
    pieces = scores[:whole].reshape(-1, _PIECE) @ np.ones(_PIECE, dtype=np.float32)
    total = float(pieces.sum(dtype=np.float64) + scores[whole:].sum(dtype=np.float64))
    return total if math.isfinite(total) else float(scores.sum(dtype=np.float64))


def _systematic(
    blocks: Sequence[Scores],
    sums: NDArray[np.float64],
    k: int,
    threshold: float,
    generator: torch.Generator | None,
) -> Indices:
    """Draw exactly ``k`` coordinates of scores below ``threshold``, in proportion to them.

    Inclusion probabilities are ``k * score / sum``, each below 1. Systematic sampling (Madow
    1949): lay the scores end to end, drop a comb of k equally spaced teeth on them at a random
    offset, take what each tooth hits. One random number, one pass; it has exactly these inclusion
    probabilities, unlike an exponential race, and no limit on d. Rounding may make them k +- 1.
    ``sums`` are those of the scores below the threshold, of each block.
    """
    columns = math.ceil(len(blocks[0]) / _TALL)
    ends = sums.cumsum()
    step = float(ends[-1]) / k
    offset = float(torch.rand(1, generator=generator, dtype=torch.float64))
    starts = (ends - sums) / step - offset

    def hits(part: slice) -> list[Indices]:
        """Coordinates that a tooth falls on, of some blocks: whole numbers of steps are passed."""
        passed = np.empty((_TALL + 1, columns))  # before the first row, after each row
        is_hit = np.empty(_TALL * columns, dtype=bool)
        found = []
        for i in range(part.start, part.stop):
            block = blocks[i]
            flat, mask = passed[1:].reshape(-1), is_hit[: len(block)]
            np.multiply(block, 1 / step, out=flat[: len(block)])
            flat[len(block) :] = 0.0
            if not np.less(block, threshold, out=mask).all():
                flat[np.flatnonzero(~mask)] = 0.0
            # End to end down the columns, a whole row at a time: a cumsum adds one by one.
            for row in range(2, _TALL + 1):
                passed[row] += passed[row - 1]
            passed[0, 0] = 0.0
            np.cumsum(passed[-1, :-1], out=passed[0, 1:])
            passed[0] += starts[i]
            passed[1:] += passed[0]
            np.ceil(passed, out=passed)
            np.greater(passed[1:], passed[:-1], out=is_hit.reshape(_TALL, columns))
            found.append(np.flatnonzero(is_hit) + i * len(is_hit))
        return found

    parts = on_cores(hits, len(blocks), elements=_PASSES * sum(map(len, blocks)))
    return np.concatenate([found for part in parts for found in part])


def _flat_nonzero(values: Scores, threshold: float) -> Indices:
    """Return the indices of the values that reach ``threshold``, ascending."""
    found = on_cores(
        lambda part: np.flatnonzero(values[part] >= threshold) + part.start,
        len(values),
        elements=len(values),
    )
    return np.concatenate(found)


def _blocks(values: Scores) -> list[Scores]:
    size = _COLUMNS * _TALL
    return [values[i : i + size] for i in range(0, len(values), size)]


def _each(function: Callable[..., Result], items: Sequence[Any] | Indices) -> list[Result]:
    """Apply ``function`` to every block, or its number, on all cores; return results in order."""
    if len(items) == 0:
        return []
    ranges = on_cores(
        lambda part: [function(item) for item in items[part]],
        len(items),
        elements=len(items) * _COLUMNS * _TALL,
    )
    return [result for results in ranges for result in results]
