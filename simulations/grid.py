"""A grid without processes: it calls the ClientApp directly, in order, in this process.

A client runs when its reply is pulled, so that no more replies exist than somebody has asked for.

Bit-for-bit reproducible, and the cheapest way to run the real ServerApp, ClientApp, mods and
strategies: tests and long experiments use it. The model goes to the clients as values, decoded once
for all of them, and comes back as values from those that answer so (:mod:`fl_bgmd.held`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from itertools import count
from threading import Lock
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_bgmd.flower import CLIENT_FAILED, Run, empty_run, enter_run, number_message, put
from fl_bgmd.held import HeldArray
from fl_bgmd.replies import arrays_from_state, arrays_to_state

from .config import Config

Prepare = Callable[[Sequence[tuple[Message, Context]]], None]


def asked_for(
    reply_to_message_ids: Iterable[str] | None, message_ids: Iterable[str] | None
) -> Iterable[str]:
    """Return the ids under either of their names: ``message_ids`` is that of Flower up to 1.42.

    Raises ``TypeError`` for both and for none.
    """
    given = [ids for ids in (reply_to_message_ids, message_ids) if ids is not None]
    if len(given) != 1:
        raise TypeError(
            f"pull_messages was given {len(given)} of reply_to_message_ids and message_ids; "
            "allowed: one of them"
        )
    return given[0]


class InProcessGrid(Grid):
    """Flower's Grid over clients of this process.

    Parameters
    ----------
    client_app : ClientApp
        Called for every message.
    num_clients : int
        Nodes ``1 .. num_clients``, partitions ``0 .. num_clients - 1``.
    run_config : dict
        What the clients see as ``context.run_config``.
    prepare : callable, optional
        Called with all messages and contexts of a push before the first message is delivered, to
        do the clients' work together.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: Config,
        prepare: Prepare | None = None,
    ) -> None:
        if num_clients < 1:
            raise ValueError(f"num_clients is {num_clients}; allowed: 1 or more")
        enter_run()
        self._run = empty_run()
        self._client_app = client_app
        self._prepare = prepare
        self._message_ids = count(1)
        self._one_at_a_time = Lock()  # the older API asks each client from a thread of its own
        self._pushed: dict[str, Message] = {}
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node in range(1, num_clients + 1)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the clients keep from round to round (``context.state``), by node."""
        return {
            str(node): {name: _to_state(record) for name, record in context.state.items()}
            for node, context in self._contexts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        for node, context in self._contexts.items():
            records = state[str(node)].items()
            context.state = RecordDict({name: _from_state(*saved) for name, saved in records})

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' ids, ascending."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take in the messages; their clients run when the replies are pulled."""
        ids, messages = [], list(messages)
        if self._prepare is not None:
            self._prepare([(m, self._contexts[m.metadata.dst_node_id]) for m in messages])
        decoded: Decoded = {}
        for message in messages:
            with self._one_at_a_time:  # numpy.load parses as Python does: 3.11 fails in two threads
                message.content = held_copy(message.content, decoded)
            message_id = self._numbered(message)
            self._pushed[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(  # type: ignore[override]  # both Flower's 1.42 and 1.43 call it
        self,
        reply_to_message_ids: Iterable[str] | None = None,
        *,
        message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Run the clients the messages are for; return their replies, each once."""
        asked = asked_for(reply_to_message_ids, message_ids)
        pushed = (self._pushed.pop(key, None) for key in asked)
        return [self._deliver(message) for message in pushed if message is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients and return their replies in the order of the messages."""
        return self.pull_messages(self.push_messages(messages))

    def stream(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send the messages; run one client after the other and yield its reply.

        Nobody is too late: ``timeout`` means nothing here.
        """
        return self._pulled_one_by_one(deque(self.push_messages(messages)))

    def _pulled_one_by_one(self, pushed: deque[str]) -> Iterator[Message]:
        while pushed:
            found = deque(self.pull_messages([pushed.popleft()]))
            while found:  # nothing here holds what was handed on
                yield found.popleft()

    def _deliver(self, message: Message) -> Message:
        """Call the ClientApp; its reply has content of its own, as if it had traveled."""
        context = self._contexts[message.metadata.dst_node_id]
        with self._one_at_a_time:
            reply = ask(self._client_app, message, context)
        if reply.has_content():
            reply.content = _copy(reply.content, copy)
        return reply

    def _numbered(self, message: Message) -> str:
        """Give a message its id; return it."""
        message_id = str(next(self._message_ids))
        number_message(message, message_id)
        return message_id


def ask(app: ClientApp, message: Message, context: Context) -> Message:
    """Call a ClientApp; an exception becomes an error reply, as on a SuperNode."""
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(code=CLIENT_FAILED, reason=reason), reply_to=message)
    return reply


_RECORDS = {kind.__name__: kind for kind in (ConfigRecord, MetricRecord)}


def _to_state(record: ArrayRecord | ConfigRecord | MetricRecord) -> list[Any]:
    """Return a record as plain values."""
    if not isinstance(record, ArrayRecord):
        return [type(record).__name__, dict(record)]
    return ["ArrayRecord", arrays_to_state(record)]


def _from_state(kind: str, values: dict[str, Any]) -> ArrayRecord | ConfigRecord | MetricRecord:
    """Undo :func:`_to_state`."""
    if kind == "ArrayRecord":
        return arrays_from_state(values)
    return _RECORDS[kind](values)


Decoded = dict[int, tuple[Array, HeldArray]]
"""Arrays that were decoded, by their ids, with the arrays: their ids stay taken."""


def held_copy(content: RecordDict, decoded: Decoded) -> RecordDict:
    """Return a receiver's own content; its arrays are held, and decoded once for all receivers."""
    return _copy(content, partial(_hold, decoded))


def _copy(content: RecordDict, copy_array: Callable[[Array], Array]) -> RecordDict:
    """Copy the records, not the arrays' values: the sides share nothing they can change."""
    copied = content.copy()
    for name, record in content.items():
        twin: Any = record.copy()
        for key, value in record.items():
            if isinstance(value, Array):
                put(twin, key, copy_array(value))
            elif isinstance(value, list):
                put(twin, key, copy(value))
        put(copied, name, twin)
    return copied


def _hold(decoded: Decoded, array: Array) -> Array:
    if id(array) not in decoded:
        decoded[id(array)] = array, HeldArray.of(array)
    return copy(decoded[id(array)][1])
