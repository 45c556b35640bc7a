"""Flower's Grid over processes of this machine: one run on several cores, without Ray.

The model and the replies travel as values through shared memory, everything else through pipes. A
run is the same to the bit as one of the in-process grid: each client's randomness is its own.
"""

import os
import pickle
from collections.abc import Callable, Hashable, Sequence
from io import BytesIO
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Self

import torch
from flwr.app import Array, RecordDict
from flwr.clientapp import ClientApp
from threadpoolctl import threadpool_limits

from fl_bgmd.flower import enter_run
from fl_bgmd.held import HeldArray

from .config import Config
from .grid import Decoded
from .pooled_grid import Answer, Asked, CallFailedError, PooledGrid, Seat, WorkerDiedError, play
from .processes import interrupts_held_back, take_over, workers

# ------------------------------------------------------------------- values in shared memory


class _Pickler(pickle.Pickler):
    """Leaves the values of arrays out, for shared memory."""

    def reducer_override(self, value: Any) -> Any:
        """Reduce arrays; everything else as it does itself."""
        if isinstance(value, HeldArray) and value.is_held:
            return HeldArray, (value.tensor().numpy(),)
        if isinstance(value, Array):
            return _array, (value.dtype, value.shape, value.stype, pickle.PickleBuffer(value.data))
        return NotImplemented


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    return Array(dtype, tuple(shape), stype, bytes(data))


def _pickled(value: Any) -> tuple[bytes, list[memoryview]]:
    """Return a value without the contents of its arrays, and these."""
    stream, buffers = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return stream.getvalue(), [buffer.raw() for buffer in buffers]


class _Block:
    """Shared memory that its owner unlinks when nobody here knows it any more."""

    def __init__(self, size: int) -> None:
        self.memory = SharedMemory(create=True, size=max(1, size))

    def __del__(self) -> None:
        """Unlink it: who has it open may read on."""
        self.memory.close()
        self.memory.unlink()


def _write(memory: SharedMemory, buffers: Sequence[memoryview]) -> list[int]:
    """Write buffers one after the other; return their sizes."""
    start, sizes, room = 0, [buffer.nbytes for buffer in buffers], _bytes_of(memory)
    for buffer, size in zip(buffers, sizes, strict=True):
        room[start : start + size] = buffer
        start += size
    return sizes


def _read(memory: SharedMemory, sizes: Sequence[int]) -> list[bytearray]:
    """Return copies of the buffers that somebody wrote."""
    start, found, room = 0, [], _bytes_of(memory)
    for size in sizes:
        found.append(bytearray(room[start : start + size]))
        start += size
    return found


def _bytes_of(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None  # it is open
    return memory.buf


class _Shared:
    """A content that workers find by the name of its block."""

    def __init__(self, content: RecordDict) -> None:
        self.pickled, buffers = _pickled(content)
        self.size = sum(buffer.nbytes for buffer in buffers)
        self._block = _Block(self.size)
        self.sizes = _write(self._block.memory, buffers)
        self.name = self._block.memory.name


# --------------------------------------------------------------------------------- workers


def _work(
    channel: Connection,
    load_app: Callable[[], ClientApp],
    config: Config,
    threads: int,
    environment: dict[str, str],
) -> None:
    """Play clients until the grid has gone."""
    take_over(environment)
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
    enter_run()
    app = load_app()
    known, received, decoded = "", RecordDict(), Decoded()
    while True:
        try:
            task = channel.recv()
        except (EOFError, OSError):
            return
        name, pickled, sizes, room, clients = task
        if name != known:
            received = pickle.loads(pickled, buffers=_copied(name, sizes))
            known, decoded = name, {}
        try:
            answers, buffers = _pickled(play(app, config, received, decoded, clients))
        except Exception as error:
            channel.send((None, f"{type(error).__name__}: {error}", []))
            continue
        memory = SharedMemory(room)
        if sum(buffer.nbytes for buffer in buffers) <= memory.size:
            channel.send((answers, None, _write(memory, buffers)))
        else:
            channel.send((answers, [bytes(buffer) for buffer in buffers], []))
        del buffers
        memory.close()


def _copied(name: str, sizes: Sequence[int]) -> list[bytearray]:
    memory = SharedMemory(name)
    try:
        return _read(memory, sizes)
    finally:
        memory.close()


class _Worker:
    """A process that plays clients, and the memory in which it leaves what they answer."""

    def __init__(self, process: BaseProcess, channel: Connection) -> None:
        self.process = process
        self.channel = channel
        self.room = _Block(1)

    def make_room(self, size: int) -> str:
        """Return the name of memory of ``size`` bytes or more."""
        if self.room.memory.size < size:
            self.room = _Block(size)
        return self.room.memory.name

    def ended(self) -> WorkerDiedError:
        """Return how the process ended."""
        self.process.join(timeout=10)
        return WorkerDiedError(f"exit code {self.process.exitcode}")


class ProcessGrid(PooledGrid):
    """Flower's Grid over clients that processes of this machine play.

    Parameters
    ----------
    load_app : callable
        Returns the ClientApp; called in each process, which must be able to import it.
    num_clients : int
        Nodes ``1 .. num_clients``, partitions ``0 .. num_clients - 1``.
    run_config : dict
        What the clients see as ``context.run_config``.
    jobs : int
        Processes, at least 1; more than clients are of no use and not started.
    """

    def __init__(
        self,
        load_app: Callable[[], ClientApp],
        num_clients: int,
        run_config: Config,
        *,
        jobs: int,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; allowed: 1 or more")
        super().__init__(ClientApp(), num_clients, run_config)
        self._load_app = load_app
        self._threads = max(1, torch.get_num_threads() // jobs)
        for _ in range(min(jobs, num_clients)):
            self._seats.append(self._hire())

    def __enter__(self) -> Self:
        """Return the grid."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for seat in self._seats:
            self._dismiss(seat.worker)

    def _hire(self) -> Seat:
        ours, theirs = workers().Pipe()
        given = theirs, self._load_app, self._run_config, self._threads, dict(os.environ)
        process = workers().Process(target=_work, args=given, daemon=True)
        with interrupts_held_back():
            process.start()
        theirs.close()
        return Seat(_Worker(process, ours))

    def _dismiss(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.channel.close()

    def _share(self, content: RecordDict) -> _Shared:
        return _Shared(content)

    def _call(self, worker: _Worker, shared: _Shared, clients: list[Asked]) -> Hashable:
        # Momentum and the like come back beside the update; what finds no room takes the pipe.
        room = worker.make_room(2 * shared.size * len(clients))
        try:
            worker.channel.send((shared.name, shared.pickled, shared.sizes, room, clients))
        except OSError as error:
            raise worker.ended() from error
        return worker

    def _wait(self, references: list[_Worker], timeout: float | None) -> list[_Worker]:
        by_channel = {worker.channel: worker for worker in references}
        return [by_channel[found] for found in connection.wait(by_channel, timeout)]  # type: ignore[index]

    def _result(self, reference: _Worker) -> list[Answer]:
        try:
            answers, beside, sizes = reference.channel.recv()
        except (EOFError, OSError) as error:
            raise reference.ended() from error
        if answers is None:
            raise CallFailedError(beside)
        buffers = _read(reference.room.memory, sizes) if beside is None else beside
        found: list[Answer] = pickle.loads(answers, buffers=buffers)
        return found
