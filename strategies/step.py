"""A round as a pure step: from one state to the next, or back to the old one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.sgd import sgd

from fl_bgmd.aggregators import Aggregate, Rule
from fl_bgmd.compression import Compressor
from fl_bgmd.layout import ModelLayout

from .ties import Tied, find_ties

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sent:
    """What went out to the clients of a round, and what their replies are held against.

    Attributes
    ----------
    model : ArrayRecord
        The server's model.
    layout : ModelLayout
        Of the model as the clients have it: rounded where there is a downlink compressor.
    own_layout : ModelLayout
        Of ``model``.
    compressor : Compressor or None
        What they were asked to pack their updates with, with the round's seed.
    coordinates : ndarray or None
        int64 (k,): those that the server chose for all of them.
    num_bytes : int
        Of the model, for each client.
    """

    model: ArrayRecord
    layout: ModelLayout
    own_layout: ModelLayout
    compressor: Compressor | None = None
    coordinates: Indices | None = None
    num_bytes: int = 0

    @property
    def width(self) -> int:
        """How many values a row has."""
        return self.layout.num_directions if self.coordinates is None else len(self.coordinates)

    def spread(self, vector: Tensor, ties: Mapping[str, str]) -> Tensor:
        """Return what a rule made of rows as an update of all coordinates, (d,)."""
        if ties:
            vector = Tied(self.layout.directions, ties).spread(vector)
        if self.coordinates is None:
            return vector
        update = torch.zeros(self.layout.num_directions, dtype=vector.dtype)
        update[torch.from_numpy(self.coordinates)] = vector.cpu()
        return update


@dataclass(frozen=True)
class State:
    """All that the next round depends on; a checkpoint holds it.

    Attributes
    ----------
    round : int
        The last round that was aggregated.
    generator : Tensor
        The state of what blocks and buckets are drawn from.
    memory : object
        The rule's: see :attr:`fl_bgmd.aggregators.Aggregate.memory`.
    momentum : Tensor or None
        (d,): the buffer of the server's SGD.
    ties : dict of str to str
        Arrays that are one tensor: see :mod:`.ties`.
    empty_rounds : int
        How many rounds in a row have come to nothing.
    """

    generator: Tensor
    round: int = 0
    memory: Any = None
    momentum: Tensor | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    empty_rounds: int = 0


@dataclass(frozen=True)
class Round:
    """The accepted replies of a round, in a reproducible order: what a rule works on.

    Attributes
    ----------
    updates : Tensor
        (n, d): row i is ``global - local_i``, tied arrays once. The strategy owns it and may
        overwrite it.
    weights : Tensor or None
        float64 (n,) under ``weighting="examples"``.
    nodes : list of int
        The node id behind each row; after mixing, that of the row's own client.
    norms : Tensor or None
        float64 (n,): the norms of the uncompressed updates where all clients report them.
    memory : object
        The ``memory`` of the last round's result.
    byzantine_fraction : float
        The hostile share of the rows that is to be expected.
    generator : torch.Generator or None
        What to draw from.
    """

    updates: Tensor
    weights: Tensor | None
    nodes: list[int]
    norms: Tensor | None = None
    memory: Any = None
    byzantine_fraction: float = 0.25
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes
    ----------
    state : State
        The next one; the old one, but for its counts, where the round failed.
    arrays : ArrayRecord
        The new model; the old one where the round failed.
    result : Aggregate or None
        The rule's, None where it failed.
    failure : str
        Why the model was kept, empty where it moved.
    """

    state: State
    arrays: ArrayRecord
    result: Aggregate | None = None
    failure: str = ""


def take_step(
    state: State,
    sent: Sent,
    current: Round,
    buffers: NDArray[Any],
    rule: Rule,
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
) -> Outcome:
    """Aggregate the rows of a round and move the model.

    Parameters
    ----------
    state : State
        Stays as it is.
    sent : Sent
        What the rows are updates of.
    current : Round
        The rows; mixings may overwrite them.
    buffers : ndarray
        (n, num_buffers): combined by their coordinate-wise median.
    rule : Rule
        Mixings and rule.
    learning_rate, momentum, nesterov
        Of the server's SGD.

    Returns
    -------
    Outcome
        With the old state and model where the rule fails or the new model is not finite.
    """
    # Replies near the end of the range may overflow anywhere: the model is looked at below.
    with np.errstate(all="ignore"):
        try:
            result, drawn = aggregate(rule, current, state)
        except ValueError as error:
            failure = f"the rule failed: {error}"
            kept = replace(state, empty_rounds=state.empty_rounds + 1)
            return Outcome(kept, sent.model, None, failure)
        update = sent.spread(result.vector, state.ties)
        moved, velocity = descend(
            sent.own_layout.values, update, state.momentum, learning_rate, momentum, nesterov
        )
        moved = moved.astype(sent.layout.dtype, copy=False)
        Tied(sent.layout.directions, state.ties).level(moved)
    if not sent.layout.holds(moved):
        return Outcome(state, sent.model, result, "the new one is not finite")
    arrays = sent.layout.to_arrays(moved, middle_of(sent.layout, buffers))
    after = replace(state, generator=drawn, memory=result.memory, momentum=velocity, empty_rounds=0)
    return Outcome(after, arrays, result)


def aggregate(
    rule: Rule, current: Round, state: State, *, overwrite: bool = True
) -> tuple[Aggregate, Tensor]:
    """Apply a rule in a state; return its result and the generator's next state.

    Raises ``ValueError`` where the rule fails.
    """
    generator = torch.Generator()
    generator.set_state(state.generator)
    result = replace(rule, generator=generator)(
        current.updates,
        state.memory,
        weights=current.weights,
        norms=current.norms,
        nodes=current.nodes,
        overwrite=overwrite,
    )
    width = current.updates.shape[1]
    if result.vector.shape != (width,):
        raise ValueError(f"its vector has shape {tuple(result.vector.shape)}; allowed: ({width},)")
    return result, generator.get_state()


def descend(
    values: NDArray[Any],
    update: Tensor,
    velocity: Tensor | None,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
) -> tuple[NDArray[Any], Tensor | None]:
    """Return a model (d,) after a step of torch's SGD along an update, and the next momentum."""
    parameter = torch.from_numpy(values.copy())
    momenta = [None if velocity is None else velocity.cpu().to(parameter.dtype, copy=True)]
    # Not through torch.optim.SGD, whose constructor loads torch's compiler: four seconds.
    sgd(
        [parameter],
        [update.cpu().to(parameter.dtype)],
        momenta,
        lr=learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.0,
        dampening=0.0,
        maximize=False,
    )
    return parameter.numpy(), momenta[0]


def middle_of(layout: ModelLayout, buffers: NDArray[Any]) -> NDArray[Any]:
    """Return the clients' coordinate-wise median of a model's buffers."""
    if not buffers.size:
        return layout.buffer_values
    middle: NDArray[Any] = np.median(buffers, axis=0)
    shared = find_ties(layout.buffers, layout.buffer_values, buffers, {})
    Tied(layout.buffers, shared).level(middle)
    return middle
