"""What the aggregation rules return: frozen dataclasses, one per family of rules."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .memory import BlockMemory
from .rows import combine, result_dtype, vector_norm


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
    memory : object or None
        What the rule is to be given in the next round; None where it remembers nothing.
    """

    vector: Tensor
    weights: Tensor | None = None
    memory: Any = field(default=None, kw_only=True)

    figures: ClassVar[tuple[str, ...]] = ()
    """Attributes that say how the rule fared: numbers, or None where there is nothing to say."""

    @property
    def diagnostics(self) -> dict[str, float]:
        """The figures that there are, by their names in kebab-case."""
        found = {name.replace("_", "-"): getattr(self, name) for name in self.figures}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class FilteredAggregate(Aggregate):
    """The result of a rule that drops rows.

    Attributes
    ----------
    kept : Tensor
        bool (n,): the rows that were not dropped.
    """

    kept: Tensor

    figures: ClassVar[tuple[str, ...]] = ("dropped",)

    @property
    def dropped(self) -> int:
        """How many rows were dropped."""
        return int((~self.kept).sum())


@dataclass(frozen=True, kw_only=True)
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

    figures: ClassVar[tuple[str, ...]] = ("iterations", "gap")


@dataclass(frozen=True, kw_only=True)
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

    figures: ClassVar[tuple[str, ...]] = (
        *GeometricMedian.figures,
        "residual_ratio",
        "memory_norm",
        "curvature",
    )

    @property
    def memory_norm(self) -> float | None:
        """The norm of what waits."""
        return None if self.memory is None else vector_norm(self.memory.vector.flatten())

    @property
    def curvature(self) -> float | None:
        """What the robust memory has measured."""
        return None if self.memory is None else self.memory.curvature


def figure_names(kind: type[Aggregate] = Aggregate) -> set[str]:
    """Return the names of all figures that a result of any rule may have."""
    own = {name.replace("_", "-") for name in kind.figures}
    return own.union(*(figure_names(derived) for derived in kind.__subclasses__()))


def average_of(kept: NDArray[np.bool_], updates: Tensor) -> FilteredAggregate:
    """Return the mean of the rows (n, d) that are kept, (n,)."""
    weights = kept / kept.sum()
    vector = combine(weights, updates, result_dtype(updates))
    return FilteredAggregate(vector, torch.from_numpy(weights), kept=torch.from_numpy(kept))
