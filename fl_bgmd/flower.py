"""All that this project uses of Flower's private or unsettled names, and what it is for.

Each goes when its successor comes: see the functions.
"""

import time
from collections.abc import Callable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.message.typeddict import TypedDict
from flwr.clientapp import ClientApp
from flwr.common import Metadata
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_FAILED",
    "Run",
    "carried",
    "chunks_of",
    "empty_run",
    "enter_run",
    "number_message",
    "put",
    "received_message",
    "simulate",
]

CLIENT_FAILED = 2
"""Flower's error code for an exception in a ClientApp (``ErrorCode``, which is not exported)."""


def enter_run() -> None:
    """Let this process make messages: Flower keeps the identity of its run in a global.

    Until a message can be made without a run.
    """
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def empty_run() -> Run:
    """Return the run of a grid that belongs to none; ``Grid.run`` has to return one."""
    return Run.create_empty(run_id=1)


def number_message(message: Message, number: str) -> None:
    """Give a message its id, as the SuperLink does on the way; there is no setter."""
    message.metadata.__dict__["_message_id"] = number


def put(record: TypedDict[str, Any], key: str, value: Any) -> None:
    """Put a value of the right type into a record, unchecked: the checks take longer than a copy.

    Until there is a record that copies what it holds.
    """
    record.__dict__["_data"][key] = value


def chunks_of(data: memoryview) -> list[tuple[str, ArrayChunk]]:
    """Return the chunks that an array's bytes travel as, with their ids.

    As ``Array.slice_array`` makes them of its ``data``, which has to be in memory. Until there is
    an array whose bytes are elsewhere.
    """
    size = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    made = [ArrayChunk(data[start : start + size]) for start in range(0, len(data), size)]
    return [(chunk.object_id, chunk) for chunk in made]


def received_message(node: int, **body: RecordDict | Error) -> Message:
    """Return a message with ``content=`` or ``error=`` as if it had come from a node.

    As Flower builds what arrives: its public constructors need a run, and servers of the older API
    exist outside of one.
    """
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=node,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=1.0,
        message_type="train",
    )
    made: Message = Message(metadata=metadata, **body)  # type: ignore[call-overload]
    return made


def carried(metadata: Metadata, content: RecordDict) -> Message:
    """Return a message that was taken apart: Flower's public constructors make new metadata."""
    made: Message = Message(metadata=metadata, content=content)  # type: ignore[call-overload]
    return made


def simulate(
    server_app: ServerApp, client_app: ClientApp, num_clients: int, backend_config: dict[str, Any]
) -> None:
    """Run an app on Flower's Ray engine: its Python entry point has no public successor yet."""
    from flwr.simulation import run_simulation

    run: Callable[..., None] = run_simulation
    run(server_app, client_app, num_supernodes=num_clients, backend_config=backend_config)
