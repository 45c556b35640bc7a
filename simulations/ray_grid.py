"""Flower's Grid on Ray's actors and object store: clients on all cores, GPUs and machines.

The model is put into the object store once a round; each worker of a node reads it from there.
Small clients travel several to a call. What clients keep (``context.state``) lives with the grid,
so that any worker can play any client, a worker that dies is replaced and its clients are asked
again, and a run resumes like one of the in-process grid.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import RayError, RayTaskError

from fl_bgmd.flower import CLIENT_FAILED, carried, enter_run
from fl_bgmd.held import num_bytes

from .config import Config
from .grid import Decoded, InProcessGrid, ask, asked_for, held_copy

CALL_BYTES = 1_000_000
"""About what one call brings back: smaller clients share calls, larger ones have their own."""

MOST_PER_CALL = 64

IN_FLIGHT = 2
"""Calls that a worker has at a time: the next one waits there, not here."""

ATTEMPTS = 2
"""How often a client is asked whose worker dies."""

Answer = tuple[RecordDict | Error, RecordDict]
"""A client's reply, and what it keeps."""


@dataclass(frozen=True)
class _Asked:
    """A client with a message."""

    number: str
    message: Message
    attempt: int = 1


@dataclass
class _Call:
    """Clients that one worker plays one after the other."""

    asked: list[_Asked]
    content: "ray.ObjectRef[RecordDict]"


class _Worker:
    """Plays clients in a process of its own."""

    def __init__(self, app: ClientApp, run_config: Config) -> None:
        enter_run()
        self._app = app
        self._run_config = run_config
        self._content: tuple[Any, RecordDict, Decoded] | None = None

    def ready(self) -> None:
        """Return once the process is up and has imported what the app needs."""

    def play(self, content: list[Any], clients: Sequence[tuple[Any, Context]]) -> list[Answer]:
        """Return the answers of clients to one content, which is fetched once.

        ``content`` holds its reference: Ray would fetch a bare one for each call.
        """
        if self._content is None or self._content[0] != content[0]:
            self._content = (content[0], ray.get(content[0]), {})
        _, received, decoded = self._content
        found: list[Answer] = []
        for metadata, context in clients:
            context.run_config = dict(self._run_config)
            message = carried(metadata, held_copy(received, decoded))
            reply = ask(self._app, message, context)
            found.append((reply.content if reply.has_content() else reply.error, context.state))
        return found


@dataclass
class _Seat:
    """A worker's place: who sits there, and the calls that it has."""

    worker: Any
    calls: dict[Any, _Call] = field(default_factory=dict)


class RayGrid(InProcessGrid):
    """Flower's Grid over clients that Ray's workers play.

    Parameters
    ----------
    client_app : ClientApp
        Called for every message; it and what it needs must be importable on every machine.
    num_clients : int
        Nodes ``1 .. num_clients``, partitions ``0 .. num_clients - 1``.
    run_config : dict
        What the clients see as ``context.run_config``.
    num_cpus, num_gpus : float
        What a client needs; as many workers run as the machines have room for.
    address : str
        ``HOST:PORT`` of a running cluster; empty: a Ray of its own on this machine.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: Config,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        address: str = "",
    ) -> None:
        super().__init__(client_app, num_clients, run_config)
        self._run_config = dict(run_config)
        ray.init(
            address=address or None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=None if address else False,
            # Workers find what this process finds: an app's module, rules of one's own.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}},
        )
        try:
            self._app = ray.put(client_app)
            self._kind = ray.remote(_Worker).options(
                num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy="SPREAD"
            )
            room = sum(_room(node["Resources"], num_cpus, num_gpus) for node in _machines())
            self._seats = [_Seat(self._hire()) for _ in range(min(num_clients, max(1, room)))]
            # Imports take seconds that are not the first round's.
            ray.get([seat.worker.ready.remote() for seat in self._seats])
        except BaseException:
            ray.shutdown()
            raise
        self._waiting: deque[_Call] = deque()
        self._replies: dict[str, Message] = {}

    def __enter__(self) -> Self:
        """Return the grid."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers and, where it was this grid's own, Ray go."""
        ray.shutdown()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand the messages to the workers; replies can be pulled as they come."""
        asked = [_Asked(self._numbered(message), message) for message in messages]
        by_content: dict[int, list[_Asked]] = {}
        for client in asked:
            by_content.setdefault(id(client.message.content), []).append(client)
        for clients in by_content.values():
            content = clients[0].message.content
            shared = ray.put(content)
            together = self.clients_per_call(content, len(clients))
            for start in range(0, len(clients), together):
                self._waiting.append(_Call(clients[start : start + together], shared))
        self._hand_out()
        return [client.number for client in asked]

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

    # ---------------------------------------------------------------------------- workers

    def _hire(self) -> Any:
        return self._kind.remote(self._app, self._run_config)

    def clients_per_call(self, content: RecordDict, count: int) -> int:
        """Return how many of ``count`` clients that get this content share a call."""
        records = content.array_records.values()
        size = sum(num_bytes(array) for arrays in records for array in arrays.values())
        fair = -(-count // (len(self._seats) * IN_FLIGHT))
        return max(1, min(fair, MOST_PER_CALL, CALL_BYTES // max(1, size)))

    def _hand_out(self) -> None:
        """Give waiting calls to the workers that have the fewest."""
        while self._waiting:
            seat = min(self._seats, key=lambda seat: len(seat.calls))
            if len(seat.calls) >= IN_FLIGHT:
                return
            call = self._waiting.popleft()
            clients = [(c.message.metadata, self._bare(c.message)) for c in call.asked]
            seat.calls[seat.worker.play.remote([call.content], clients)] = call

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
        seats = {reference: seat for seat in self._seats for reference in seat.calls}
        if not seats:
            return
        ready, _ = ray.wait(list(seats), timeout=timeout)
        more, _ = ray.wait(list(seats), num_returns=len(seats), timeout=0)
        for reference in [*dict.fromkeys((*ready, *more))][:most]:
            seat = seats[reference]
            if reference not in seat.calls:  # its worker died meanwhile
                continue
            try:
                answers = ray.get(reference)
            except RayTaskError as error:  # what the client returned cannot travel
                call = seat.calls.pop(reference)
                reason = f"{type(error.cause or error).__name__}: {error.cause or error}"
                self._answer(call, [(_failed(reason), None)] * len(call.asked))
            except RayError as error:
                self._replace(seat, error)
            else:
                self._answer(seat.calls.pop(reference), answers)
        self._hand_out()

    def _answer(self, call: _Call, answers: Sequence[tuple[RecordDict | Error, Any]]) -> None:
        for client, (reply, state) in zip(call.asked, answers, strict=True):
            self._replies[client.number] = Message(reply, reply_to=client.message)
            if state is not None:
                self._contexts[client.message.metadata.dst_node_id].state = state

    def _replace(self, seat: _Seat, error: RayError) -> None:
        """Put a new worker in the place of a dead one, and ask its clients again, each alone."""
        lost = [client for call in seat.calls.values() for client in call.asked]
        contents = {id(c): call.content for call in seat.calls.values() for c in call.asked}
        seat.calls.clear()
        seat.worker = self._hire()
        for client in lost:
            content = contents[id(client)]
            if client.attempt < ATTEMPTS:
                again = _Asked(client.number, client.message, client.attempt + 1)
                self._waiting.appendleft(_Call([again], content))
            else:
                reason = f"the client's process died: {type(error).__name__}"
                self._answer(_Call([client], content), [(_failed(reason), None)])

    def _cut_off(self, numbers: set[str]) -> None:
        """Forget clients that are too late; a worker that still plays one is replaced."""
        self._waiting = deque(call for call in self._waiting if call.asked[0].number not in numbers)
        for seat in self._seats:
            late = [call for call in seat.calls.values() if call.asked[0].number in numbers]
            if late:
                ray.kill(seat.worker)
                kept = [call for call in seat.calls.values() if call not in late]
                self._waiting.extendleft(kept)
                seat.calls.clear()
                seat.worker = self._hire()


def _failed(reason: str) -> Error:
    return Error(code=CLIENT_FAILED, reason=reason)


def _machines() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _room(machine: dict[str, float], num_cpus: float, num_gpus: float) -> int:
    """Return how many workers fit on a machine."""
    rooms = [
        int(machine.get(name, 0) / needed + 1e-9)
        for name, needed in (("CPU", num_cpus), ("GPU", num_gpus))
        if needed > 0
    ]
    return min(rooms, default=1)
