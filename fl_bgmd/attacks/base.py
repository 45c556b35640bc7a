"""What an attack is and what it may know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Knowledge = Literal["own", "colluders", "all", "rule"]
Place = Literal["update", "data"]

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Corruption = Callable[[Images, Labels, float, int, np.random.Generator], tuple[Images, Labels]]

PRESETS = ("paper", "authors-code")

OMNISCIENT: tuple[Knowledge, ...] = ("all", "rule")
"""Who sees the honest clients' updates."""


@dataclass(frozen=True)
class View:
    """What a hostile client sees when it decides what to send: what its attack declares, no more.

    Attributes
    ----------
    update : Tensor
        (d,): the update it trained honestly. Clients that collude send the same lie: here it is the
        first one's.
    generator : torch.Generator
        Its own randomness.
    num_clients, num_byzantine : int
        n and f, which are public.
    past : tuple of Tensor
        Its own true updates of earlier rounds, oldest first; only for ``own`` attacks with
        ``remembers``.
    colluders : Tensor or None
        (m, d): the true updates of the hostile clients whose attack is played with more than their
        own, in the order of their partitions. None unless the attack knows ``colluders`` or more.
    honest : Tensor or None
        (h, d): the updates of the honest clients. None unless the attack knows ``all`` or ``rule``.
    colluder_ids, honest_ids : tuple of int
        The partition ids of the rows of ``colluders`` and ``honest``.
    memory : dict
        What the attack has noted in earlier rounds, for it to change: names to plain values and
        tensors, which a checkpoint can hold. Empty unless the attack ``remembers`` and knows more
        than its own.
    outcome : callable or None
        ``(lie, rounds) -> (d,)``: by what the server would move in so many rounds, each as this
        one, if all who play the attack sent ``lie`` (d,) and all others what they send now. None
        unless the attack knows ``rule``, and where there is no rule to be tried.
    """

    update: Tensor
    generator: torch.Generator
    num_clients: int
    num_byzantine: int
    past: tuple[Tensor, ...] = ()
    colluders: Tensor | None = None
    honest: Tensor | None = None
    colluder_ids: tuple[int, ...] = ()
    honest_ids: tuple[int, ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    outcome: Callable[[Tensor, int], Tensor] | None = None

    def limited_to(self, knows: Knowledge, *, remembers: bool = False) -> "View":
        """Return the view without what an attack that declares no more must not see."""
        colludes, omniscient = knows != "own", knows in OMNISCIENT
        return replace(
            self,
            past=self.past if remembers and not colludes else (),
            colluders=self.colluders if colludes else None,
            colluder_ids=self.colluder_ids if colludes else (),
            honest=self.honest if omniscient else None,
            honest_ids=self.honest_ids if omniscient else (),
            memory=self.memory if remembers and colludes else {},
            outcome=self.outcome if knows == "rule" else None,
        )


@dataclass(frozen=True)
class Attack:
    """An entry of the laboratory.

    Attributes
    ----------
    name : str
        Kebab-case.
    source : str
        Where it was described.
    place : {"update", "data"}
        Whether the update is replaced after training or the examples before it.
    knows : {"own", "colluders", "all", "rule"}
        What a hostile client sees; ``rule`` is all updates and what the server would make of a lie.
        ``own`` attacks run on the client, on a SuperNode as in a simulation; the others are played
        by a grid that sees all replies.
    knob : str
        What ``strength`` means, with its unit; empty where there is nothing to set.
    strength : float
        The paper's value of the knob.
    authors_code : dict
        The value in the BGMD authors' code by data set (``""``: all) where it is not the paper's.
    sweep : tuple of float
        Strengths of a full comparison.
    remembers : bool
        Whether it needs what came before: the client's earlier updates, as many as its strength,
        or, with more knowledge than ``own``, its :attr:`View.memory`.
    apply : callable or None
        ``(view, strength) -> (d,)``, for update attacks.
    corrupt : callable or None
        ``(images, labels, strength, num_classes, rng) -> (images, labels)`` on raw uint8 images
        and int64 labels, for data attacks; leaves its input alone.
    """

    name: str
    source: str
    place: Place = "update"
    knows: Knowledge = "own"
    knob: str = ""
    strength: float = 0.0
    authors_code: Mapping[str, float] = field(default_factory=dict)
    sweep: tuple[float, ...] = (0.0,)
    remembers: bool = False
    apply: Callable[[View, float], Tensor] | None = None
    corrupt: Corruption | None = None

    def value(self, strength: float, preset: str = "paper", dataset: str = "") -> float:
        """Return the knob's value: ``strength``, or the preset's where that is 0."""
        if strength:
            return strength
        if preset == "authors-code":
            common = self.authors_code.get("", self.strength)
            return self.authors_code.get(dataset, common)
        return self.strength
