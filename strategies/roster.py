"""Which nodes take part in a round: waiting, sampling, who was asked what, who is late."""

import logging
import random
import time
from collections.abc import Iterable, Mapping

from flwr.app import Message, Metadata
from flwr.serverapp import Grid

from fl_bgmd.shares import floor_share

from .errors import MissingNodesError
from .reputation import Reputation

LOG = logging.getLogger("flwr.fl_bgmd")


class Roster:
    """The nodes of a run as its rounds see them.

    Parameters
    ----------
    seed : int
        Of the sampling.
    wait_timeout : float
        Seconds to wait for enough nodes.
    too_few_nodes : {"fail", "go-on"}
        What happens then.
    reputation : Reputation
        Who sits out.

    Attributes
    ----------
    seed : int
        As above.
    num_asked : int
        How many messages of this phase went out.
    late : int
        Replies to earlier rounds that had come by the start of this one.
    """

    def __init__(
        self, seed: int, wait_timeout: float, too_few_nodes: str, reputation: Reputation
    ) -> None:
        self.seed = seed
        self._wait_timeout = wait_timeout
        self._too_few_nodes = too_few_nodes
        self._reputation = reputation
        self._asked: list[Metadata] = []
        self._unanswered: set[str] = set()
        self.num_asked = 0
        self.late = 0

    @property
    def asked(self) -> dict[str, int] | None:
        """The node that each message of the phase went to, by message id, None if not known.

        A grid of somebody's own may not number its messages. Where others have a number, one
        without has not been sent, and nobody can reply to it.
        """
        asked = {sent.message_id: sent.dst_node_id for sent in self._asked if sent.message_id}
        return asked or None

    def sample(
        self, grid: Grid, server_round: int, kind: str, fraction: float, minimum: int, needed: int
    ) -> list[int]:
        """Choose nodes once ``needed`` are there, the same ones for the same seed and node ids."""
        nodes = self._wait_for(grid, needed)
        count = max(floor_share(fraction, len(nodes)), minimum)
        benched = self._reputation.benched(server_round)
        free = [node for node in nodes if node not in benched]
        draw = random.Random(f"{self.seed}-{server_round}-{kind}")
        chosen = sorted(draw.sample(free, min(len(free), count)))
        LOG.info("%s: sampled %s nodes (out of %s)", kind, len(chosen), len(nodes))
        return chosen

    def sent(self, messages: Iterable[Message]) -> None:
        """Remember whom the messages of a phase are for; the grid numbers them on the way."""
        self._asked = [message.metadata for message in messages]
        self.num_asked = len(self._asked)

    def answered(self, server_round: int, messages: list[Message]) -> None:
        """Take note of who has not replied to training by the deadline."""
        answers = {message.metadata.reply_to_message_id for message in messages}
        self._unanswered |= {sent.message_id for sent in self._asked} - answers - {""}
        # The error reply that Flower makes up for a dead node does not name it.
        silent = {sent.dst_node_id for sent in self._asked}
        silent -= {message.metadata.src_node_id for message in messages}
        for node in sorted(silent):
            LOG.warning("round %s: no reply from node %s", server_round, node)

    def discard_late(self, grid: Grid) -> None:
        """Take in what has come too late for its round: it is counted and thrown away."""
        self.late = 0
        if not self._unanswered:
            return
        for reply in grid.pull_messages(sorted(self._unanswered)):
            self._unanswered.discard(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                self.late += 1
                LOG.warning("node %s replied too late: discarded", reply.metadata.src_node_id)

    def judge(
        self,
        server_round: int,
        suspects: list[int],
        weights: Mapping[int, float],
        norms: Mapping[int, float],
        accepted: list[int],
        byzantine_fraction: float,
        min_valid_replies: int,
    ) -> int:
        """Hold a round against the nodes that did badly; return how many sit out the next.

        At most the share that may be hostile, and never so many that those left cannot make up a
        round.
        """
        asked = {sent.dst_node_id for sent in self._asked}
        sitting_out = self._reputation.benched(server_round)
        count = len(asked | sitting_out)
        room = max(0, min(floor_share(byzantine_fraction, count), count - min_valid_replies))
        suspects = [node for node in suspects if node in asked]
        for node, rounds in self._reputation.judge(
            server_round, suspects, weights, norms, accepted, room
        ):
            LOG.warning(
                "node %s sits out %s rounds: in its last %s its replies were rejected, or longer "
                "than ten times the median one and of less than a tenth of the median weight",
                node,
                self._reputation.bench_rounds,
                rounds,
            )
        return len(self._reputation.benched(server_round + 1))

    def _wait_for(self, grid: Grid, needed: int) -> list[int]:
        """Return the connected nodes' ids, ascending, once ``needed`` are there or time is up."""
        deadline = time.monotonic() + self._wait_timeout
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            left = deadline - time.monotonic()
            if left <= 0:
                found = (
                    f"{len(nodes)} nodes are connected after {self._wait_timeout:g} s and "
                    f"{needed} are needed"
                )
                if self._too_few_nodes == "fail":
                    raise MissingNodesError(
                        f"{found} (min_available_nodes, node_wait_timeout, too_few_nodes)"
                    )
                LOG.warning("%s: the round goes on with those", found)
                break
            LOG.info("waiting for nodes: %s connected, %s needed", len(nodes), needed)
            time.sleep(min(1.0, left))
        return nodes
