"""What the server would do with some updates, for simulated attackers that know it."""

import numpy as np
import torch
from torch import Tensor

from fl_bgmd.aggregators import Rule

from .rows import gathered
from .sent import Sent
from .settings import Settings
from .step import Round, State, aggregate, following
from .ties import Tied


def preview(
    rule: Rule,
    sent: Sent,
    state: State,
    settings: Settings,
    updates: Tensor,
    nodes: list[int],
    examples: list[float],
    rounds: int,
) -> Tensor:
    """Return what a rule would move the model by if ``rounds`` rounds brought these updates.

    Mixing and the rule, without the server's optimizer; arrays are tied where they were before the
    round, and what others sent last is behind these updates. A round in which the rule fails moves
    nothing.

    Parameters
    ----------
    rule, sent, state, settings
        Of the round; they stay as they are.
    updates : Tensor
        (n, d), in the server's order (:func:`.intake.in_order`); not changed.
    nodes : list of int
        (n,): whose they are.
    examples : list of float
        (n,): how many examples they report.
    rounds : int
        1 or more.

    Returns
    -------
    Tensor
        (d,), float64 on the CPU: the sum of the rounds' aggregates.

    Raises
    ------
    ValueError
        For another shape, or number of rounds.
    """
    expected = (len(nodes), sent.layout.num_directions)
    if tuple(updates.shape) != expected or len(examples) != len(nodes):
        raise ValueError(
            f"updates have shape {tuple(updates.shape)} with {len(nodes)} nodes and "
            f"{len(examples)} numbers of examples; allowed: {expected} and as many"
        )
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; allowed: 1 or more")
    moved = torch.zeros(sent.layout.num_directions, dtype=torch.float64)
    if len(nodes) < settings.least_replies:
        return moved
    if sent.coordinates is not None:
        updates = updates[:, torch.from_numpy(sent.coordinates)]
    elif state.ties:
        updates = Tied(sent.layout.directions, state.ties).merge(updates.clone())
    stale = state.stale.without(nodes).usable(sent.terms.round, settings.stale_updates)
    root = sent.root_row(state.ties, settings.torch_device)
    rate = settings.learning_rate(sent.terms.round)
    for number in range(rounds):
        # A copy: the rule may overwrite it.
        rows = updates.to(settings.torch_device, sent.row_dtype, copy=True)
        share = state.assumed(settings)
        fresh = Round(rows, None, nodes, byzantine_fraction=share, root=root)
        current = gathered(fresh, examples, stale, settings)
        try:
            with np.errstate(all="ignore"):
                result, drawn = aggregate(rule, current, state, rate)
        except ValueError:
            break  # and so in all the other rounds
        estimate = current.byzantine_fraction if settings.estimated else None
        before, state = state, following(state, rule, result, drawn, estimate)
        step = sent.spread(result.vector, state.ties).cpu().double()
        moved += step
        if state.settled(before):  # a search tries hundreds of lies on rules that remember nothing
            for _ in range(number + 1, rounds):
                moved += step
            break
    return moved
