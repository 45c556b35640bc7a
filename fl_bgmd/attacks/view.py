"""What an attack may ask for by the names of its parameters, and what that says of its knowledge.

=================== ========== ====================================================================
``update``          own        (d,): the update that the client trained honestly
``generator``       own        its own randomness
``num_clients``     own        n, which is public
``num_byzantine``   own        f, which is public
``past``            own        its own updates of earlier rounds, at most as many as its option
                               ``rounds`` says, oldest first
``colluders``       colluders  (m, d): the updates of the hostile clients that collude
``colluder_ids``    colluders  their partition ids
``honest``          all        (h, d): the updates of the honest clients
``honest_ids``      all        their partition ids
``memory``          colluders  a dictionary that it finds in the next round as it left it
``last_step``       colluders  (d,): how far the server moved in the round before, None in the first
``pipeline``        rule       :class:`Pipeline`: what the server would make of a lie
``images``          data       (B, H, W) or (B, H, W, C) uint8: the images that the client trains
                               on; under an option ``normalized`` (B, C, H, W) float32, as the
                               model sees them
``labels``          data       (B,) int64: their labels
``num_classes``     data       how many labels there are
``player``          data       which of the clients who play the attack in this round it is, from 0
``rng``             data       its own randomness
=================== ========== ====================================================================

An attack on the update returns what is sent instead of it, (d,), or (m, d) where it takes
``colluders``: each its own. An attack on the data returns what it takes of ``images`` and
``labels``, changed: one of them, or both as a pair.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from torch import Generator, Tensor

Knowledge = Literal["own", "colluders", "all", "rule"]

OMNISCIENT: tuple[Knowledge, ...] = ("all", "rule")
"""Who sees the honest clients' updates."""


class Pipeline(Protocol):
    """The deployed mixings and rule, with what they remember and will draw, as they stand."""

    def __call__(self, lies: Tensor, rounds: int = 1) -> Tensor:
        """Return by what the server would move, (d,); nothing changes.

        Parameters
        ----------
        lies : Tensor
            (d,): what all who play the attack send, or (m, d): each its own, in the order of their
            partitions. All others send what they send now.
        rounds : int
            In how many rounds, each as this one.
        """


@dataclass(frozen=True)
class View:
    """What there is to see when a hostile client decides what to send.

    An attack is given what it asks for and no more: see :meth:`limited_to`.

    Attributes
    ----------
    update : Tensor
        (d,): the update it trained honestly. Of clients that collude it is the first one's.
    generator : torch.Generator
        Its own randomness.
    num_clients, num_byzantine : int
        n and f, which are public.
    past : tuple of Tensor
        Its own true updates of earlier rounds, oldest first.
    colluders : Tensor or None
        (m, d): the true updates of the hostile clients whose attack is played with more than their
        own, in the order of their partitions.
    honest : Tensor or None
        (h, d): the updates of the honest clients.
    colluder_ids, honest_ids : tuple of int
        The partition ids of the rows of ``colluders`` and ``honest``.
    memory : dict
        What the attack has noted in earlier rounds, for it to change: names to plain values and
        tensors, which a checkpoint can hold.
    last_step : Tensor or None
        (d,): the model of the round before minus this one's, an update as the server took it, which
        everybody has seen. None in the first round.
    pipeline : Pipeline or None
        None where there is no rule to be tried.
    """

    update: Tensor
    generator: Generator
    num_clients: int
    num_byzantine: int
    past: tuple[Tensor, ...] = ()
    colluders: Tensor | None = None
    honest: Tensor | None = None
    colluder_ids: tuple[int, ...] = ()
    honest_ids: tuple[int, ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    last_step: Tensor | None = None
    pipeline: Pipeline | None = None

    def limited_to(self, names: Collection[str]) -> dict[str, Any]:
        """Return what an attack that asks for these is given, by name, and nothing else."""
        return {name: getattr(self, name) for name in names}


ON_UPDATES = tuple(field.name for field in fields(View))
ON_DATA = ("images", "labels", "num_classes", "player", "rng")

TELLS: Mapping[str, Knowledge] = {
    "pipeline": "rule",
    "honest": "all",
    "honest_ids": "all",
    "colluders": "colluders",
    "colluder_ids": "colluders",
}
"""What tells who an attack is played with, the most telling first."""

NEEDS_GRID = {"memory": "past for one's own updates", "last_step": "update alone"}
"""What the grid keeps for those who collude, and what there is without it."""
