"""What a rule is given in a round: the fresh rows, the stale ones behind them, what they weigh."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shares import hostile_count

from .estimate import after_round
from .settings import Settings
from .stale import StaleUpdates, behind
from .step import Round


def gathered(
    fresh: Round, examples: Sequence[float], stale: StaleUpdates, settings: Settings
) -> Round:
    """Return all the rows of a round for its rule.

    Parameters
    ----------
    fresh : Round
        The accepted replies (n, c), without weights; with the hostile share that was prepared for
        in the round before.
    examples : sequence of float
        (n,): how many examples they report.
    stale : StaleUpdates
        What other nodes sent last.
    settings : Settings
        Whether examples weight, and the share is estimated.
    """
    others, norms = stale.heard, fresh.norms
    if norms is not None and others:
        more = [h.norm for h in others]
        norms = None if None in more else torch.cat([norms, torch.tensor(more, dtype=norms.dtype)])
    updates, share = behind(fresh.updates, others), fresh.byzantine_fraction
    if settings.estimated:
        share = after_round(share, updates, settings.least_share)
    weights = None
    if settings.weighting == "examples":
        counts = [*examples, *(h.examples for h in others)]
        weights = capped_examples(counts, share)
    return replace(
        fresh,
        updates=updates,
        nodes=[*fresh.nodes, *(h.node for h in others)],
        norms=norms,
        weights=weights,
        byzantine_fraction=share,
    )


def capped_examples(counts: Sequence[float], byzantine_fraction: float) -> Tensor:
    """Return numbers of examples, float64 (n,), capped so that no minority can own the model."""
    examples = np.asarray([float(count) for count in counts])
    hostile = hostile_count(byzantine_fraction, len(examples))
    capped = np.minimum(examples, example_cap(examples, hostile))
    return torch.from_numpy(capped if capped.any() else np.ones_like(capped))


def example_cap(examples: NDArray[np.float64], hostile: int) -> float:
    """Return where to cap numbers of examples.

    At their median (the lower one of two: their mean would be the larger one's to choose), and
    lower where the ``hostile`` largest would come near half of the weight: they get at most what
    lies midway between their share of the clients and one half.
    """
    n = len(examples)
    ordered = np.sort(examples)
    most = (hostile / n + 0.5) / 2
    below = (n - 1) // 2
    cap = float(ordered[below])
    # With m = n - below clients at the cap and s the sum of the others, the hostile have
    # hostile * cap of s + m * cap.
    while (excess := hostile - most * (n - below)) > 0:
        cap = min(cap, most * float(ordered[:below].sum()) / excess)
        if cap >= ordered[below - 1]:
            break
        below, cap = below - 1, float(ordered[below - 1])
    return cap
