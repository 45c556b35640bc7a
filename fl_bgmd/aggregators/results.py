"""What the aggregation rules return: frozen dataclasses, one per family of rules."""

from dataclasses import dataclass

from torch import Tensor

from .memory import BlockMemory


@dataclass(frozen=True)
class Aggregate:
    """The result of a rule.

    Attributes
    ----------
    vector : Tensor
        The aggregate, (d,), in the dtype of the input but never less precise than float32, on
        the input's device.
    weights : Tensor or None
        float64 (n,) on the CPU: ``vector = sum_i weights[i] * updates[i]``; None where the result
        is not a weighted sum of the rows.
    """

    vector: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class FilteredAggregate(Aggregate):
    """The result of a rule that drops rows.

    Attributes
    ----------
    kept : Tensor
        bool (n,): the rows that were not dropped.
    """

    kept: Tensor


@dataclass(frozen=True)
class GeometricMedian(Aggregate):
    """A geometric median with the proof of its accuracy.

    Attributes
    ----------
    gap : float
        Certified relative suboptimality: ``objective <= (1 + gap) * optimum``; the epsilon of
        Definition 3 in Acharya et al. (BGMD).
    iterations : int
        Steps taken by the solver.
    objective : float
        ``sum_i weights_i ||vector - x_i||`` with the weights given to the rule.
    """

    gap: float
    iterations: int
    objective: float


@dataclass(frozen=True)
class BlockGeometricMedian(GeometricMedian):
    """The result of the block rule; ``weights``, ``gap`` and ``objective`` are those of the block.

    Attributes
    ----------
    memory : BlockMemory or None
        For the next round to be given; its ``vector`` is what waits. None under ``none``.
    block : Tensor
        int64 (k,): the chosen coordinates, ascending.
    residual_ratio : float
        ``||G - C_k(G)||_F^2 / ||G||_F^2`` (Lemma 1), 0 when G is 0.
    """

    memory: BlockMemory | None
    block: Tensor
    residual_ratio: float
