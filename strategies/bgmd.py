"""Block coordinate geometric median descent."""

from typing import Any

import torch
from flwr.app import MetricRecord
from torch import Tensor

from fl_bgmd.aggregators import (
    Aggregate,
    BlockGeometricMedian,
    BlockMemory,
    block_geometric_median,
)
from fl_bgmd.aggregators.block import MEMORY_RULES, MIN_BLOCK_SIZE, SCORES
from fl_bgmd.aggregators.geometric_median import SOLVERS
from fl_bgmd.aggregators.rows import vector_norm
from fl_bgmd.aggregators.sampling import SELECTIONS

from .checks import require
from .intake import Round
from .robust import RobustStrategy


class BGMD(RobustStrategy):
    """Block coordinate geometric median descent (BGmD): Algorithms 1 and 2 of Acharya et al.

    Each round aggregates a block of the coordinates and keeps the rest in a memory. The default
    memory is this project's: the printed ones let attacks in and diverge where clients train far in
    a round (see :func:`fl_bgmd.aggregators.block_geometric_median`).

    Parameters
    ----------
    block_fraction : float
        Above 0, at most 1.
    min_block_size : int
        The block has at least this many coordinates, all of fewer. 1 or more.
    selection : {"sample", "top-k", "uniform"}
        How the block is chosen.
    score : {"clipped", "squared-norm", "norm"}
        What a coordinate is worth.
    memory : {"robust", "mean", "per-client", "none"}
        What becomes of the coordinates outside the block. ``robust`` takes in a robust location of
        the updates and fades as the measured curvature asks; ``mean`` is the paper's.
    tol, solver
        Of the block's median, certified: see :func:`fl_bgmd.aggregators.geometric_median`.
    **options
        Those of :class:`RobustStrategy`.
    """

    weights_tell = True

    def __init__(
        self,
        *,
        block_fraction: float = 0.1,
        min_block_size: int = MIN_BLOCK_SIZE,
        selection: str = "sample",
        score: str = "clipped",
        memory: str = "robust",
        tol: float = 1e-6,
        solver: str = "gram",
        **options: Any,
    ) -> None:
        require("block_fraction", block_fraction, 0 < block_fraction <= 1, "above 0 to 1")
        require("min_block_size", min_block_size, min_block_size >= 1, "1 or more")
        require("selection", selection, selection in SELECTIONS, ", ".join(SELECTIONS))
        require("score", score, score in SCORES, ", ".join(SCORES))
        require("memory", memory, memory in MEMORY_RULES, ", ".join(MEMORY_RULES))
        require("tol", tol, tol > 0, "above 0")
        require("solver", solver, solver in SOLVERS, ", ".join(SOLVERS))
        self.can_share_coordinates = memory == "none"
        super().__init__(**options)
        if memory == "per-client" and self.mixing == "bucketing":
            raise ValueError(
                "memory is 'per-client' with mixing 'bucketing'; allowed with it: none, "
                "nearest-neighbor, since a bucket has no client of its own"
            )
        self.block_fraction = block_fraction
        self.min_block_size = min_block_size
        self.selection = selection
        self.score = score
        self.memory_rule = memory
        self.tol = tol
        self.solver = solver
        self._memory: BlockMemory | None = None
        self._client_memory: dict[int, Tensor] = {}

    def drawn(self) -> list[str]:
        """Return what the server draws: the block too, unless it is the strongest coordinates."""
        return super().drawn() if self.selection == "top-k" else ["blocks", *super().drawn()]

    def aggregate(self, current: Round) -> Aggregate:
        """Return the geometric median of the round's block and keep the memory."""
        result = block_geometric_median(
            current.updates,
            self._memory_for(current),
            block_fraction=self.block_fraction,
            min_block_size=self.min_block_size,
            selection=self.selection,
            score=self.score,
            memory_rule=self.memory_rule,
            generator=self.generator,
            tol=self.tol,
            solver=self.solver,
        )
        if self.memory_rule == "per-client" and result.memory is not None:
            rows = result.memory.vector.unbind(0)
            self._client_memory.update(zip(current.nodes, rows, strict=True))
        else:
            self._memory = result.memory
        return result

    def describe(self, result: Aggregate, metrics: MetricRecord) -> None:
        """Report the residual ratio, the norm of the memory and the curvature it has seen."""
        assert isinstance(result, BlockGeometricMedian)
        metrics["residual-ratio"] = result.residual_ratio
        if result.memory is not None:
            metrics["memory-norm"] = vector_norm(result.memory.vector.flatten())
            if result.memory.curvature is not None:
                metrics["curvature"] = result.memory.curvature

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on."""
        return super().state_dict() | {
            "memory": None if self._memory is None else dict(vars(self._memory)),
            "client-memory": dict(self._client_memory),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        kept = state["memory"]
        self._memory = None if kept is None else BlockMemory(**kept).to(self.device)
        self._client_memory = {
            node: memory.to(self.device) for node, memory in state["client-memory"].items()
        }

    def forget(self) -> None:
        """Drop the memory: the coordinates have become others."""
        self._memory = None
        self._client_memory = {}

    def _memory_for(self, current: Round) -> BlockMemory | None:
        """Return the memory in the shape the rule wants; clients not seen before have none."""
        if self.memory_rule != "per-client":
            return self._memory
        if not self._client_memory:
            return None
        empty = torch.zeros_like(current.updates[0])
        rows = [self._client_memory.get(node, empty) for node in current.nodes]
        return BlockMemory(torch.stack(rows))


class QBGMD(BGMD):
    """BGMD whose clients send quantised updates: the slides' QBGMD.

    Lemma 4: with C_k the choice of the block and Q_s a quantiser, ``C_k(Q_s(x))`` contracts like
    C_k alone with ``delta = (1 - beta_{k,s}) k / d``, so the theorems of BGMD hold. Clients need
    :class:`fl_bgmd.mods.CompressionMod`.

    Parameters
    ----------
    compressor : str
        See :func:`fl_bgmd.compression.build_compressor`.
    error_feedback : bool
        Off by default: the slides' clients keep nothing.
    **options
        Those of :class:`BGMD`.
    """

    def __init__(
        self, *, compressor: str = "qsgd", error_feedback: bool = False, **options: Any
    ) -> None:
        require("compressor", compressor, compressor != "none", "a compressor")
        super().__init__(compressor=compressor, error_feedback=error_feedback, **options)


class FedBGMD(QBGMD):
    """QBGMD over several local steps: the slides' FL-BGMD, Algorithm 3.

    Clients train locally and send ``c_i = Q(x_t - y_i)`` (line 11); the server forms
    ``P = G + M`` (line 24), chooses a block of it (line 25), keeps the rest in its memory (line 26)
    and moves the model by the geometric median of the block (lines 27 and 28). The printed memory
    has a row for each client, ``memory="per-client"``, which lets redrawn attackers in and
    diverges where clients train far in a round; the default is this project's, whose robust
    location of the ``c_i`` takes the place of the rows.
    """
