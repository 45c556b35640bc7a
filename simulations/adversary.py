"""A grid in the hands of the attackers: it sees every reply before the server does.

:class:`AdversarialGrid` wraps any other grid, Ray's and the in-process one alike, with clients
and strategies unchanged. It plays the attacks that need more than a client's own update, and
counts what was played, its own and the clients'.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.arrivals import arriving
from fl_bgmd.attacks import OMNISCIENT, AttackPlan, Pipeline, View
from fl_bgmd.compression import Compressor
from fl_bgmd.flower import Run
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.replies import partition_id, screen
from fl_bgmd.wire import ATTACK_RECORD, Terms, TrainedReply, mark, marked, received_model

from .grid import InProcessGrid, asked_for

Preview = Callable[[Tensor, list[int], list[float], int], Tensor]
"""What a server would move by: see :meth:`fl_bgmd.strategies.RobustStrategy.preview`."""


@dataclass
class _Cohort:
    """What attackers know of a push before its replies come; they wait for all of these.

    Attributes
    ----------
    terms : Terms
        What was asked.
    layout : ModelLayout or None
        Of the model that went out, None where nobody looks at more than its own update.
    missing : set of str
        The messages that have not been answered.
    replies : dict of str to Message
        Those held back, by the messages that they answer.
    """

    terms: Terms
    layout: ModelLayout | None
    missing: set[str] = field(default_factory=set)
    replies: dict[str, Message] = field(default_factory=dict)


class AdversarialGrid(Grid):
    """Flower's Grid with an adversary on the line.

    Attackers that know the others' updates wait for all replies before they send their own: until
    then none can be pulled. Otherwise replies pass as they come.

    Parameters
    ----------
    inner : Grid
        Where the clients are. Each reply to training must name its client in the metric
        ``partition-id``.
    plan : AttackPlan
        What is played, by whom.
    num_clients : int
        The number of clients that the plan's roles are drawn from.
    preview : callable, optional
        The server's :meth:`fl_bgmd.strategies.RobustStrategy.preview`, for attacks that know the
        rule.

    Attributes
    ----------
    played : Counter
        How many lies of each attack have been sent so far, by their specs.
    """

    def __init__(
        self, inner: Grid, plan: AttackPlan, num_clients: int, preview: Preview | None = None
    ) -> None:
        self._inner = inner
        self._preview = preview
        self._plan = plan
        self._num_clients = num_clients
        self.played: Counter[str] = Counter()
        self._memory: dict[str, dict[str, Any]] = {}
        self._cohorts: list[_Cohort] = []
        self._model: NDArray[Any] | None = None
        """The trained values that the server sent last, where an attack looks at its steps."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver the messages, let the attackers see the replies, and hand them on."""
        sent = list(messages)
        cohort = self._cohort(sent)
        replies = list(self._inner.send_and_receive(sent, timeout=timeout))
        return replies if cohort is None else self._attacked(cohort, replies)

    def stream(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send the messages; yield replies as they come, those of attackers attacked."""
        cohort = self._cohort(messages)
        return self._stream(cohort, arriving(self._inner, messages, timeout))

    def _stream(self, cohort: _Cohort | None, replies: Iterable[Message]) -> Iterator[Message]:
        if cohort is not None and cohort.layout is not None:
            gathered = self._attacked(cohort, list(replies))
            while gathered:
                yield gathered.pop(0)
            return
        for reply in replies:
            if cohort is not None:
                self._attacked(cohort, [reply])
            yield reply
            del reply

    def _cohort(self, sent: Sequence[Message]) -> _Cohort | None:
        """Return what attackers know of these messages, None where they do not train."""
        if not sent or sent[0].metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return None
        # Copies of what is needed: a grid may take the messages apart.
        terms, layout = Terms.of(sent[0].content), None
        if any(bound.attack.knows != "own" for bound in self._plan.attacks):
            layout = ModelLayout(received_model(sent[0].content))
        return _Cohort(terms, layout)

    def _attacked(self, cohort: _Cohort, replies: list[Message]) -> list[Message]:
        """Replace what the attackers among these send, and count it."""
        if cohort.layout is not None:
            terms = cohort.terms
            self._conspire(replies, cohort.layout, terms.round, terms.packing())
        planned = {str(bound) for bound in self._plan.attacks}
        for reply in replies:
            if reply.has_content() and (name := marked(reply.content)) is not None:
                if name in planned:
                    self.played[name] += 1
                del reply.content[ATTACK_RECORD]
        return replies

    def _conspire(
        self,
        replies: list[Message],
        layout: ModelLayout,
        number: int,
        compressor: Compressor | None,
    ) -> None:
        """Replace the updates of the clients whose attack needs more than their own."""
        roles = self._plan.roles(self._num_clients, number)
        playing = {p: bound for p, bound in roles.items() if bound.attack.knows != "own"}
        last_step = self._last_step(layout)
        if not playing:
            return
        by_partition = {partition_id(reply): reply for reply in replies}
        by_partition.pop(None, None)
        if not by_partition and replies:
            unplayable = ", ".join(sorted({str(bound) for bound in playing.values()}))
            raise ValueError(
                "no reply names its client in the metric 'partition-id', which attacks with more "
                f"than their own knowledge need ({unplayable})"
            )
        updates: dict[int, Tensor] = {}
        examples: dict[int, float] = {}
        for partition, reply in sorted(by_partition.items(), key=lambda item: item[0] or 0):
            update, num_examples = _update(reply, layout, compressor)
            if update is not None and partition is not None:
                updates[partition], examples[partition] = update, num_examples
        if max(updates, default=0) >= self._num_clients:
            raise ValueError(
                f"partition-id is {max(updates)} in a reply; allowed: 0 to "
                f"{self._num_clients - 1}, since roles are drawn for {self._num_clients} clients"
            )
        honest = [p for p in updates if p not in roles]
        colluding = [p for p in updates if p in playing]
        if not colluding:
            return
        everything = View(
            update=updates[colluding[0]],
            generator=torch.Generator().manual_seed(self._plan.client_seed(number, colluding[0])),
            num_clients=self._num_clients,
            num_byzantine=len(roles),
            colluders=torch.stack([updates[p] for p in colluding]),
            honest=torch.stack([updates[p] for p in honest]) if honest else None,
            colluder_ids=tuple(colluding),
            honest_ids=tuple(honest),
            last_step=last_step,
        )
        nodes = {p: by_partition[p].metadata.src_node_id for p in updates}
        # Those who play the same attack send the same vector, or each its own.
        for bound in sorted({playing[p] for p in colluding}, key=str):
            if bound.attack.knows in OMNISCIENT and not honest:
                continue
            players = [p for p in colluding if playing[p] == bound]
            view = replace(
                everything,
                memory=self._memory.setdefault(str(bound), {}),
                pipeline=self._pipeline(updates, nodes, examples, players),
            )
            lies = bound.lie(view).expand(len(players), -1)
            for partition, vector in zip(players, lies, strict=True):
                reply = by_partition[partition]
                TrainedReply.read(reply.content, layout, compressor).replace(vector)
                mark(reply, str(bound))
                updates[partition] = vector

    def _last_step(self, layout: ModelLayout) -> Tensor | None:
        """Return how far the server has moved since the round before; note where it is now."""
        if not any("last_step" in bound.attack.takes for bound in self._plan.attacks):
            return None
        before, self._model = self._model, layout.values.copy()
        return None if before is None else torch.from_numpy(before - layout.values)

    def _pipeline(
        self,
        updates: Mapping[int, Tensor],
        nodes: Mapping[int, int],
        examples: Mapping[int, float],
        players: list[int],
    ) -> Pipeline | None:
        """Return what tells the players where lies of theirs would take the server."""
        preview = self._preview
        if preview is None:
            return None

        places = [place for place, partition in enumerate(updates) if partition in players]

        def pipeline(lies: Tensor, rounds: int = 1) -> Tensor:
            # By partitions, as the server sorts them: whose reply came first does not matter.
            rows = torch.stack(list(updates.values()))
            rows[places] = lies
            return preview(rows, list(nodes.values()), list(examples.values()), rounds)

        return pipeline

    def state_dict(self) -> dict[str, Any]:
        """Return what the rounds to come depend on, the inner grid's included."""
        inner = self._inner.state_dict() if isinstance(self._inner, InProcessGrid) else None
        memory = copy.deepcopy(self._memory)
        model = None if self._model is None else torch.from_numpy(self._model.copy())
        return {"played": dict(self.played), "memory": memory, "model": model, "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.played = Counter(state["played"])
        self._memory = copy.deepcopy(state["memory"])
        model = state.get("model")  # older checkpoints have none
        self._model = None if model is None else model.numpy().copy()
        if isinstance(self._inner, InProcessGrid) and state["inner"] is not None:
            self._inner.load_state_dict(state["inner"])

    # ------------------------------------------------------------- everything else is passed on

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' ids."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages."""
        sent = list(messages)
        cohort = self._cohort(sent)
        pushed = list(self._inner.push_messages(sent))
        if cohort is not None:
            cohort.missing = {number for number in pushed if number}
            self._cohorts.append(cohort)
        return pushed

    def pull_messages(  # type: ignore[override]  # both Flower's 1.42 and 1.43 call it
        self,
        reply_to_message_ids: Iterable[str] | None = None,
        *,
        message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Pull replies, those of attackers attacked."""
        asked = list(asked_for(reply_to_message_ids, message_ids))
        found: list[Message] = []
        for cohort in self._cohorts:
            own = [number for number in asked if number in cohort.missing | cohort.replies.keys()]
            asked = [number for number in asked if number not in own]
            if own:
                found += self._pulled(cohort, own)
        self._cohorts = [each for each in self._cohorts if each.missing or each.replies]
        return [*found, *self._inner.pull_messages(asked)]

    def _pulled(self, cohort: _Cohort, asked: list[str]) -> list[Message]:
        """Return what can be known of a cohort's replies."""
        waits = cohort.layout is not None
        numbers = sorted(cohort.missing) if waits else [n for n in asked if n in cohort.missing]
        came = list(self._inner.pull_messages(numbers))
        cohort.missing -= {reply.metadata.reply_to_message_id for reply in came}
        if not waits:
            return self._attacked(cohort, came)
        cohort.replies |= {reply.metadata.reply_to_message_id: reply for reply in came}
        if cohort.missing:
            return []
        if came:
            self._attacked(cohort, list(cohort.replies.values()))
        return [cohort.replies.pop(number) for number in asked if number in cohort.replies]


def _update(
    reply: Message, layout: ModelLayout, compressor: Compressor | None
) -> tuple[Tensor | None, float]:
    """Return the update in a reply, None for one that a server would reject, and its examples."""
    row = np.empty(layout.num_directions, dtype=layout.dtype)
    buffers = np.empty(layout.num_buffers, dtype=BUFFER_DTYPE)
    screened = screen(reply, layout, row, buffers, compressor=compressor)
    update = torch.from_numpy(row) if screened.reason is None else None
    return update, float(screened.num_examples)
