"""Who is to sit out some rounds: evidence against nodes, gathered round by round."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NEAR_ZERO = 0.1
"""A weight below this share of the round's median weight may speak against its node."""

FAR_OUT = 10.0
"""It does if the node's update is longer than the round's median update by this factor."""


def far_out(norms: Mapping[int, float]) -> set[int]:
    """Return the nodes whose updates are longer than the median one by :data:`FAR_OUT`.

    The median is above 0, or there are none.
    """
    middle = float(np.median(list(norms.values()))) if norms else 0.0
    return {node for node, norm in norms.items() if norm > FAR_OUT * middle > 0}


class Reputation:
    """Evidence against nodes, and the bench.

    A node gets one count for a round in which its reply is rejected, or has next to no weight
    because it is far out, and loses all of them in a round in which it does well: only
    ``bench_after`` such rounds in a row put it on the bench, for ``bench_rounds`` rounds.
    Adversaries that move from node to node leave each of them before that. Weights alone are no
    evidence: a minority that repeats one honest update takes everybody else's. Nobody but the node
    itself makes its update long, and a minority cannot move the median length beyond those of the
    honest.

    Parameters
    ----------
    bench_after : int
        Bad rounds in a row; 0 for no bench.
    bench_rounds : int
        How long a node sits out.
    """

    def __init__(self, bench_after: int, bench_rounds: int) -> None:
        self.bench_after = bench_after
        self.bench_rounds = bench_rounds
        self._against: Counter[int] = Counter()
        self._until: dict[int, int] = {}

    def judge(
        self,
        server_round: int,
        rejected: Sequence[int],
        weights: Mapping[int, float],
        norms: Mapping[int, float],
        accepted: Sequence[int],
        room: int,
    ) -> list[tuple[int, int]]:
        """Take note of a round; return the nodes that go to the bench with their counts.

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
        """
        if not self.bench_after:
            return []
        bad = set(rejected)
        if weights:
            least = NEAR_ZERO * float(np.median(list(weights.values())))
            most = FAR_OUT * float(np.median([norms[node] for node in weights]))
            bad |= {node for node in weights if weights[node] < least and norms[node] > most}
        for node in accepted:
            if node not in bad:
                del self._against[node]
        self._against.update(sorted(bad))
        benched = []
        for node, count in self._against.most_common():
            if count < self.bench_after or len(self.benched(server_round + 1)) >= room:
                break
            self._until[node] = server_round + self.bench_rounds
            benched.append((node, count))
        for node, _ in benched:
            del self._against[node]
        return benched

    def benched(self, server_round: int) -> set[int]:
        """Return the nodes that sit out this round."""
        return {node for node, last in self._until.items() if server_round <= last}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on."""
        return {"against": dict(self._against), "until": dict(self._until)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._against = Counter(state["against"])
        self._until = dict(state["until"])
