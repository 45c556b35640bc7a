"""Choosing a block of k of d coordinates from their scores (Algorithm 2 of Acharya et al.)."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SELECTIONS = ("sample", "top-k", "uniform")
_BLOCK = 1 << 18


def select_block(
    scores: Tensor, k: int, *, selection: str = "sample", generator: torch.Generator | None = None
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
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}; allowed: {', '.join(SELECTIONS)}")
    d = scores.shape[0]
    device = scores.device
    if k >= d:
        return torch.arange(d, device=device)
    if selection == "top-k":
        return torch.topk(scores, k, sorted=False).indices.sort().values
    if selection == "uniform":
        return torch.randperm(d, generator=generator)[:k].sort().values.to(device)
    positive = int(torch.count_nonzero(scores))
    if positive <= k:
        chosen = torch.nonzero(scores).flatten()
        rest = torch.nonzero(scores == 0).flatten()
        fill = torch.randperm(len(rest), generator=generator)[: k - positive].to(device)
        return torch.cat((chosen, rest[fill])).sort().values
    certain = torch.nonzero(scores >= certainty_threshold(scores, k)).flatten()
    if len(certain) >= k:
        # More only by rounding: above 2^24 nearly equal scores float32 cannot hold tau.
        return torch.topk(scores, k, sorted=False).indices.sort().values
    if len(certain) == 0:
        drawn = _systematic(scores, k, generator)
    else:
        rest = scores.index_fill(0, certain, 0.0)
        drawn = torch.cat((certain, _systematic(rest, k - len(certain), generator))).sort().values
    return _without_repeats(drawn, scores)


def _without_repeats(block: Tensor, scores: Tensor) -> Tensor:
    """Replace repeats in the ascending ``block`` by the best coordinates it lacks.

    Two teeth hit one coordinate only by rounding, where its probability is 1 to the last digit.
    """
    distinct = torch.unique_consecutive(block)
    missing = len(block) - len(distinct)
    if missing == 0:
        return block
    best = torch.topk(scores.index_fill(0, distinct, -1.0), missing).indices
    return torch.cat((distinct, best)).sort().values


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """Return the probabilities with which :func:`select_block` samples each coordinate, (d,).

    ``min(1, score / tau)`` with tau such that they sum to k; needs more than k positive scores.
    """
    certain = scores >= certainty_threshold(scores, k)
    rest = torch.where(certain, 0.0, scores.double())
    share = rest * ((k - int(certain.sum())) / rest.sum().clamp_min(1e-300))
    return torch.where(certain, 1.0, share)


def certainty_threshold(scores: Tensor, k: int) -> float:
    """Return the score from which a coordinate is taken for certain.

    With ``tau = sum of the other scores / (k - number of certain ones)`` a score of tau has
    probability 1; taking those for certain lowers tau, until nothing changes.
    """
    threshold, certain = float(scores.sum(dtype=torch.float64)) / k, 0
    if float(scores.max()) < threshold:
        return threshold
    while True:
        taken = scores >= threshold
        count = int(torch.count_nonzero(taken))
        if count == certain or count >= k:
            return threshold
        certain = count
        # Not the total less the taken ones: scores may differ by any factor.
        rest = float(scores.masked_fill(taken, 0.0).sum(dtype=torch.float64))
        threshold = min(threshold, rest / (k - certain))


def _systematic(scores: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Draw exactly ``k`` coordinates with probabilities ``k * score / sum``, each below 1.

    Systematic sampling (Madow 1949): lay the scores end to end, drop a comb of k equally spaced
    teeth on them at a random offset, take what each tooth hits. One random number, one pass; it
    has exactly these inclusion probabilities, unlike an exponential race, and no limit on d.
    """
    # On the CPU, in NumPy: its searchsorted is quick for sorted needles and holds no lock.
    values = scores.cpu().numpy()
    blocks = [values[i : i + _BLOCK] for i in range(0, len(values), _BLOCK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        totals = np.array(list(pool.map(lambda block: block.sum(dtype=np.float64), blocks)))
        ends = totals.cumsum()
        step = float(ends[-1]) / k
        offset = float(torch.rand(1, generator=generator, dtype=torch.float64))
        # The number of teeth before each block's end; the last block takes what is left.
        teeth = np.clip(np.ceil(ends / step - offset), 0, k).astype(np.int64)
        teeth[-1] = k
        firsts = np.maximum.accumulate(np.concatenate(([0], teeth[:-1])))

        def hits(i: int) -> NDArray[np.int64]:
            """Coordinates of block i that a tooth falls on."""
            positions = (np.arange(firsts[i], teeth[i]) + offset) * step - (ends[i] - totals[i])
            running = np.cumsum(blocks[i], dtype=np.float64)
            found = np.searchsorted(running, positions, side="right")
            # Rounding may push the last tooth past the end, onto trailing zeros or beyond.
            final = int(np.searchsorted(running, running[-1], side="left"))
            hit: NDArray[np.int64] = np.minimum(found, final) + i * _BLOCK
            return hit

        occupied = [i for i in range(len(blocks)) if teeth[i] > firsts[i]]
        chosen = np.concatenate(list(pool.map(hits, occupied)))
    return torch.from_numpy(chosen).to(scores.device)
