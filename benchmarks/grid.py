"""What a round costs on the in-process grid: against Ray, and against no Flower at all.

``python -m benchmarks.grid`` prints seconds a round for 1000 clients that send 1000 parameters
back (echo clients, in process and on Ray), for 10 clients that compute one LeNet gradient on 64
examples each, in process and as a plain PyTorch loop over batches of the same size, and for 32 such
clients all at once (backend ``vectorized``) and one after the other. Of the rounds after the first
the fastest counts: CPU time on one thread against the loop, else wall clock. ``--no-ray`` leaves
Ray out, which takes a minute; ``--device`` is that of the 32 clients.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from clients.client_app import app as client_app
from clients.client_app import prepare_together
from fl_bgmd.data import load, normalize, partition
from fl_bgmd.devices import to_input
from fl_bgmd.models import build
from fl_bgmd.strategies import Mean
from simulations.config import Config, validate
from simulations.grid import InProcessGrid, Prepare

echo = ClientApp()


@echo.train()
def _echo(message: Message, context: Context) -> Message:
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def seconds_per_round(
    grid: Grid,
    strategy: FedAvg,
    arrays: ArrayRecord,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Run a strategy's rounds on a grid; return the seconds of the fastest but the first."""
    moments: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> None:
        moments.append(clock())

    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=note)
    return float(np.diff(moments)[1:].min())


def echo_strategy(clients: int) -> FedAvg:
    """Return an average over all of the echo clients."""
    return Mean(
        fraction_evaluate=0.0,
        min_train_nodes=clients,
        min_available_nodes=clients,
    )


def echo_in_process(clients: int, parameters: int, rounds: int) -> float:
    """Seconds a round of echo clients on the in-process grid."""
    arrays = ArrayRecord({"w": torch.zeros(parameters)})
    grid = InProcessGrid(echo, clients, {})
    return seconds_per_round(grid, echo_strategy(clients), arrays, rounds)


def echo_on_ray(clients: int, parameters: int, rounds: int) -> float:
    """Seconds a round of the same clients on Flower's Ray backend."""
    from flwr.simulation import run_simulation

    found: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord({"w": torch.zeros(parameters)})
        found.append(seconds_per_round(grid, echo_strategy(clients), arrays, rounds))

    run_simulation(
        server,
        echo,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},  # type: ignore[dict-item]
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        },
    )
    return found[0]


def gradients_in_process(
    clients: int,
    rounds: int,
    *,
    device: str = "cpu",
    prepare: Prepare | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds a round of LeNet gradients through Flower, screening and averaging included."""
    config: Config = validate(
        {
            "dataset": "mnist",
            "model": "lenet",
            "partition": "iid",
            "num-clients": clients,
            "local-steps": 1,
            "learning-rate": 1.0,
            "momentum": 0.0,
            "device": device,
        }
    )
    arrays = ArrayRecord(build("lenet").state_dict())
    grid = InProcessGrid(client_app, clients, config, prepare)
    return seconds_per_round(grid, echo_strategy(clients), arrays, rounds, clock)


def gradients_plain(clients: int, rounds: int) -> float:
    """Seconds a round of the same gradients and their average in plain PyTorch."""
    dataset, model = load("mnist"), build("lenet").train()
    shares = partition(dataset.train_labels, clients, scheme="iid")
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    draw, cpu = np.random.default_rng(0), torch.device("cpu")
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        rows = torch.empty(clients, size)
        for row, share in zip(rows, shares, strict=True):
            batch = draw.choice(share, 64, replace=False)
            images = to_input(normalize(dataset.train_images[batch], dataset), cpu)
            labels = torch.from_numpy(dataset.train_labels[batch])
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, parameters)
            torch.cat([gradient.flatten() for gradient in gradients], out=row)
        update = rows.mean(0)
        with torch.no_grad():
            for parameter, part in zip(
                parameters, update.split([p.numel() for p in parameters]), strict=True
            ):
                parameter -= 0.01 * part.view_as(parameter)
        taken.append(time.process_time() - started)
    return min(taken[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "10 clients x 64, LeNet gradients: plain loop": (
            lambda: gradients_in_process(10, options.rounds, clock=time.process_time),
            lambda: gradients_plain(10, options.rounds),
        ),
        f"32 clients x 64, vectorized, {options.device}: one by one": (
            partial(
                gradients_in_process,
                32,
                options.rounds,
                device=options.device,
                prepare=prepare_together,
            ),
            partial(gradients_in_process, 32, options.rounds, device=options.device),
        ),
    }
    if not options.no_ray:
        cases["1000 clients x 1000 parameters, echo: Ray"] = (
            lambda: echo_in_process(1000, 1000, options.rounds),
            lambda: echo_on_ray(1000, 1000, min(3, options.rounds)),
        )
    table = Table(title=f"{torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for column in ("round: compared with", "in process (s)", "the other (s)", "other / in process"):
        table.add_column(column)
    for name, (ours, other) in cases.items():
        mine, theirs = ours(), other()
        table.add_row(name, f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
