"""What came in: replies in a reproducible order, screened one by one, the good ones as rows."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.held import num_bytes
from fl_bgmd.layout import BUFFER_DTYPE
from fl_bgmd.replies import Screened, partition_id, records_of, screen

from .sent import Sent
from .settings import Settings
from .step import Round, State
from .ties import count_once
from .verdicts import ACCEPTED, Heard

LOG = logging.getLogger("flwr.fl_bgmd")


@dataclass
class Intake:
    """The replies of a phase after screening.

    Attributes
    ----------
    rows : Tensor
        (n, width): row i is the update of the i-th accepted reply. Of width 0 for evaluation.
    buffers : (n, num_buffers)
        The buffers of the accepted models.
    accepted : list of Screened
        What is known of each accepted reply.
    nodes : list of int
        Who sent them.
    contents : list of RecordDict
        The accepted replies themselves, where they were to be kept: those of which no metric was
        dropped, each with a number of examples.
    suspects : list of int
        Who sent the rejected ones.
    rejected : Counter
        How many were rejected, by reason.
    examples : dict of str to str
        What was wrong with the first reply that was rejected for each reason.
    dropped : int
        How many metrics of accepted replies were dropped because they are not finite.
    first_dropped : str
        Which one was the first, and whose.
    heard : list of Heard
        All replies, in their order.
    bytes_up, bytes_rejected : int
        Bytes of arrays in accepted and in rejected replies.
    """

    rows: Tensor
    buffers: NDArray[Any]
    accepted: list[Screened] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    contents: list[RecordDict] = field(default_factory=list)
    suspects: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    first_dropped: str = ""
    heard: list[Heard] = field(default_factory=list)
    bytes_up: int = 0
    bytes_rejected: int = 0

    def as_round(self, state: State, sent: Sent, settings: Settings) -> tuple[State, Round]:
        """Return the accepted replies as rows, and the state with what they say is tied.

        The rows (n, c) have each tensor once and lie on the settings' device; they have no weights
        yet (see :func:`.rows.gathered`).
        """
        rows = self.rows[: len(self.accepted)]
        if sent.coordinates is None:
            rows, ties = count_once(sent.layout, rows, state.ties)
            if ties != state.ties:  # what is kept of each coordinate is of another width
                stale = state.stale.retied(sent.layout.directions, state.ties, ties)
                state = replace(state, ties=ties, memory=None, last=None, stale=stale)
        norms = [screened.norm for screened in self.accepted]
        return state, Round(
            rows.to(settings.torch_device),
            None,
            self.nodes,
            None if None in norms else torch.tensor(norms, dtype=torch.float64),
            byzantine_fraction=state.assumed(settings),
            root=sent.root_row(state.ties, settings.torch_device),
        )

    @property
    def num_examples(self) -> list[float]:
        """How many examples the accepted replies report."""
        return [screened.num_examples for screened in self.accepted]

    def account(self, number: int, asked: int, failure: str) -> str:
        """Return what a round came to, with an example of each reason to reject a reply."""
        reasons = ", ".join(
            f"{reason} {count} ({self.examples[reason]})"
            for reason, count in sorted(self.rejected.items())
        )
        return (
            f"in round {number}: {asked} nodes asked, {len(self.accepted)} replies accepted, "
            f"rejected: {reasons or 'none'}" + (failure and f"; {failure}")
        )


def take_in(
    phase: str,
    messages: list[Message],
    sent: Sent | None,
    *,
    keep_contents: bool,
    examples_key: str,
    **screening: Any,
) -> Intake:
    """Screen each reply alone, accepted ones into consecutive rows; log each rejection once.

    Parameters
    ----------
    phase : {"train", "evaluate"}
        For the log.
    messages : list of Message
        See :func:`in_order`.
    sent : Sent or None
        What went out; None for evaluation, which brings no model back.
    keep_contents : bool
        Whether the accepted replies are needed after this.
    examples_key : str
        The metric with the number of examples.
    **screening
        Of :func:`fl_bgmd.replies.screen`, without what ``sent`` says.
    """
    layout = None if sent is None else sent.layout
    if sent is None or layout is None:
        intake = Intake(torch.empty(len(messages), 0), np.empty((len(messages), 0)))
    else:
        dtype = torch.from_numpy(layout.values).dtype
        intake = Intake(
            torch.empty(len(messages), sent.width, dtype=dtype),
            np.empty((len(messages), layout.num_buffers), dtype=BUFFER_DTYPE),
        )
        screening |= {"compressor": sent.compressor, "coordinates": sent.coordinates}
    seen: set[int] = set()
    for message in messages:
        node, filled = message.metadata.src_node_id, len(intake.accepted)
        screened = screen(
            message,
            layout,
            None if layout is None else intake.rows[filled].numpy(),
            None if layout is None else intake.buffers[filled],
            seen_nodes=seen,
            examples_key=examples_key,
            **screening,
        )
        verdict = ACCEPTED if screened.reason is None else screened.reason.value
        intake.heard.append(Heard(node, partition_id(message), verdict))
        if screened.reason is None:
            intake.accepted.append(screened)
            intake.nodes.append(node)
            intake.bytes_up += _array_bytes(message)
            if screened.dropped:
                intake.dropped += screened.dropped
                intake.first_dropped = intake.first_dropped or f"of node {node}: {screened.detail}"
            elif keep_contents:
                intake.contents.append(_with_examples(message.content, screened, examples_key))
        else:
            reason = screened.reason.value
            intake.rejected[reason] += 1
            intake.examples.setdefault(reason, screened.detail)
            intake.suspects.append(node)
            intake.bytes_rejected += _array_bytes(message)
            LOG.warning("rejected the reply of node %s (%s): %s", node, reason, screened.detail)
    count, rejected = len(intake.accepted), intake.rejected.total()
    LOG.info("aggregate_%s: accepted %s replies, rejected %s", phase, count, rejected)
    return intake


def _with_examples(content: RecordDict, screened: Screened, key: str) -> RecordDict:
    """Return a reply with the number of examples that it counts as."""
    [(name, metrics)] = content.metric_records.items()
    if metrics.get(key) == screened.num_examples:
        return content
    content = content.copy()
    content[name] = MetricRecord({**metrics, key: screened.num_examples})
    return content


def in_order(replies: Iterable[Message]) -> list[Message]:
    """Sort replies by partition id where they name one, then by node: arrival order is chance."""

    def key(message: Message) -> tuple[bool, int, int]:
        partition = partition_id(message)
        return partition is None, partition or 0, message.metadata.src_node_id

    return sorted(replies, key=key)


def _array_bytes(message: Message) -> int:
    """Return how many bytes of arrays a reply holds."""
    if not message.has_content():
        return 0
    records = records_of(message, ArrayRecord)
    return sum(num_bytes(array) for record in records for array in record.values())
