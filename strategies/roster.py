"""Which nodes take part in a round: waiting, sampling, who was asked what, who is late."""

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fl_bgmd.shares import floor_share

from .errors import MissingNodesError
from .intake import Intake, Place
from .reputation import Reputation
from .settings import Settings
from .step import State

LOG = logging.getLogger("flwr.fl_bgmd")


class Roster:
    """The nodes of a run as its rounds see them.

    Parameters
    ----------
    settings : Settings
        How long to wait for nodes, and who is to sit out.

    Attributes
    ----------
    num_asked : int
        How many messages of this phase went out.
    late : int
        Replies to earlier rounds that had come by the start of this one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked: list[Metadata] = []
        self._unanswered: set[str] = set()
        self._places: dict[int, Place] = {}
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

    @property
    def nodes_asked(self) -> set[int]:
        """The nodes that the messages of the phase went to."""
        return {sent.dst_node_id for sent in self._asked}

    def ask(
        self,
        grid: Grid,
        state: State,
        kind: str,
        server_round: int,
        content: RecordDict,
        fraction: float,
        minimum: int,
        needed: int,
    ) -> list[Message]:
        """Return a message for each of the nodes that take part in a phase of a round.

        They are chosen once ``needed`` nodes are there, the same ones for the same seed and node
        ids: a ``fraction`` of them, and at least ``minimum``.
        """
        nodes = self._wait_for(grid, needed)
        count = max(floor_share(fraction, len(nodes)), minimum)
        benched = state.reputation.benched(server_round)
        free = [node for node in nodes if node not in benched]
        draw = random.Random(f"{state.seed}-{server_round}-{kind}")
        chosen = sorted(draw.sample(free, min(len(free), count)))
        LOG.info("%s: sampled %s nodes (out of %s)", kind, len(chosen), len(nodes))
        messages = [Message(content, node, kind) for node in chosen]
        self.sent(messages)
        return messages

    def sent(self, messages: Iterable[Message]) -> None:
        """Remember whom the messages of a phase are for; the grid numbers them on the way."""
        self._asked = [message.metadata for message in messages]
        self.num_asked = len(self._asked)

    @property
    def slots(self) -> dict[int, int]:
        """The row that each node asked will have, by what its last accepted reply was sorted by.

        Empty unless that is known of all of them.
        """
        nodes = {sent.dst_node_id for sent in self._asked}
        if not nodes <= self._places.keys():
            return {}
        ordered = sorted(nodes, key=lambda node: self._places[node])
        return {node: slot for slot, node in enumerate(ordered)}

    def answered(self, server_round: int, intake: Intake) -> None:
        """Take note of who has replied to training by the deadline, and in what order."""
        answers = {reply.reply_to_message_id for reply in intake.metadata}
        self._unanswered |= {sent.message_id for sent in self._asked} - answers - {""}
        self._places |= intake.places
        # The error reply that Flower makes up for a dead node does not name it.
        silent = {sent.dst_node_id for sent in self._asked}
        silent -= {reply.src_node_id for reply in intake.metadata}
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

    def reputation_after(
        self, state: State, intake: Intake, weights: Sequence[float], norms: Mapping[int, float]
    ) -> Reputation:
        """Hold a round against the nodes that did badly; return the evidence after it.

        At most the share that may be hostile sits out, and never so many that those left cannot
        make up a round. ``weights`` are what the rule gave the accepted replies, empty if that says
        nothing about them; ``norms`` the lengths of their updates by node.
        """
        settings, number = self._settings, state.round
        asked = {sent.dst_node_id for sent in self._asked}
        count = len(asked | state.reputation.benched(number))
        hostile = floor_share(state.assumed(settings), count)
        reputation, benched = state.reputation.after(
            number,
            [node for node in intake.suspects if node in asked],
            dict(zip(intake.nodes, weights, strict=True)) if weights else {},
            norms,
            intake.nodes,
            room=max(0, min(hostile, count - settings.least_replies)),
            bench_after=settings.bench_after,
            bench_rounds=settings.bench_rounds,
        )
        for node, rounds in benched:
            LOG.warning(
                "node %s sits out %s rounds: in its last %s its replies were rejected, or longer "
                "than ten times the median one and of less than a tenth of the median weight",
                *(node, settings.bench_rounds, rounds),
            )
        return reputation

    def _wait_for(self, grid: Grid, needed: int) -> list[int]:
        """Return the connected nodes' ids, ascending, once ``needed`` are there or time is up."""
        seconds = self._settings.node_wait_timeout
        deadline = time.monotonic() + seconds
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            left = deadline - time.monotonic()
            if left <= 0:
                found = (
                    f"{len(nodes)} nodes are connected after {seconds:g} s and {needed} are needed"
                )
                if self._settings.too_few_nodes == "fail":
                    raise MissingNodesError(
                        f"{found} (min_available_nodes, node_wait_timeout, too_few_nodes)"
                    )
                LOG.warning("%s: the round starts with those", found)
                break
            LOG.info("waiting for nodes: %s connected, %s needed", len(nodes), needed)
            time.sleep(min(1.0, left))
        return nodes
