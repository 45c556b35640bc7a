"""Algorithm 1 of Acharya et al. with its step size inside the memory, under schedules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from flower_messages import honest_reply, to_numpy, to_record
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fl_bgmd.aggregators import BlockMemory, block_geometric_median
from fl_bgmd.schedules import scheduled_learning_rate
from fl_bgmd.strategies import BGMD
from simulations.grid import InProcessGrid

Array = NDArray[np.float64]
ROUNDS, CLIENTS, DIMENSIONS, KEPT = 12, 5, 20, 6
CURVATURE = np.linspace(0.1, 1.0, DIMENSIONS)
TARGETS = np.random.default_rng(0).normal(size=(CLIENTS, DIMENSIONS))

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda number: 0.5,
    "cosine": lambda number: scheduled_learning_rate(0.7, "cosine", number, ROUNDS),
    "cosine-restarts": lambda number: scheduled_learning_rate(
        0.7, "cosine-restarts", number, ROUNDS, period=4
    ),
}


def gradients(x: Array) -> Array:
    return CURVATURE * (x - TARGETS)


def algorithm_1(rate: Callable[[int], float], memory_of: str) -> list[Array]:
    """Transcribe Algorithm 1, its block the k columns of largest norm; return x_1, x_2, ..."""
    x, memory, path = np.zeros(DIMENSIONS), np.zeros((CLIENTS, DIMENSIONS)), []
    for number in range(1, ROUNDS + 1):
        rows = gradients(x)
        rows = rate(number) * rows + memory  # memory augmentation
        strongest = np.argsort((rows**2).sum(0))[-KEPT:]
        chosen = np.zeros_like(rows)
        chosen[:, strongest] = rows[:, strongest]
        residuals = rows - chosen
        own = memory_of == "per-client"
        memory = residuals if own else np.tile(residuals.mean(0), (CLIENTS, 1))
        median, _ = oracles.geometric_median(chosen)
        x = x - median
        path.append(x)
    return path


def bgmd(rate: Callable[[int], float], **options: Any) -> BGMD:
    own = {"block_fraction": KEPT / DIMENSIONS, "min_block_size": 1, "selection": "top-k"}
    own |= {"score": "squared-norm", "tol": 1e-9, "seed": 1, "byzantine_fraction": 0.2}
    return BGMD(**own, server_learning_rate=rate, **options)


def one_round(strategy: BGMD, number: int, arrays: ArrayRecord) -> ArrayRecord:
    grid = InProcessGrid(ClientApp(), CLIENTS, {})
    messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
    rows = gradients(to_numpy(arrays)["w"])
    replies = [
        honest_reply(message, {"w": rows[i]}, partition=i) for i, message in enumerate(messages)
    ]
    moved, _ = strategy.aggregate_train(number, replies)
    assert moved is not None
    return moved


def path_of(strategy: BGMD) -> list[Array]:
    arrays, path = to_record({"w": np.zeros(DIMENSIONS)}), []
    for number in range(1, ROUNDS + 1):
        arrays = one_round(strategy, number, arrays)
        path.append(to_numpy(arrays)["w"])
    return path


@pytest.mark.parametrize("memory", ["mean", "per-client"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_model_goes_the_way_of_the_printed_algorithm(name: str, memory: str) -> None:
    expected = algorithm_1(SCHEDULES[name], memory)
    found = path_of(bgmd(SCHEDULES[name], memory=memory))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_between_two_rates_continues_alike() -> None:
    rate = SCHEDULES["cosine-restarts"]
    whole = path_of(bgmd(rate, memory="robust"))
    first, second = bgmd(rate, memory="robust"), bgmd(rate, memory="robust")
    arrays = to_record({"w": np.zeros(DIMENSIONS)})
    for number in range(1, ROUNDS + 1):
        strategy = first if number < 5 else second
        if number == 5:
            second.load_state_dict(first.state_dict())
        arrays = one_round(strategy, number, arrays)
    np.testing.assert_array_equal(to_numpy(arrays)["w"], whole[-1])


def test_a_step_of_zero_leaves_model_and_memory() -> None:
    strategy = bgmd(lambda number: 0.5 * (number != 2), memory="mean")
    arrays = one_round(strategy, 1, to_record({"w": np.zeros(DIMENSIONS)}))
    before = strategy.state_dict()["memory"]
    still = one_round(strategy, 2, arrays)
    np.testing.assert_array_equal(to_numpy(still)["w"], to_numpy(arrays)["w"])
    assert torch.equal(strategy.state_dict()["memory"]["vector"], before["vector"])
    assert strategy.state_dict()["memory"]["step_size"] == before["step_size"] == 0.5


def test_rounds_of_one_step_size_are_what_they_were_without() -> None:
    rows = torch.randn(5, 20)
    options: dict[str, Any] = {"block_fraction": 0.3, "min_block_size": 1, "selection": "top-k"}
    memory = block_geometric_median(rows, **options).memory
    assert memory is not None
    small = block_geometric_median(rows, step_size=0.1, **options).memory
    assert small is not None
    for step_size, before in ((1.0, memory), (0.1, small)):
        result = block_geometric_median(2 * rows, before, step_size=step_size, **options)
        expected = block_geometric_median(2 * rows, memory, **options)
        assert torch.equal(result.vector, expected.vector)


def test_the_guarded_memory_knows_the_curvature_of_a_step_of_another_size() -> None:
    """On a quadratic the share of the way that a step goes is as large as the step."""
    model, curvature = torch.full((4000,), 3.0), 0.4
    generator = torch.Generator().manual_seed(0)
    memory: BlockMemory | None = None
    for number in range(40):
        rate = 1.0 if number < 30 else 0.25
        rows = (curvature * model).repeat(5, 1)
        result = block_geometric_median(rows, memory, step_size=rate, generator=generator)
        model, memory = model - rate * result.vector, result.memory
        if number in (29, 39):
            assert result.curvature == pytest.approx(rate * curvature, rel=1e-3)


def test_rates_that_differ_beyond_all_bounds_leave_a_usable_memory() -> None:
    rows = torch.randn(5, 20)
    options: dict[str, Any] = {"block_fraction": 0.3, "min_block_size": 1}
    memory = block_geometric_median(rows, step_size=1e300, **options).memory
    result = block_geometric_median(rows, memory, step_size=1e-300, **options)
    assert result.vector.isfinite().all()
