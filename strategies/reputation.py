"""Who is to sit out some rounds: evidence against nodes, gathered round by round."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

NEAR_ZERO = 0.1
"""A weight below this share of the round's median weight may count as evidence against its node."""

FAR_OUT = 10.0
"""It does if the node's update is longer than the round's median update by this factor."""


def far_out(norms: Mapping[int, float]) -> set[int]:
    """Return the nodes whose updates are longer than the median one by :data:`FAR_OUT`.

    The median is above 0, or there are none.
    """
    middle = float(np.median(list(norms.values()))) if norms else 0.0
    return {node for node, norm in norms.items() if norm > FAR_OUT * middle > 0}


@dataclass(frozen=True)
class Reputation:
    """Evidence against nodes, and the bench.

    A node gets one count for a round in which its reply is rejected, or has next to no weight
    because it is far out, and loses all of them in a round in which it does well: only
    ``bench_after`` such rounds in a row put it on the bench, for ``bench_rounds`` rounds.
    Adversaries that move from node to node leave each of them before that. Weights alone are no
    evidence: a minority that repeats one honest update takes everybody else's. Nobody but the node
    itself makes its update long, and a minority cannot move the median length beyond those of the
    honest.

    Attributes
    ----------
    against : dict of int to int
        Bad rounds in a row, by node.
    until : dict of int to int
        The last round that a node sits out.
    """

    against: Mapping[int, int] = field(default_factory=dict)
    until: Mapping[int, int] = field(default_factory=dict)

    def after(
        self,
        server_round: int,
        rejected: Sequence[int],
        weights: Mapping[int, float],
        norms: Mapping[int, float],
        accepted: Sequence[int],
        *,
        room: int,
        bench_after: int,
        bench_rounds: int,
    ) -> tuple[Self, list[tuple[int, int]]]:
        """Return the evidence after a round, and the nodes that go to the bench with their counts.

        Parameters
        ----------
        server_round : int
            The round that has ended.
        rejected, accepted : sequence of int
            The nodes whose replies were.
        weights : dict of int to float
            What the rule gave each accepted node; empty if that says nothing about it.
        norms : dict of int to float
            The length of each accepted node's update, for the nodes in ``weights``.
        room : int
            How many may sit on the bench at a time.
        bench_after, bench_rounds : int
            See above; 0 for no bench.
        """
        if not bench_after:
            return self, []
        bad = set(rejected)
        if weights:
            least = NEAR_ZERO * float(np.median(list(weights.values())))
            most = FAR_OUT * float(np.median([norms[node] for node in weights]))
            bad |= {node for node in weights if weights[node] < least and norms[node] > most}
        against, until = Counter(self.against), dict(self.until)
        for node in accepted:
            if node not in bad:
                del against[node]
        against.update(sorted(bad))
        benched: list[tuple[int, int]] = []
        for node, count in against.most_common():
            if count < bench_after or len(_benched(until, server_round + 1)) >= room:
                break
            until[node] = server_round + bench_rounds
            benched.append((node, count))
        for node, _ in benched:
            del against[node]
        return type(self)(dict(against), until), benched

    def benched(self, server_round: int) -> set[int]:
        """Return the nodes that sit out this round."""
        return _benched(self.until, server_round)

    def to_dict(self) -> dict[str, Any]:
        """Return the evidence for a checkpoint."""
        return {"against": dict(self.against), "until": dict(self.until)}


def _benched(until: Mapping[int, int], server_round: int) -> set[int]:
    return {node for node, last in until.items() if server_round <= last}
