"""The memory of the block rule: what the coordinates outside the block have waited for.

The printed memories keep the residuals of all rows, corrupt ones included: attacks enter. And they
replay every round that a coordinate has waited in full: where clients train far in a round, that is
the same way many times, and the model diverges. The ``robust`` memory, this project's own, takes in
a robust location of the rows with weights of its own (:mod:`fl_bgmd.aggregators.location`), and
fades as fast as the curvature that it has measured asks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rows import empty, stacked

_LARGEST_FACTOR = 1e30
_PIECE = 2**16  # values that are widened to float64 at a time

SMOOTHING = 0.9
"""What earlier rounds count for in the curvature, each as much of the next one."""


@dataclass(frozen=True)
class BlockMemory:
    """What one round of the block rule leaves to the next.

    Attributes
    ----------
    vector : Tensor
        What waits: (d,), zero in the block that moved last; under ``per-client`` (m, d), a row for
        each of ``nodes``, or of the rows that were given.
    block : Tensor or None
        int64 (k,): the coordinates that moved last, under ``robust``.
    said : Tensor or None
        (k,): a robust location of what the rows had there.
    waited : Tensor or None
        (k,): what had waited there, None if nothing had.
    step : Tensor or None
        (k,): how far the rule went there.
    slope : float
        By which share of a step what the rows say has fallen, over the rounds; steps that went
        further, and later ones, count for more.
    reach : float
        How far those steps went, in the units of the rows: 0 before two rounds have shown any.
    nodes : tuple of int or None
        Under ``per-client``: whose rows they are, where that is known.
    step_size : float or None
        The server's step in the round that left it; None: that of any round.
    """

    vector: Tensor
    block: Tensor | None = None
    said: Tensor | None = None
    waited: Tensor | None = None
    step: Tensor | None = None
    slope: float = 0.0
    reach: float = 0.0
    nodes: tuple[int, ...] | None = None
    step_size: float | None = None

    def at(self, step_size: float) -> "BlockMemory":
        """Return the memory for a round of another step size, above 0.

        What waits is a way that the model has yet to go, as in Algorithm 1, which has the step
        size inside the memory (``G <- gamma_t G + m``): a longer step needs less of it. What the
        rows have said stays, and the curvature is that of the new step.
        """
        before = replace(self, step_size=step_size)
        if self.step_size is None or self.step_size == step_size:
            return before
        factor = min(max(self.step_size / step_size, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)

        def change(values: Tensor) -> Tensor:
            limit = torch.finfo(values.dtype).max
            return (values * factor).clamp_(-limit, limit)

        return replace(
            before._changed(change, self.block),
            said=self.said,
            slope=self.slope / factor,
            reach=self.reach * factor,
        )

    def of(self, nodes: Sequence[int]) -> "BlockMemory":
        """Return the rows of these nodes, zeros for those who have none."""
        assert self.nodes is not None
        place = {node: i for i, node in enumerate(self.nodes)}
        rows = empty((len(nodes), self.vector.shape[1]), self.vector, self.vector.dtype)
        for row, node in zip(rows, nodes, strict=True):
            if node in place:
                row.copy_(self.vector[place[node]])
            else:
                row.zero_()
        return BlockMemory(rows, nodes=tuple(nodes))

    def with_rows_of(self, before: "BlockMemory | None") -> "BlockMemory":
        """Return these rows and, of nodes that have none here, those they had before."""
        if before is None or before.nodes is None or self.nodes is None:
            return self
        others = [i for i, node in enumerate(before.nodes) if node not in self.nodes]
        if not others:
            return self
        nodes = (*self.nodes, *(before.nodes[i] for i in others))
        sources = [*self.vector, *(before.vector[i] for i in others)]
        return BlockMemory(stacked(sources, self.vector), nodes=nodes)

    @property
    def curvature(self) -> float | None:
        """``slope`` where it is above 0, else 0; None if nobody knows yet."""
        return max(self.slope, 0.0) if self.reach > 0 else None

    def scaled(self, factor: float) -> "BlockMemory":
        """Return the memory of rows that were multiplied by ``factor``."""
        memory = self._changed(lambda values: values * factor, self.block)
        return replace(memory, reach=self.reach * factor)

    def to(self, device: torch.device) -> "BlockMemory":
        """Return the memory on a device."""
        return self._changed(
            lambda values: values.to(device), None if self.block is None else self.block.to(device)
        )

    def _changed(self, change: Callable[[Tensor], Tensor], block: Tensor | None) -> "BlockMemory":
        said, waited, step = (
            None if x is None else change(x) for x in (self.said, self.waited, self.step)
        )
        return replace(
            self, vector=change(self.vector), block=block, said=said, waited=waited, step=step
        )


def after_round(
    memory: BlockMemory | None,
    waits: Tensor,
    block: Tensor,
    said: Tensor,
    waited: Tensor | None,
    step: Tensor,
) -> BlockMemory:
    """Return the robust memory that a round leaves.

    Parameters
    ----------
    memory : BlockMemory or None
        The one that the round began with.
    waits : Tensor
        (d,): its vector plus the round's robust location of the rows. Becomes the next vector.
    block, said, waited, step : Tensor
        (k,): where the round moved, a robust location of what the rows had there, what had waited
        there (None: nothing), and how far it went.

    Notes
    -----
    A coordinate that had moved in every round instead of waiting would have gone less far each
    time. So what waits fades by :func:`fading`, which makes a coordinate that waits the usual
    ``d / k`` rounds go as far as ``1 / curvature`` of its steps at most, and as far as all of them
    where that is more.
    """
    slope, reach = 0.0, 0.0
    if memory is not None and memory.block is not None:
        # Nothing waited where the last step went: what is there now is what the rows say now.
        waits[block] = said
        slope, reach = _measured(memory, waits[memory.block])
    after = BlockMemory(waits, block, said, waited, step, slope, reach)
    kept = fading(after.curvature, len(waits) / len(block))
    if kept < 1.0:
        waits *= kept
    waits.index_fill_(0, block, 0.0)
    return after


def _measured(memory: BlockMemory, now: Tensor) -> tuple[float, float]:
    """Return slope and reach with those of the last step.

    Along what had waited: unlike the step, that shares no noise with what the rows said then, so
    that noise does not pass for curvature. Along the step where nothing had waited.
    """
    assert memory.said is not None
    assert memory.step is not None
    along = memory.step
    if memory.waited is not None and memory.waited.any():
        along = memory.waited
    earlier = SMOOTHING * memory.reach**2
    length = earlier + max(_dot(memory.step, along), 0.0)
    if length == 0.0:
        return 0.0, 0.0
    fall = earlier * memory.slope + _dot(memory.said - now, along)
    return fall / length, math.sqrt(length)


def fading(curvature: float | None, rounds: float) -> float:
    """Return the factor ``q``, 0 to 1, by which what waits fades in a round.

    With ``1 + q + ... + q^(rounds - 1) = 1 / curvature``, and 1 where the curvature is too small to
    ask for any.
    """
    if curvature is None or curvature * rounds <= 1.0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        reached = (1 - middle**rounds) / (1 - middle)
        low, high = (low, middle) if reached * curvature > 1 else (middle, high)
    return low


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors, in float64."""
    pieces = [slice(start, start + _PIECE) for start in range(0, len(a), _PIECE)]
    return float(sum(a[piece].double() @ b[piece].double() for piece in pieces))
