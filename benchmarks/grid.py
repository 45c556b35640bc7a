"""What a round costs on each backend, beside a bare PyTorch loop and what its FLOPs allow.

``python -m benchmarks.grid`` prints, for some networks and numbers of clients, the CPU seconds of a
round on one thread: of a bare loop (gradients, stack, the same rule, step), on the backends
``inprocess``, with honest clients and with a fifth that lies, and ``vectorized``, and of the
gradients' floating-point operations alone at the speed of a matrix product on this machine. All
take turns, and of each the fastest round counts; in brackets the ratio to the bare loop. Then the
wall-clock seconds of a round of clients that only send back what they get, in process, on a process
for each core (``--jobs``), on this project's grid on Ray and on Flower's Ray engine, which takes
minutes (``--no-ray`` leaves it out). With ``--device cuda`` clients and rule of the first table are
on the GPU, also a thousand clients, and the seconds are those of a wall clock.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import wait
from clients.client_app import app as client_app
from clients.client_app import prepare_together
from fl_bgmd.aggregators import build_rule
from fl_bgmd.attacks import AttackPlan
from fl_bgmd.data import load, normalize, partition
from fl_bgmd.devices import resolve_device, to_input
from fl_bgmd.held import held
from fl_bgmd.models import build
from fl_bgmd.strategies import Mean, RobustStrategy
from simulations.adversary import AdversarialGrid
from simulations.backends import ClientResources
from simulations.config import Config, validate
from simulations.grid import InProcessGrid, Prepare
from simulations.process_grid import ProcessGrid

Clock = Callable[[], float]

ECHO_CASES = ((1000, 1000), (100, 1_163_978), (10, 11_173_962))

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
    clock: Clock = time.perf_counter,
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


def load_echo() -> ClientApp:
    """Return the echo clients."""
    return echo


def echo_on_processes(clients: int, parameters: int, rounds: int) -> float:
    """Seconds a round of the same clients on a process for each core."""
    arrays = ArrayRecord({"w": torch.zeros(parameters)})
    with ProcessGrid(load_echo, clients, {}, jobs=os.cpu_count() or 1) as grid:
        return seconds_per_round(grid, echo_strategy(clients), arrays, rounds)


def echo_on_ray(clients: int, parameters: int, rounds: int) -> float:
    """Seconds a round of the same clients on the grid of Ray's actors."""
    from simulations.ray_grid import RayGrid

    arrays = ArrayRecord({"w": torch.zeros(parameters)})
    with RayGrid(echo, clients, {}) as grid:
        return seconds_per_round(grid, echo_strategy(clients), arrays, rounds)


def echo_on_flower(clients: int, parameters: int, rounds: int) -> float:
    """Seconds a round of the same clients on Flower's Ray engine."""
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
        backend_config=ClientResources().to_backend_config(),  # type: ignore[arg-type]
    )
    return found[0]


@dataclass(frozen=True)
class Case:
    """A network, and how many clients compute its gradient on how many examples each."""

    model: str
    clients: int
    batch: int

    def __str__(self) -> str:
        """Return it as the table shows it."""
        return f"{self.model}, {self.clients} x {self.batch}"


CASES = (Case("mlp", 10, 64), Case("mlp", 100, 16), Case("lenet", 10, 64))
GPU_CASES = (*CASES, Case("mlp", 1000, 16), Case("lenet", 1000, 16))


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a round: the processor's time, on a GPU the wall clock after its work."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        wait(device)
        return time.perf_counter()

    return clock


def on_a_grid(
    case: Case,
    rule: str,
    rounds: int,
    device: torch.device,
    prepare: Prepare | None = None,
    attack: str = "none",
    precision: str = "fp32",
) -> float:
    """Seconds a round through Flower: messages, screening, attack, rule and step included."""
    config: Config = validate(
        {
            "dataset": "mnist",
            "model": case.model,
            "partition": "iid",
            "num-clients": case.clients,
            "local-steps": 1,
            "batch-size": case.batch,
            "learning-rate": 1.0,
            "momentum": 0.0,
            "device": str(device),
            "attack": attack,
            "precision": precision,
            "byzantine-fraction": 0.0 if attack == "none" else 0.2,
        }
    )
    strategy = RobustStrategy(
        rule,
        fraction_evaluate=0.0,
        min_train_nodes=case.clients,
        min_available_nodes=case.clients,
        seed=0,
        device=str(device),
    )
    inner = InProcessGrid(client_app, case.clients, config, prepare)
    plan = AttackPlan.from_config(config)
    grid = AdversarialGrid(inner, plan, case.clients, strategy.preview)
    arrays = held(ArrayRecord(build(case.model).state_dict()))
    return seconds_per_round(grid, strategy, arrays, rounds, clock_of(device))


def bare(case: Case, rule: str, rounds: int, device: torch.device) -> float:
    """Seconds a round of the same gradients, rule and step in plain PyTorch."""
    dataset, aggregate, clock = load("mnist"), build_rule(rule), clock_of(device)
    model = build(case.model).train().to(device)
    shares = partition(dataset.train_labels, case.clients, scheme="iid")
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    draw = np.random.default_rng(0)
    taken: list[float] = []
    for _ in range(rounds):
        started = clock()
        rows = torch.empty(case.clients, sum(sizes), device=device)
        for row, share in zip(rows, shares, strict=True):
            batch = draw.choice(share, case.batch, replace=False)
            images = to_input(normalize(dataset.train_images[batch], dataset), device)
            labels = torch.from_numpy(dataset.train_labels[batch]).to(device)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, parameters)
            torch.cat([gradient.flatten() for gradient in gradients], out=row)
        update = aggregate(rows).vector
        with torch.no_grad():
            for parameter, part in zip(parameters, update.split(sizes), strict=True):
                parameter -= 0.01 * part.view_as(parameter)
        taken.append(clock() - started)
    return min(taken[1:])


def limit(case: Case, device: torch.device) -> float:
    """Seconds that a round's gradients take at the speed of a matrix product."""
    model = build(case.model).train()
    images, labels = torch.zeros(case.batch, 1, 28, 28), torch.zeros(case.batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    side, clock = 1024 if device.type == "cpu" else 8192, clock_of(device)
    taken: list[float] = []
    left, right, out = (torch.rand(side, side, device=device) for _ in range(3))
    for _ in range(10):
        started = clock()
        torch.mm(left, right, out=out)
        taken.append(clock() - started)
    return case.clients * counter.get_total_flops() * min(taken) / (2 * side**3)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rule", default="mean", help="the spec of the server's rule")
    parser.add_argument("--device", default="cpu", help="of clients and rule: cpu, cuda")
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rule, rounds, device = options.rule, options.rounds, resolve_device(options.device)
    ways: dict[str, Callable[[Case], float]] = {
        "bare loop": lambda case: bare(case, rule, rounds, device),
        "inprocess": lambda case: on_a_grid(case, rule, rounds, device),
        "under attack": lambda case: on_a_grid(case, rule, rounds, device, attack="bit-flip"),
        "vectorized": lambda case: on_a_grid(case, rule, rounds, device, prepare_together),
        "bf16": lambda case: on_a_grid(case, rule, rounds, device, precision="bf16"),
        "FLOP limit": lambda case: limit(case, device),
    }
    on_gpu = device.type == "cuda"
    kind = (
        f"Seconds a round on {torch.cuda.get_device_name(device)}"
        if on_gpu
        else "CPU seconds a round"
    )
    table = Table(title=f"{kind}, {rule}, 1 of {os.cpu_count()} cores (to bare loop)")
    for column in ("clients x examples", *ways):
        table.add_column(column)
    for case in GPU_CASES if on_gpu else CASES:
        turns = [[way(case) for way in ways.values()] for _ in range(options.turns)]
        fastest = np.min(turns, axis=0)
        cells = [f"{seconds:.3f} ({seconds / fastest[0]:.2f})" for seconds in fastest]
        table.add_row(str(case), *cells)
    console = Console(width=120)
    console.print(table)
    if options.no_ray:
        return
    table = Table(title="Wall-clock seconds a round of echo clients (to Flower's engine)")
    for column in ("clients x parameters", "in process", "processes", "ray", "Flower's engine"):
        table.add_column(column)
    ours = (echo_in_process, echo_on_processes, echo_on_ray)
    for clients, parameters in ECHO_CASES:
        theirs = echo_on_flower(clients, parameters, min(3, rounds))
        mine = (way(clients, parameters, rounds) for way in ours)
        cells = [f"{seconds:.3f} ({seconds / theirs:.3f})" for seconds in mine]
        table.add_row(f"{clients} x {parameters:,}", *cells, f"{theirs:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
