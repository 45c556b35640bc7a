"""Where a run's clients live: Flower's Ray-backed simulation, or this process.

In this process they work one after the other (``inprocess``) or together (``vectorized``): the same
but for the order of sums. ``vectorized`` pays for small batches on a GPU, and on a CPU for networks
of linear layers and one local step; convolutions and later steps are there best done one by one.
"""

import os
import socket
from dataclasses import dataclass, replace

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_bgmd.clients import app as client_app
from fl_bgmd.clients import prepare_together
from fl_bgmd.extras import require
from fl_bgmd.flower import simulate

from .config import Config, ConfigError
from .experiment import OnRound, RunResult, run_experiment
from .grid import InProcessGrid

BACKENDS = ("ray", "inprocess", "vectorized")


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
        For more than one machine has (Flower would wait for it for ever), and for an address
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
        init: dict[str, float | bool | str] = {"log_to_driver": False, "include_dashboard": False}
        if self.ray_address:
            init["address"] = self.ray_address
        return {
            "client_resources": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "init_args": init,
        }


def cluster_machines(address: str) -> list[tuple[float, float]]:
    """Return the CPUs and GPUs of each machine of a running Ray cluster.

    Raises :class:`ConfigError` where none answers.
    """
    import ray

    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for twelve minutes.
        socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, OSError) as error:
        raise ConfigError(
            f"ray-address is {address!r} ({error}); allowed: empty, or HOST:PORT of a running Ray "
            "cluster that this machine belongs to"
        ) from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
    return [(found.get("CPU", 0), found.get("GPU", 0)) for found in machines]


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
    config: Config,
    *,
    backend: str = "ray",
    resources: ClientResources = ClientResources(),
    on_round: OnRound | None = None,
) -> RunResult:
    """Run a validated configuration and return its result.

    Exceptions of the server or of Ray become a result with status ``failed`` and the error.

    Raises
    ------
    MissingExtraError
        For backend ``ray`` where Ray is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "ray":
        require("ray", "backend ray", "simulation")
    if backend == "vectorized":
        for key, allowed in (("downlink-compressor", "none"), ("precision", "fp32")):
            if config[key] != allowed:
                raise ConfigError(
                    f"{key} is {config[key]!r}; allowed with backend vectorized: {allowed!r}"
                )
    try:
        if backend == "ray":
            result = _run_on_ray(config, resources, on_round)
        else:
            prepare = prepare_together if backend == "vectorized" else None
            grid = InProcessGrid(client_app, int(config["num-clients"]), config, prepare)
            result = run_experiment(grid, config, on_round)
    except Exception as error:
        result = RunResult(config, status="failed", error=f"{type(error).__name__}: {error}")
    result.backend = backend
    return result


def _run_on_ray(config: Config, resources: ClientResources, on_round: OnRound | None) -> RunResult:
    address = str(config["ray-address"])
    if resources.ray_address != address:
        resources = replace(resources, ray_address=address)
    results: list[RunResult] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_experiment(grid, config, on_round))

    app = ConfiguredClientApp(client_app, config)
    simulate(server_app, app, config["num-clients"], resources.to_backend_config())
    return results[0]
