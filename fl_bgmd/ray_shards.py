"""Shards on Ray: one worker on each machine of a cluster holds a range of the columns."""

import logging
import os
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from .ray_cluster import check_answers, join, machines, same_imports
from .shards import Call, Crew, RowsGoneError, Shard, Sharded, ShardsError, Step, even_edges

LOG = logging.getLogger("flwr.fl_bgmd")

ATTEMPTS = 3
"""How often a shard is asked whose worker dies."""

_PIECE = 1 << 26  # bytes of rows that are on their way to a worker at a time


class _Worker:
    """Holds a range of the columns in a process of its own."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._shard: Shard | None = None
        self._rows = torch.empty(0, 0)

    def begin(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Make room for rows."""
        self._shard = None
        self._rows = torch.empty(shape, dtype=dtype)

    def write(self, start: int, piece: Any) -> None:
        """Take a piece of the columns, which begins at one of them."""
        columns = slice(start, start + piece.shape[1])
        if isinstance(piece, Tensor):
            self._rows[:, columns] = piece
        else:
            self._rows.numpy()[:, columns] = piece

    def end(self) -> None:
        """Take note that all columns are here, or that they are not needed any more."""
        self._shard, self._rows = Shard(self._rows), torch.empty(0, 0)

    def call(self, steps: list[Step], call: Call) -> Any:
        """Return what a call comes to: see :class:`.shards.Shard`."""
        if self._shard is None:
            raise RowsGoneError
        return self._shard.call(steps, call)

    def release(self) -> None:
        """Let go of the rows."""
        self._shard, self._rows = None, torch.empty(0, 0)

    def pid(self) -> int:
        """Return the process."""
        return os.getpid()


class RayCrew(Crew):
    """Workers of a Ray cluster, one on each machine, as many threads as it has CPUs.

    They are given the rows again where they have lost them: after their death, or after steps
    that wrote over them.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of a running cluster; empty: that which this process is connected to, or a
        Ray of its own.
    """

    def __init__(self, address: str = "") -> None:
        self._owns = not ray.is_initialized()
        if self._owns:
            _check_answers(address)
            join(address)
        self._workers: list[Any] = []
        try:
            self._workers = [self._hire(i) for i in range(len(machines()))]
            ray.get([worker.pid.remote() for worker in self._workers])
        except BaseException:
            self.close()
            raise
        LOG.info("the rows of rounds are in shards on %s machines", len(self._workers))

    def close(self) -> None:
        """Let the workers and, where it was this crew's own, Ray go."""
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
            if self._owns:
                ray.shutdown()
        self._workers = []

    def pids(self) -> list[int]:
        """Return the workers' processes."""
        return [int(pid) for pid in ray.get([worker.pid.remote() for worker in self._workers])]

    def hold(self, rows: Tensor) -> Sharded:
        """See :class:`.shards.Crew`; they hold one matrix at a time."""
        edges = even_edges(rows.shape[1], len(self._workers))
        held = Sharded(self, rows, edges, rows.shape, rows.dtype)
        sent = [self._send(held, shard) for shard in range(len(held.columns))]
        for shard, last in enumerate(sent):
            self._result(held, shard, last)
        return held

    def release(self) -> None:
        """Let the workers forget the rows."""
        for worker in self._workers:
            worker.release.remote()

    def call(self, rows: Sharded, call: Call) -> list[Any]:
        """See :class:`.shards.Crew`."""

        def ask(shard: int) -> Any:
            columns = rows.columns[shard]
            steps = [Step(s.call.at(columns), s.instead, s.number) for s in rows.steps]
            return self._workers[shard].call.remote(steps, call.at(columns))

        asked = [ask(shard) for shard in range(len(rows.columns))]  # they work at the same time
        return [self._result(rows, shard, asked[shard], ask) for shard in range(len(asked))]

    def _result(
        self, rows: Sharded, shard: int, asked: Any, ask: Callable[[int], Any] | None = None
    ) -> Any:
        """Return the result of a shard: if its worker dies, of another one that has its rows.

        ``ask`` asks that one; None: sending the rows was all.
        """
        attempt = 1
        while True:
            try:
                return ray.get(asked)
            except RayTaskError as error:
                if not isinstance(error.cause, RowsGoneError):
                    raise error.cause or error from error
            except RayError as error:
                if attempt == ATTEMPTS:
                    why = f"the workers of shard {shard} died {attempt} times: {error}"
                    raise ShardsError(why) from error
                attempt += 1
                LOG.warning(
                    "the worker of shard %s died (%s): another one takes its columns",
                    *(shard, type(error).__name__),
                )
                self._workers[shard] = self._hire(shard)
            sent = self._send(rows, shard)
            asked = sent if ask is None else ask(shard)

    def _send(self, rows: Sharded, shard: int) -> Any:
        """Send a worker its columns, a piece at a time; return the last call's reference."""
        columns, worker, source = rows.columns[shard], self._workers[shard], rows.source
        count = columns.stop - columns.start
        last = worker.begin.remote((len(source), count), source.dtype)
        width = max(1, _PIECE // (len(source) * source.dtype.itemsize))
        for start in range(0, count, width):
            part = slice(columns.start + start, columns.start + min(start + width, count))
            piece = source[:, part].contiguous()
            plain = source.dtype in (torch.float32, torch.float64)
            before, last = last, worker.write.remote(start, piece.numpy() if plain else piece)
            ray.wait([before])  # one piece is on its way while the next one is cut
        return worker.end.remote()

    def _hire(self, shard: int) -> Any:
        there = machines()
        machine = there[shard % len(there)]
        kind = ray.remote(_Worker).options(
            num_cpus=0,  # clients that the same machines play have those
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine["NodeID"], soft=True),
            runtime_env=same_imports(),
        )
        return kind.remote(max(1, int(machine["Resources"].get("CPU", 1))))


def _check_answers(address: str) -> None:
    """Raise :class:`ShardsError` where no cluster answers."""
    if not address:
        return
    try:
        check_answers(address)
    except (OSError, ValueError) as error:
        raise ShardsError(
            f"shards_address is {address!r} ({error}); allowed: empty, or HOST:PORT of a running "
            "Ray cluster that this machine belongs to"
        ) from error
