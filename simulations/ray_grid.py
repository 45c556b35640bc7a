"""Flower's Grid on Ray's actors and object store: clients on all cores, GPUs and machines.

The model is put into the object store once a round; each worker of a node reads it from there.
"""

import logging
from collections.abc import Hashable
from typing import Any, Self

import ray
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import RayError, RayTaskError

from fl_bgmd.flower import enter_run
from fl_bgmd.ray_cluster import join, machines, same_imports

from .config import Config
from .grid import Decoded
from .pooled_grid import Answer, Asked, CallFailedError, PooledGrid, Seat, WorkerDiedError, play

LOG = logging.getLogger("flwr.fl_bgmd")

PATIENCE = 20.0
"""Seconds that a run waits for the second worker and all others before it begins."""


class _Worker:
    """Plays clients in a process of its own."""

    def __init__(self, app: ClientApp, run_config: Config) -> None:
        enter_run()
        self._app = app
        self._run_config = run_config
        self._content: tuple[Any, RecordDict, Decoded] | None = None

    def ready(self) -> None:
        """Return once the process is up and has imported what the app needs."""

    def play(self, content: list[Any], clients: list[Asked]) -> list[Answer]:
        """Return the answers of clients to one content, which is fetched once.

        ``content`` holds its reference: Ray would fetch a bare one for each call.
        """
        if self._content is None or self._content[0] != content[0]:
            self._content = (content[0], ray.get(content[0]), {})
        _, received, decoded = self._content
        return play(self._app, self._run_config, received, decoded, clients)


class RayGrid(PooledGrid):
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

    in_flight = 2  # the next one waits there, not here

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
        join(address, runtime_env=same_imports())
        try:
            self._app = ray.put(client_app)
            self._kind = ray.remote(_Worker).options(
                num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy="SPREAD"
            )
            room = sum(_room(node["Resources"], num_cpus, num_gpus) for node in machines())
            self._seats = [self._hire() for _ in range(min(num_clients, max(1, room)))]
            self._await_workers()
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> Self:
        """Return the grid."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers and, where it was this grid's own, Ray go."""
        ray.shutdown()

    def _hire(self) -> Seat:
        worker: Any = self._kind.remote(self._app, self._run_config)
        return Seat(worker, starting=worker.ready.remote())

    def _await_workers(self) -> None:
        """Wait for one worker, and a while for all: imports are not the first round's time."""
        starting = [seat.starting for seat in self._seats]
        ray.wait(starting)
        started, others = ray.wait(starting, num_returns=len(starting), timeout=PATIENCE)
        ray.get(started)  # or what keeps them from starting
        for seat in self._seats:
            seat.starting = seat.starting if seat.starting in others else None
        if others:
            LOG.warning(
                "%s of %s workers have started; the others join the run once the cluster has room",
                len(started),
                len(starting),
            )

    def _dismiss(self, worker: Any) -> None:
        ray.kill(worker)

    def _share(self, content: RecordDict) -> Any:
        return ray.put(content)

    def _call(self, worker: Any, shared: Any, clients: list[Asked]) -> Hashable:
        reference: Hashable = worker.play.remote([shared], clients)
        return reference

    def _wait(self, references: list[Any], timeout: float | None) -> list[Any]:
        ready, _ = ray.wait(references, timeout=timeout)
        more, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [*dict.fromkeys((*ready, *more))]

    def _result(self, reference: Any) -> list[Answer]:
        try:
            answers: list[Answer] = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause or error
            raise CallFailedError(f"{type(cause).__name__}: {cause}") from error
        except RayError as error:
            raise WorkerDiedError(type(error).__name__) from error
        return answers


def _room(machine: dict[str, float], num_cpus: float, num_gpus: float) -> int:
    """Return how many workers fit on a machine; a share of a GPU is a share of one."""
    cpus, gpus = machine.get("CPU", 0), machine.get("GPU", 0)
    rooms = [int(cpus / num_cpus + 1e-9)] if num_cpus else []
    if num_gpus >= 1:
        rooms.append(int(gpus / num_gpus + 1e-9))
    elif num_gpus:
        rooms.append(int(gpus) * int(1 / num_gpus + 1e-9))
    return min(rooms, default=1)
