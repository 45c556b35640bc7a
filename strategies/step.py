"""A round as a pure step: from one state to the next, or back to the old one."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators import Aggregate, Rule, project
from fl_bgmd.layout import ModelLayout
from fl_bgmd.shards import Crew

from .optimizer import descend
from .reputation import Reputation
from .sent import Sent
from .settings import Settings
from .stale import StaleUpdates
from .survey import Sketch, Survey
from .ties import Tied, find_ties


@dataclass(frozen=True)
class State:
    """All that the next round depends on; a checkpoint holds it.

    Attributes
    ----------
    seed : int
        Of the sampling of nodes, and of what rounds tell their clients to draw from.
    generator : Tensor
        The state of what blocks and buckets are drawn from.
    round : int
        The last round that was aggregated.
    memory : object
        The rule's: see :attr:`fl_bgmd.aggregators.Aggregate.memory`.
    optimizer : dict of str to Tensor
        Of the server's optimizer: torch's state of one parameter (d,).
    ties : dict of str to str
        Arrays that are one tensor: see :mod:`.ties`.
    empty_rounds : int
        How many rounds in a row have come to nothing.
    failure : str
        What the last round that left the model as it was came to, empty if none did.
    reputation : Reputation
        Evidence against nodes, and who sits out.
    last : Tensor or None
        (c,): the last aggregate, tied arrays once, where the rule or a mixing asks for it.
    stale : StaleUpdates
        What nodes sent last, where ``stale_updates`` asks for it.
    share : float or None
        The hostile share that was prepared for in the last round, where it is estimated.
    center : Tensor or None
        (d,): the model that the run began with, where the model is kept near it.
    """

    seed: int
    generator: Tensor
    round: int = 0
    memory: Any = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    empty_rounds: int = 0
    failure: str = ""
    reputation: Reputation = field(default_factory=Reputation)
    last: Tensor | None = None
    stale: StaleUpdates = field(default_factory=StaleUpdates)
    share: float | None = None
    center: Tensor | None = None

    def assumed(self, settings: Settings) -> float:
        """Return the hostile share to prepare for, as far as it is known."""
        return settings.first_share if self.share is None else self.share

    @classmethod
    def first(cls, seed: int) -> Self:
        """Return the state before the first round."""
        return cls(seed, torch.Generator().manual_seed(seed).get_state())

    def to_dict(self, rule: Rule) -> dict[str, Any]:
        """Return the state as tensors, numbers and dictionaries."""
        return {
            **vars(self),
            "memory": rule.to_state(self.memory),
            "last": rule.to_state(self.last),
            "optimizer": dict(self.optimizer),
            "ties": dict(self.ties),
            "reputation": self.reputation.to_dict(),
            "stale": self.stale.to_dict(),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], rule: Rule, device: torch.device) -> Self:
        """Rebuild the state from the output of :meth:`to_dict`, its memory on a device."""
        own = {each.name: found[each.name] for each in fields(cls)}
        for name in ("memory", "last"):
            own[name] = rule.from_state(own[name], device)
        own["reputation"] = Reputation(**own["reputation"])
        own["stale"] = StaleUpdates.from_dict(own["stale"])
        return cls(**own)

    def redrawn(self) -> Self:
        """Return the state with what it draws from drawn anew: nothing of earlier rounds tells."""
        fresh = torch.Generator()
        fresh.seed()
        return replace(self, generator=fresh.get_state())

    def settled(self, before: Self) -> bool:
        """Whether rules and mixings would do with the same rows what they did in ``before``."""
        kept = (self.memory, self.last, before.memory, before.last)
        return (
            all(each is None for each in kept)
            and self.share == before.share
            and torch.equal(self.generator, before.generator)
        )

    def emptied(self) -> Self:
        """Return the state after a round that came to nothing."""
        return replace(self, empty_rounds=self.empty_rounds + 1)


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
    root : Tensor or None
        (d,): the server's own update, where it has one.
    last : Tensor or None
        (d,): the last aggregate, where the rule or a mixing asks for it.
    step_size : float
        The server's learning rate in this round.
    """

    updates: Tensor
    weights: Tensor | None
    nodes: list[int]
    norms: Tensor | None = None
    memory: Any = None
    byzantine_fraction: float = 0.25
    generator: torch.Generator | None = None
    root: Tensor | None = None
    last: Tensor | None = None
    step_size: float = 1.0


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
        The rule's, None where there is none.
    failure : str
        Why the model was kept, empty where it moved.
    diverged : bool
        Whether the rule or the new model was refused, rather than too few replies accepted.
    fresh : int
        How many of the rows came in this round: the first ones.
    stale : int
        How many are behind them.
    survey : Survey or None
        Of the rows that came in this round; None where the step was not tried.
    """

    state: State
    arrays: ArrayRecord
    result: Aggregate | None = None
    failure: str = ""
    diverged: bool = False
    fresh: int = 0
    stale: int = 0
    survey: Survey | None = None

    @property
    def weights(self) -> list[float] | None:
        """What the rule gave each reply of the round, if it says."""
        if self.result is None or self.result.weights is None:
            return None
        return [float(share) for share in self.result.weights[: self.fresh]]


def take_step(
    state: State,
    sent: Sent,
    current: Round,
    stale: StaleUpdates,
    buffers: NDArray[Any],
    rule: Rule,
    settings: Settings,
    seed: int,
    crew: Crew | None = None,
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
    stale : StaleUpdates
        What nodes have sent last, once the round has succeeded.
    buffers : ndarray
        (n, num_buffers), of the n rows that came in this round, the first ones: combined by their
        coordinate-wise median.
    rule : Rule
        Mixings and rule.
    settings : Settings
        Those of the server's optimizer count, and whether distances are wanted.
    seed : int
        What is drawn from to keep track of rows that are overwritten.
    crew : Crew, optional
        Who holds shards of the rows while the rule works on them.

    Returns
    -------
    Outcome
        With the old state and model where the rule fails or the new model is not finite.

    Raises
    ------
    ValueError
        For a learning rate that is none.
    """
    rate = settings.learning_rate(state.round)
    counts = len(buffers), len(current.nodes) - len(buffers)
    # Replies near the end of the range may overflow anywhere: the model is looked at below.
    with np.errstate(all="ignore"):
        look = _look(current.updates[: counts[0]], rule, settings, seed)
        try:
            result, drawn = aggregate(rule, current, state, rate, crew)
        except ValueError as error:
            why = f"the rule failed: {error}"
            return Outcome(state.emptied(), sent.model, None, why, True, survey=look(None))
        survey = look(result.vector)
        del look
        share = current.byzantine_fraction if settings.estimated else None
        del current
        moved, optimizer = descend(
            sent.own_layout.values,
            sent.spread(result.vector, state.ties),
            state.optimizer,
            lambda parameters: settings.optimizer(parameters, rate),
        )
        center = kept_near(state, sent, settings)
        if settings.projection_radius:
            moved = project(torch.from_numpy(moved), settings.projection_radius, center).numpy()
        moved = moved.astype(sent.layout.dtype, copy=False)
        Tied(sent.layout.directions, state.ties).level(moved)
    if not sent.layout.holds(moved):
        why = "the new one is not finite"
        return Outcome(state.emptied(), sent.model, result, why, True, *counts, survey)
    arrays = sent.layout.to_arrays(moved, middle_of(sent.layout, buffers))
    after = replace(
        following(state, rule, result, drawn, share),
        optimizer=optimizer,
        empty_rounds=0,
        stale=stale,
        center=center,
    )
    return Outcome(after, arrays, result, "", False, *counts, survey)


def _look(
    rows: Tensor, rule: Rule, settings: Settings, seed: int
) -> Callable[[Tensor | None], Survey]:
    """Return what says, of the aggregate or None, how the rows of the round relate to it."""
    if rule.mixings:  # they overwrite the rows
        return Sketch.of(rows, seed, distances=settings.verdict_distances).survey
    return lambda vector: Survey.of(rows, vector if settings.verdict_distances else None)


def following(
    state: State, rule: Rule, result: Aggregate, drawn: Tensor, share: float | None
) -> State:
    """Return a state with what a rule's result, and an estimate, leave to the next round."""
    last = result.vector if rule.uses("last") else None
    return replace(state, generator=drawn, memory=result.memory, last=last, share=share)


def kept_near(state: State, sent: Sent, settings: Settings) -> Tensor | None:
    """Return the center of the ball that the model stays in, None for zero and for no ball."""
    if not settings.projection_radius or settings.projection_center == "origin":
        return None
    if state.center is not None:
        return state.center
    # Until a round has moved it the model is the one that the run began with.
    return torch.from_numpy(sent.own_layout.values.copy())


def aggregate(
    rule: Rule, current: Round, state: State, step_size: float, crew: Crew | None = None
) -> tuple[Aggregate, Tensor]:
    """Apply a rule in a state; return its result and the generator's next state.

    ``step_size`` is the server's learning rate in the round.

    Raises ``ValueError`` where the rule fails.
    """
    generator = torch.Generator()
    generator.set_state(state.generator)
    share = current.byzantine_fraction
    with nullcontext(current.updates) if crew is None else crew.holding(current.updates) as rows:
        result = replace(rule, generator=generator, byzantine_fraction=share)(
            rows,
            state.memory,
            weights=current.weights,
            norms=current.norms,
            nodes=current.nodes,
            root=current.root,
            last=state.last,
            step_size=step_size,
            overwrite=True,
        )
    width = current.updates.shape[1]
    if result.vector.shape != (width,):
        raise ValueError(f"its vector has shape {tuple(result.vector.shape)}; allowed: ({width},)")
    return result, generator.get_state()


def middle_of(layout: ModelLayout, buffers: NDArray[Any]) -> NDArray[Any]:
    """Return the clients' coordinate-wise median of a model's buffers."""
    if not buffers.size:
        return layout.buffer_values
    middle: NDArray[Any] = np.median(buffers, axis=0)
    shared = find_ties(layout.buffers, layout.buffer_values, buffers, {})
    Tied(layout.buffers, shared).level(middle)
    return middle
