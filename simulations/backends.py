"""Where a run's clients live: Flower's Ray-backed simulation, or this process."""

import os
from dataclasses import dataclass

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.client_app import app as client_app
from simulations.config import Config, ConfigError
from simulations.experiment import OnRound, RunResult, run_experiment
from simulations.grid import InProcessGrid

BACKENDS = ("ray", "inprocess")


@dataclass(frozen=True)
class ClientResources:
    """What Ray sets aside for one client.

    Raises :class:`ConfigError` for more than the machine has: Flower would wait for it for ever.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check both against this machine."""
        for name, value, least, most in (
            ("client-resources-num-cpus", self.num_cpus, 1, os.cpu_count() or 1),
            ("client-resources-num-gpus", self.num_gpus, 0, torch.cuda.device_count()),
        ):
            if not least <= value <= most:
                raise ConfigError(
                    f"{name} is {value:g}; allowed: {least} to {most}, what this machine has"
                )

    def to_backend_config(self) -> dict[str, dict[str, float | bool]]:
        """Return Flower's configuration of its Ray backend."""
        return {
            "client_resources": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        }


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
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    start = _run_on_ray if backend == "ray" else _run_in_process
    try:
        return start(config, resources, on_round)
    except Exception as error:
        return RunResult(config, status="failed", error=f"{type(error).__name__}: {error}")


def _run_in_process(
    config: Config, resources: ClientResources, on_round: OnRound | None
) -> RunResult:
    return run_experiment(
        InProcessGrid(client_app, int(config["num-clients"]), config), config, on_round
    )


def _run_on_ray(config: Config, resources: ClientResources, on_round: OnRound | None) -> RunResult:
    # The one place that uses Flower's Python entry point, which has no public successor yet.
    from flwr.simulation import run_simulation

    results: list[RunResult] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_experiment(grid, config, on_round))

    run_simulation(
        server_app,
        ConfiguredClientApp(client_app, config),
        num_supernodes=int(config["num-clients"]),
        backend_config=resources.to_backend_config(),  # type: ignore[arg-type]
    )
    return results[0]
