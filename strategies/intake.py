"""What came in: replies screened one by one as they come, the good ones as rows in a fixed order.

Rows are in the order of partitions, whatever the order of arrival, and nothing else of a reply
stays: its content may be released before the next one is looked at.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.arrivals import Arrivals
from fl_bgmd.held import num_bytes
from fl_bgmd.layout import BUFFER_DTYPE
from fl_bgmd.replies import Rejection, Screened, partition_id, records_of, screen

from .sent import Sent
from .settings import Settings
from .step import Round, State
from .ties import count_once
from .verdicts import ACCEPTED, Heard

LOG = logging.getLogger("flwr.fl_bgmd")

Place = tuple[bool, int, int]
"""What replies are sorted by."""

_MOVED = 2**18  # values that are moved at a time


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
        The accepted replies themselves but for their arrays, where they were to be kept: those of
        which no metric was dropped, each with a number of examples.
    metadata : list of Metadata
        Of all replies, in their order.
    places : dict of int to tuple
        What the accepted replies were sorted by, by node.
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
    seconds : float
        What it took to look at them, without the wait for them.
    waited : float
        Seconds spent on waiting for them here.
    """

    rows: Tensor
    buffers: NDArray[Any]
    accepted: list[Screened] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    contents: list[RecordDict] = field(default_factory=list)
    metadata: list[Metadata] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    suspects: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    first_dropped: str = ""
    heard: list[Heard] = field(default_factory=list)
    bytes_up: int = 0
    bytes_rejected: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def as_round(self, state: State, sent: Sent, settings: Settings) -> tuple[State, Round]:
        """Return the accepted replies as rows, and the state with what they say is tied.

        The rows (n, c) have each tensor once and lie on the settings' device; they have no weights
        yet (see :func:`.rows.gathered`). They are no longer held here: who is done with the round
        is done with their memory.
        """
        rows, self.rows = self.rows[: len(self.accepted)], self.rows[:0].clone()
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


@dataclass
class _Reply:
    """What is left of a reply that was looked at.

    ``slot`` is where its row is, None if it has none.
    """

    place: Place
    metadata: Metadata
    screened: Screened
    num_bytes: int
    slot: int | None = None
    content: RecordDict | None = None

    @property
    def partition(self) -> int | None:
        """The partition that it names."""
        names_none, partition, _ = self.place
        return None if names_none else partition


def take_in(
    phase: str,
    replies: Iterable[Message],
    sent: Sent | None,
    *,
    rows: Tensor | None = None,
    slots: Mapping[int, int] | None = None,
    keep_contents: bool,
    examples_key: str,
    **screening: Any,
) -> Intake:
    """Screen each reply alone, the accepted ones into rows; log each rejection once.

    Parameters
    ----------
    phase : {"train", "evaluate"}
        For the log.
    replies : iterable of Message
        An :class:`~fl_bgmd.arrivals.Arrivals` is taken as it comes; others are there already.
    sent : Sent or None
        What went out; None for evaluation, which brings no model back.
    rows : Tensor, optional
        Where the rows go, one for each reply or more; new memory by default.
    slots : dict of int to int, optional
        Which row each node is expected to have. Where it does nothing is to be moved at the end;
        looked at for arrivals only.
    keep_contents : bool
        Whether the accepted replies' metrics are needed after this, as they were sent.
    examples_key : str
        The metric with the number of examples.
    **screening
        Of :func:`fl_bgmd.replies.screen`, without what ``sent`` says.
    """
    arriving: Arrivals | list[Message]
    if isinstance(replies, Arrivals):
        arriving = replies
    else:
        arriving, slots = in_order(replies), None
    desk = _Desk(sent, len(arriving), rows, slots or {}, keep_contents, examples_key, screening)
    seconds, began = 0.0, time.perf_counter()
    for message in arriving:
        started = time.perf_counter()
        desk.look_at(message)
        del message  # the next one comes while nobody holds this one
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    intake = _sorted_out(desk.found, desk.rows, desk.buffers)
    intake.waited = started - began - seconds
    intake.seconds = seconds + time.perf_counter() - started
    accepted, rejected = len(intake.accepted), intake.rejected.total()
    LOG.info("aggregate_%s: accepted %s replies, rejected %s", phase, accepted, rejected)
    return intake


class _Desk:
    """Where the replies of a phase are looked at, one after the other: see :func:`take_in`.

    Attributes
    ----------
    found : list of _Reply
        What was looked at, as it came.
    rows, buffers
        Of the accepted ones, in their slots.
    """

    def __init__(
        self,
        sent: Sent | None,
        count: int,
        rows: Tensor | None,
        slots: Mapping[int, int],
        keep_contents: bool,
        examples_key: str,
        screening: dict[str, Any],
    ) -> None:
        self._keep_contents, self._examples_key = keep_contents, examples_key
        self._count, self._free, self._screening = count, _Slots(count, slots), screening
        self._first: dict[int, _Reply] = {}
        self._layout = None if sent is None else sent.layout
        self.found: list[_Reply] = []
        self.rows, self.buffers = torch.empty(count, 0), np.empty((count, 0))
        if sent is not None:
            shape = (count, sent.layout.num_buffers)
            self.rows = (
                torch.empty(count, sent.width, dtype=sent.row_dtype) if rows is None else rows
            )
            self.buffers = np.empty(shape, dtype=BUFFER_DTYPE)
            screening |= {"compressor": sent.compressor, "coordinates": sent.coordinates}

    def look_at(self, message: Message) -> None:
        """Screen a reply; what is left of it goes to ``found``."""
        node, place = message.metadata.src_node_id, _place(message)
        before = self._first.get(node)
        # Of several replies of a node the first in their order counts, whichever came first.
        counts = before is None or place < before.place
        seen = set() if counts else {node}
        slot = before.slot if before is not None and counts else None
        slot = self._free.take(node) if slot is None and counts else slot
        screened = self._screened(message, slot, seen)
        reply = _Reply(place, message.metadata, screened, _array_bytes(message))
        if counts and node in seen:
            self._first[node] = reply
            if before is not None:
                again = f"node {node} has replied already"
                before.screened = Screened(Rejection.DUPLICATE, again)
                before.slot = before.content = None
                _log(before)
        if screened.reason is None:
            reply.slot = slot
            if self._keep_contents and not screened.dropped:
                reply.content = _metrics_of(message.content, screened, self._examples_key)
        else:
            if slot is not None and (before is None or before.slot != slot):
                self._free.give_back(slot)
            _log(reply)
        self.found.append(reply)

    def _screened(self, message: Message, slot: int | None, seen: set[int]) -> Screened:
        """Return what the screening finds, an accepted update in the slot."""
        if slot is None and not seen:
            surplus = f"{self._count} messages went out, and as many replies count"
            return Screened(Rejection.UNASKED, surplus)
        bare = self._layout is None or slot is None  # one too many is rejected without a row
        return screen(
            message,
            self._layout,
            None if bare else self.rows[slot].numpy(),
            None if bare else self.buffers[slot],
            seen_nodes=seen,
            examples_key=self._examples_key,
            **self._screening,
        )


def _log(reply: _Reply) -> None:
    """Log a rejection."""
    assert reply.screened.reason is not None
    LOG.warning(
        "rejected the reply of node %s (%s): %s",
        *(reply.metadata.src_node_id, reply.screened.reason.value, reply.screened.detail),
    )


class _Slots:
    """The rows that nobody has yet; ``expected`` says whose some of them will be."""

    def __init__(self, count: int, expected: Mapping[int, int]) -> None:
        self._expected, self._reserved = expected, set(expected.values())
        self._free = set(range(count))
        self._others = sorted(self._free - self._reserved, reverse=True)

    def take(self, node: int) -> int | None:
        """Return a row for a node, None if there is none left."""
        slot = self._expected.get(node)
        if slot is None or slot not in self._free:
            if not self._free:
                return None
            while self._others and self._others[-1] not in self._free:
                self._others.pop()
            slot = self._others[-1] if self._others else max(self._free)
        self._free.discard(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Take back a row of which nothing is used."""
        self._free.add(slot)
        if slot not in self._reserved:
            self._others.append(slot)


def _sorted_out(found: Sequence[_Reply], rows: Tensor, buffers: NDArray[Any]) -> Intake:
    """Return what came in, in the order of :func:`in_order`, the rows brought into it in place."""
    intake, slots = Intake(rows, buffers), []
    for reply in sorted(found, key=lambda reply: reply.place):
        screened, node = reply.screened, reply.metadata.src_node_id
        intake.metadata.append(reply.metadata)
        verdict = ACCEPTED if screened.reason is None else screened.reason.value
        intake.heard.append(Heard(node, reply.partition, verdict))
        if reply.slot is not None:
            slots.append(reply.slot)
            intake.accepted.append(screened)
            intake.nodes.append(node)
            intake.places[node] = reply.place
            intake.bytes_up += reply.num_bytes
            if screened.dropped:
                intake.dropped += screened.dropped
                intake.first_dropped = intake.first_dropped or f"of node {node}: {screened.detail}"
            if reply.content is not None:
                intake.contents.append(reply.content)
        else:
            assert screened.reason is not None
            intake.rejected[screened.reason.value] += 1
            intake.examples.setdefault(screened.reason.value, screened.detail)
            intake.suspects.append(node)
            intake.bytes_rejected += reply.num_bytes
    if rows.shape[1]:
        move_rows(rows.numpy(), slots)
        move_rows(buffers, slots)
    return intake


def move_rows(rows: NDArray[Any], sources: Sequence[int]) -> None:
    """Move row ``sources[i]`` to row i, in place; the sources are distinct, other rows are lost.

    Each row is read and written once at most, and no more than a piece of a row is held.
    """
    width = rows.shape[1]
    left = {target: source for target, source in enumerate(sources) if target != source}
    needed = set(left.values())
    for start in [target for target in left if target not in needed]:
        target = start  # nobody needs what is there: what moves here leaves the next one free
        while target in left:
            source = left.pop(target)
            rows[target] = rows[source]
            target = source
    spare = np.empty(min(_MOVED, width), dtype=rows.dtype)
    while left:
        cycle = [next(iter(left))]
        while (source := left.pop(cycle[-1])) != cycle[0]:
            cycle.append(source)
        for start in range(0, width, _MOVED):
            piece = slice(start, min(start + _MOVED, width))
            kept = spare[: piece.stop - piece.start]
            kept[:] = rows[cycle[0], piece]
            for target, source in pairwise(cycle):
                rows[target, piece] = rows[source, piece]
            rows[cycle[-1], piece] = kept


def _metrics_of(content: RecordDict, screened: Screened, key: str) -> RecordDict:
    """Return a reply without its arrays, with the number of examples that it counts as."""
    kept = RecordDict({n: r for n, r in content.items() if not isinstance(r, ArrayRecord)})
    [(name, metrics)] = kept.metric_records.items()
    if metrics.get(key) != screened.num_examples:
        kept[name] = MetricRecord({**metrics, key: screened.num_examples})
    return kept


def in_order(replies: Iterable[Message]) -> list[Message]:
    """Sort replies by partition id where they name one, then by node: arrival order is chance."""
    return sorted(replies, key=_place)


def _place(message: Message) -> Place:
    """Return what a reply is sorted by."""
    partition = partition_id(message)
    return partition is None, partition or 0, message.metadata.src_node_id


def _array_bytes(message: Message) -> int:
    """Return how many bytes of arrays a reply holds."""
    if not message.has_content():
        return 0
    records = records_of(message, ArrayRecord)
    return sum(num_bytes(array) for record in records for array in record.values())
