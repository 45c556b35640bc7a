"""Where a run's clients live: on Ray, on Flower's own Ray engine (``flower``), or in this process.

In this process they work one after the other (``inprocess``) or together (``vectorized``): the same
but for the order of sums. ``vectorized`` is for small batches on a GPU; on a CPU, where it computes
640 examples at a time at most (64 of a convolution: what fits the cache), it saves nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_bgmd.clients import app as client_app
from fl_bgmd.clients import prepare_together
from fl_bgmd.extras import require
from fl_bgmd.flower import simulate

from .config import Config, ConfigError, named, validate
from .experiment import OnRound, RunResult, run_experiment
from .grid import InProcessGrid
from .process_grid import ProcessGrid
from .trackers import check_log

BACKENDS = ("ray", "flower", "inprocess", "vectorized")

ON_RAY = ("ray", "flower")


@dataclass(frozen=True)
class ClientResources:
    """What Ray sets aside for one client.

    Attributes
    ----------
    num_cpus, num_gpus : float
        CPUs (1 or more) and GPUs (0 or more, also fractions).
    ray_address : str
        ``HOST:PORT`` of a running Ray cluster that this machine belongs to; empty: a Ray of its
        own on this machine.

    Raises
    ------
    ConfigError
        For more than one machine has (Flower would wait for it forever), and for an address
        where no cluster answers.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    ray_address: str = ""

    def __post_init__(self) -> None:
        """Check both against this machine or the machines of the cluster."""
        if self.ray_address:
            machines, owner = cluster_machines(self.ray_address), "a machine of the cluster"
        else:
            machines = [(os.cpu_count() or 1, torch.cuda.device_count())]
            owner = "this machine"
        if any(
            1 <= self.num_cpus <= cpus and 0 <= self.num_gpus <= gpus for cpus, gpus in machines
        ):
            return
        for name, value, least, most in (
            ("client-resources-num-cpus", self.num_cpus, 1, max(cpus for cpus, _ in machines)),
            ("client-resources-num-gpus", self.num_gpus, 0, max(gpus for _, gpus in machines)),
        ):
            if not least <= value <= most:
                raise ConfigError(
                    f"{name} is {value:g}; allowed: {least} to {most:g}, what {owner} has"
                )
        raise ConfigError(
            f"client-resources-num-cpus is {self.num_cpus:g} with client-resources-num-gpus "
            f"{self.num_gpus:g}; allowed: what one machine of the cluster has"
        )

    def to_backend_config(self) -> dict[str, dict[str, float | bool | str]]:
        """Return Flower's configuration of its Ray backend."""
        from fl_bgmd.ray_cluster import OWN

        return {
            "client_resources": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "init_args": {
                "address": self.ray_address or OWN,
                "log_to_driver": False,
                "include_dashboard": False,
            },
        }


def cluster_machines(address: str) -> list[tuple[float, float]]:
    """Return the CPUs and GPUs of each machine of a running Ray cluster.

    Raises :class:`ConfigError` where none answers.
    """
    import ray

    from fl_bgmd.ray_cluster import check_answers, join, machines

    try:
        check_answers(address)
        join(address)
    except (ConnectionError, OSError) as error:
        raise ConfigError(
            f"ray-address is {address!r} ({error}); allowed: empty, or HOST:PORT of a running Ray "
            "cluster that this machine belongs to"
        ) from error
    try:
        rooms = [machine["Resources"] for machine in machines()]
    finally:
        ray.shutdown()
    return [(found.get("CPU", 0), found.get("GPU", 0)) for found in rooms]


class ConfiguredClientApp(ClientApp):
    """A ClientApp that sees a given run configuration.

    Flower fills ``context.run_config`` only for ``flwr run``; from Python it is empty.
    """

    def __init__(self, inner: ClientApp, run_config: Config) -> None:
        super().__init__()
        self._inner = inner
        self._run_config = run_config

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the inner app; ``context.state`` stays the node's own."""
        configured = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=context.state,
            run_config=dict(self._run_config),
        )
        reply = self._inner(message, configured)
        context.state = configured.state
        return reply


def run(
    config: Mapping[str, Any] | None = None,
    /,
    *,
    backend: str = "inprocess",
    resources: ClientResources | None = None,
    jobs: int = 1,
    on_round: OnRound | None = None,
    folder: Path | str | None = None,
    **settings: Any,
) -> RunResult:
    """Run one configuration and return its result.

    ``run(strategy="bgmd", attack="bit-flip:100", byzantine_fraction=0.4)`` sets keys of the run
    configuration (``fl-bgmd keys``), with underscores; ``run({"byzantine-fraction": 0.4})`` as they
    are. Exceptions of the server or of Ray become a result with status ``failed`` and the error.

    Parameters
    ----------
    config : mapping, optional
        Keys and values; the others have their defaults.
    backend : str
        Where the clients are: one of :data:`BACKENDS`.
    resources : ClientResources, optional
        What Ray sets aside for a client.
    jobs : int
        Processes that play the clients, with backend ``inprocess``; the result is the same to the
        bit. Scripts then need the usual ``if __name__ == "__main__"``.
    on_round : callable, optional
        Called after each round with its number and the accuracy, None where it was not evaluated.
    folder : path, optional
        Gets what the run leaves behind (:meth:`.experiment.RunResult.write`).
    **settings
        More keys.

    Raises
    ------
    ConfigError
        For an unknown key, or a value that is not allowed; for several jobs elsewhere.
    MissingExtraError
        For backend ``ray`` where Ray is not installed, ``log_to`` where TensorBoard is not.
    """
    whole = validate({**(config or {}), **named(settings)})
    place = None if folder is None else Path(folder)
    result = run_validated(whole, backend, resources or ClientResources(), on_round, place, jobs)
    if place is not None:
        result.write(place)
    return result


def run_validated(
    config: Config,
    backend: str,
    resources: ClientResources,
    on_round: OnRound | None,
    folder: Path | None = None,
    jobs: int = 1,
) -> RunResult:
    """Run a validated configuration; see :func:`run`. ``folder`` gets files of ``log-to`` only."""
    if jobs < 1 or (jobs > 1 and backend != "inprocess"):
        raise ConfigError(
            f"jobs is {jobs} with backend {backend}; allowed: 1, more with backend inprocess"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend in ON_RAY:
        require("ray", f"backend {backend}", "simulation")
    check_log(config, folder)
    if backend == "vectorized":
        for key, allowed in (("downlink-compressor", "none"), ("precision", "fp32")):
            if config[key] != allowed:
                raise ConfigError(
                    f"{key} is {config[key]!r}; allowed with backend vectorized: {allowed!r}"
                )
    try:
        if backend == "ray":
            result = _run_on_ray(config, resources, on_round, folder)
        elif backend == "flower":
            result = _run_on_flower(config, resources, on_round, folder)
        elif jobs > 1:
            with ProcessGrid(_load_app, int(config["num-clients"]), config, jobs=jobs) as workers:
                result = run_experiment(workers, config, on_round, folder)
        else:
            prepare = prepare_together if backend == "vectorized" else None
            grid = InProcessGrid(client_app, int(config["num-clients"]), config, prepare)
            result = run_experiment(grid, config, on_round, folder)
    except Exception as error:
        result = RunResult(config, status="failed", error=f"{type(error).__name__}: {error}")
    result.backend = backend
    return result


def _load_app() -> ClientApp:
    return client_app


def _run_on_ray(
    config: Config, resources: ClientResources, on_round: OnRound | None, folder: Path | None
) -> RunResult:
    from .ray_grid import RayGrid

    resources = _addressed(resources, config)
    with RayGrid(
        client_app,
        int(config["num-clients"]),
        config,
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        address=resources.ray_address,
    ) as grid:
        return run_experiment(grid, config, on_round, folder)


def _addressed(resources: ClientResources, config: Config) -> ClientResources:
    """Return resources of the configuration's cluster, checked against it."""
    address = str(config["ray-address"])
    return (
        resources if resources.ray_address == address else replace(resources, ray_address=address)
    )


def _run_on_flower(
    config: Config, resources: ClientResources, on_round: OnRound | None, folder: Path | None
) -> RunResult:
    resources = _addressed(resources, config)
    results: list[RunResult] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_experiment(grid, config, on_round, folder))

    app = ConfiguredClientApp(client_app, config)
    simulate(server_app, app, config["num-clients"], resources.to_backend_config())
    return results[0]
