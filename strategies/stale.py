"""What clients that are not asked sent last: a rule that sees it too sees all clients, not a draw.

When a tenth of a hundred clients is sampled, of whom a fifth lies, half of a draw or more lies in
every fortieth round, and no rule holds up against that. With the last update of the others
behind the fresh ones the share of hostile rows is that of hostile clients, whatever the draw:
delayed momentum aggregation (DeMoA, arXiv 2509.02970), whose updates are the clients' momenta
(:class:`fl_bgmd.mods.MomentumMod`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from fl_bgmd.layout import ArraySpec
from fl_bgmd.mapped import folder_of

from .ties import Tied


@dataclass(frozen=True)
class Heard:
    """The last accepted update of a node.

    Attributes
    ----------
    node : int
        Its id.
    round : int
        When it came.
    examples : float
        How many examples it reported.
    norm : float or None
        The norm of its uncompressed update, where it reported that.
    row : Tensor
        (c,) on the CPU: the update as the server decoded it, tied arrays once.
    """

    node: int
    round: int
    examples: float
    norm: float | None
    row: Tensor

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.row.numel() * self.row.element_size()


@dataclass(frozen=True)
class StaleUpdates:
    """The last updates of nodes, one each, those heard of least recently first.

    It is part of the state: it changes by the rounds that succeed, and never in place.
    """

    heard: tuple[Heard, ...] = ()

    def usable(self, number: int, rounds: int) -> Self:
        """Return what is at most ``rounds`` rounds old in a round."""
        return type(self)(tuple(h for h in self.heard if number - h.round <= rounds))

    def without(self, nodes: Collection[int]) -> Self:
        """Return it without what these nodes sent."""
        return type(self)(tuple(h for h in self.heard if h.node not in nodes))

    def after(self, fresh: Sequence[Heard], most_bytes: int) -> Self:
        """Return it with the fresh updates in the place of what their nodes sent before.

        Of more than ``most_bytes`` those heard of least recently go, of a round the first.
        """
        kept = [*self.without({h.node for h in fresh}).heard, *fresh]
        excess, first = sum(h.num_bytes for h in kept) - most_bytes, 0
        while excess > 0:
            excess -= kept[first].num_bytes
            first += 1
        return type(self)(tuple(kept[first:]))

    def retied(
        self, specs: Sequence[ArraySpec], old: Mapping[str, str], new: Mapping[str, str]
    ) -> Self:
        """Return it with other arrays tied: rows (c,) of the ``new`` width; see :mod:`.ties`."""
        before, now = Tied(specs, old), Tied(specs, new)
        return type(self)(
            tuple(replace(h, row=now.merge(before.spread(h.row)[None])[0]) for h in self.heard)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it for a checkpoint."""
        names = [each.name for each in fields(Heard)]
        return {name: [getattr(h, name) for h in self.heard] for name in names}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Rebuild the updates from the output of :meth:`to_dict`."""
        columns = (found[each.name] for each in fields(Heard))
        return cls(tuple(Heard(*values) for values in zip(*columns, strict=True)))


def heard(
    number: int,
    rows: Tensor,
    nodes: Sequence[int],
    examples: Sequence[float],
    norms: Tensor | None,
) -> list[Heard]:
    """Return the rows (n, c) of a round as what its nodes sent last: copies, which nobody changes.

    ``norms`` (n,) are those that all of them report, or None.
    """
    reported = [None] * len(nodes) if norms is None else norms.tolist()
    return [
        Heard(node, number, count, norm, row.detach().to("cpu", copy=True))
        for node, count, norm, row in zip(nodes, examples, reported, rows, strict=True)
    ]


def behind(rows: Tensor, stale: Sequence[Heard]) -> Tensor:
    """Return rows (n, c) with those of ``stale`` behind them, in their order, on one device.

    Where the file that the rows are in has room for these, too, they are written into it.
    """
    if not stale:
        return rows
    n, c = rows.shape
    count, room = n + len(stale), rows.untyped_storage().nbytes() // rows.element_size()
    if folder_of(rows) is not None and rows.is_contiguous() and count * c <= room:
        rows = rows.as_strided((count, c), (c, 1), 0)
        for i, other in enumerate(stale, start=n):
            rows[i] = other.row
        return rows
    return torch.cat([rows, torch.stack([h.row for h in stale]).to(rows.device)])
