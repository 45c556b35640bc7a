"""A grid whose clients are played by a pool of workers, each in a process of its own.

Small clients travel several to a call. What clients keep (``context.state``) lives with the grid,
so that any worker can play any client, a worker that dies is replaced and its clients are asked
again, and a run resumes like one of the in-process grid. How workers are reached is a subclass's
to say: Ray's actors (:mod:`.ray_grid`), or processes of this machine (:mod:`.process_grid`).
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_bgmd.flower import CLIENT_FAILED, carried
from fl_bgmd.held import num_bytes

from .config import Config
from .grid import Decoded, InProcessGrid, ask, asked_for, held_copy

CALL_BYTES = 1_000_000
"""About what one call brings back: smaller clients share calls, larger ones have their own."""

MOST_PER_CALL = 64

ATTEMPTS = 2
"""How often a client is asked whose worker dies."""

Asked = tuple[Any, Context]
"""A client on its way to a worker: the metadata of its message, and its context."""

Answer = tuple[RecordDict | Error, RecordDict]
"""A client's reply, and what it keeps."""


class WorkerDiedError(RuntimeError):
    """A worker ended in the middle of a call."""


class CallFailedError(RuntimeError):
    """What the clients of a call returned cannot travel."""


def play(
    app: ClientApp,
    run_config: Config,
    received: RecordDict,
    decoded: Decoded,
    clients: Sequence[Asked],
) -> list[Answer]:
    """Return, in a worker, the answers of clients to one content; ``decoded`` is kept with it."""
    found: list[Answer] = []
    for metadata, context in clients:
        context.run_config = dict(run_config)
        reply = ask(app, carried(metadata, held_copy(received, decoded)), context)
        found.append((reply.content if reply.has_content() else reply.error, context.state))
    return found


@dataclass(frozen=True)
class _Client:
    """A client with a message."""

    number: str
    message: Message
    attempt: int = 1


@dataclass
class _Call:
    """Clients that one worker plays one after the other."""

    clients: list[_Client]
    content: Any


@dataclass(eq=False)
class Seat:
    """A worker's place: who sits there, and the calls that it has.

    ``starting`` is the reference of a worker that takes no calls yet, None once it does. One for
    whom there is no room, since others hold it or a machine is gone, starts when there is.
    """

    worker: Any
    starting: Hashable | None = None
    calls: dict[Hashable, _Call] = field(default_factory=dict)

    @property
    def references(self) -> list[Hashable]:
        """What is waited for."""
        return [*self.calls] if self.starting is None else [self.starting]


class PooledGrid(InProcessGrid):
    """Flower's Grid over clients that workers play.

    Parameters
    ----------
    client_app : ClientApp
        Called for every message.
    num_clients : int
        Nodes ``1 .. num_clients``, partitions ``0 .. num_clients - 1``.
    run_config : dict
        What the clients see as ``context.run_config``.
    """

    in_flight = 1
    """Calls that a worker has at a time."""

    def __init__(self, client_app: ClientApp, num_clients: int, run_config: Config) -> None:
        super().__init__(client_app, num_clients, run_config)
        self._run_config = dict(run_config)
        self._seats: list[Seat] = []
        self._waiting: deque[_Call] = deque()
        self._replies: dict[str, Message] = {}

    # ---------------------------------------------------------- how workers are reached

    @abstractmethod
    def _hire(self) -> Seat:
        """Return a seat with a new worker."""

    @abstractmethod
    def _dismiss(self, worker: Any) -> None:
        """End a worker, whatever it does."""

    @abstractmethod
    def _share(self, content: RecordDict) -> Any:
        """Put a content where all workers can read it; return what they find it by."""

    @abstractmethod
    def _call(self, worker: Any, shared: Any, clients: list[Asked]) -> Hashable:
        """Have a worker play clients; return a reference to the answers to come."""

    @abstractmethod
    def _wait(self, references: list[Any], timeout: float | None) -> list[Any]:
        """Return the references whose answers are there, one at least within ``timeout`` s."""

    @abstractmethod
    def _result(self, reference: Any) -> list[Answer]:
        """Return answers that are there.

        Raises :class:`WorkerDiedError` or :class:`CallFailedError` where there are none.
        """

    # ------------------------------------------------------------------------ the grid

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand the messages to the workers; replies can be pulled as they come."""
        clients = [_Client(self._numbered(message), message) for message in messages]
        by_content: dict[int, list[_Client]] = {}
        for client in clients:
            by_content.setdefault(id(client.message.content), []).append(client)
        for group in by_content.values():
            content = group[0].message.content
            shared = self._share(content)
            per_call = self.clients_per_call(content, len(group))
            for start in range(0, len(group), per_call):
                self._waiting.append(_Call(group[start : start + per_call], shared))
        self._hand_out()
        return [client.number for client in clients]

    def pull_messages(  # type: ignore[override]  # both Flower's 1.42 and 1.43 call it
        self,
        reply_to_message_ids: Iterable[str] | None = None,
        *,
        message_ids: Iterable[str] | None = None,
    ) -> Iterable[Message]:
        """Return the replies that are there, each once."""
        asked = list(asked_for(reply_to_message_ids, message_ids))
        self._collect(0.0)
        return [self._replies.pop(key) for key in asked if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that come within ``timeout`` seconds, in the order of the messages."""
        messages = list(messages)
        replies = {
            reply.metadata.reply_to_message_id: reply
            for reply in self.stream(messages, timeout=timeout)
        }
        numbers = (message.metadata.message_id for message in messages)
        return [replies[number] for number in numbers if number in replies]

    def stream(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send the messages; yield replies as they come, within ``timeout`` seconds.

        Clients that are not done by then are cut off: their workers are replaced.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._stream(set(self.push_messages(messages)), deadline)

    def _stream(self, numbers: set[str], deadline: float | None) -> Iterator[Message]:
        while numbers:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._collect(left, most=1)
            came = numbers & self._replies.keys()
            if not came and left == 0.0:
                self._cut_off(numbers)
                return
            numbers -= came
            for number in sorted(came, key=int):
                yield self._replies.pop(number)

    # ---------------------------------------------------------------------------- calls

    def clients_per_call(self, content: RecordDict, count: int) -> int:
        """Return how many of ``count`` clients that get this content share a call."""
        records = content.array_records.values()
        size = sum(num_bytes(array) for arrays in records for array in arrays.values())
        fair = -(-count // (len(self._seats) * self.in_flight))
        return max(1, min(fair, MOST_PER_CALL, CALL_BYTES // max(1, size)))

    def _hand_out(self) -> None:
        """Give waiting calls to the workers that have the fewest."""
        while self._waiting and (free := [s for s in self._seats if s.starting is None]):
            seat = min(free, key=lambda seat: len(seat.calls))
            if len(seat.calls) >= self.in_flight:
                return
            call = self._waiting.popleft()
            clients = [(c.message.metadata, self._bare(c.message)) for c in call.clients]
            try:
                seat.calls[self._call(seat.worker, call.content, clients)] = call
            except WorkerDiedError as error:
                seat.calls[object()] = call
                self._replace(seat, error)

    def _bare(self, message: Message) -> Context:
        """Return a client's context without the run configuration, which workers have."""
        context = self._contexts[message.metadata.dst_node_id]
        return Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=context.state,
            run_config={},
        )

    def _collect(self, timeout: float | None, most: int | None = None) -> None:
        """Take in what is there, or the first thing that comes within ``timeout`` seconds.

        Of what is there ``most`` calls at most.
        """
        self._hand_out()
        if not self._waiting and not any(seat.calls for seat in self._seats):
            return
        seats = {reference: seat for seat in self._seats for reference in seat.references}
        for reference in self._wait(list(seats), timeout)[:most]:
            seat = seats[reference]
            if reference not in seat.references:  # its worker died meanwhile
                continue
            if reference == seat.starting:
                self._seated(seat)
                continue
            try:
                answers = self._result(reference)
            except CallFailedError as error:
                call = seat.calls.pop(reference)
                self._answer(call, [(_failed(str(error)), None)] * len(call.clients))
            except WorkerDiedError as error:
                self._replace(seat, error)
            else:
                self._answer(seat.calls.pop(reference), answers)
        self._hand_out()

    def _seated(self, seat: Seat) -> None:
        """Let a worker whose start is over take calls, or put another one in its place."""
        reference, seat.starting = seat.starting, None
        try:
            self._result(reference)
        except WorkerDiedError as error:
            self._replace(seat, error)

    def _answer(self, call: _Call, answers: Sequence[tuple[RecordDict | Error, Any]]) -> None:
        for client, (reply, state) in zip(call.clients, answers, strict=True):
            self._replies[client.number] = Message(reply, reply_to=client.message)
            if state is not None:
                self._contexts[client.message.metadata.dst_node_id].state = state

    def _replace(self, seat: Seat, error: WorkerDiedError) -> None:
        """Put a new worker in the place of a dead one, and ask its clients again, each alone."""
        lost = [(client, call.content) for call in seat.calls.values() for client in call.clients]
        self._renew(seat)
        for client, content in lost:
            if client.attempt < ATTEMPTS:
                again = _Client(client.number, client.message, client.attempt + 1)
                self._waiting.appendleft(_Call([again], content))
            else:
                reason = f"the client's process died: {error}"
                self._answer(_Call([client], content), [(_failed(reason), None)])

    def _cut_off(self, numbers: set[str]) -> None:
        """Forget clients that are too late; a worker that still plays one is replaced."""
        self._waiting = deque(c for c in self._waiting if c.clients[0].number not in numbers)
        for seat in self._seats:
            late = [call for call in seat.calls.values() if call.clients[0].number in numbers]
            if late:
                kept = [call for call in seat.calls.values() if call not in late]
                self._waiting.extendleft(kept)
                self._renew(seat)

    def _renew(self, seat: Seat) -> None:
        """Put a seat with a new worker in the place of another."""
        seat.calls.clear()
        self._dismiss(seat.worker)
        self._seats[self._seats.index(seat)] = self._hire()


def _failed(reason: str) -> Error:
    return Error(code=CLIENT_FAILED, reason=reason)
