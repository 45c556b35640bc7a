"""The rules and strategies on a GPU: the CPU's results, and nothing that leaves the device unasked.

On a machine without a GPU one is pretended (:mod:`pretend_gpu`): that tests where tensors are put,
not CUDA's arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from every_rule import call
from flower_messages import regression_app, regression_model, to_numpy
from pretend_gpu import pretend_gpu
from torch import Tensor

from fl_bgmd.aggregators import (
    RULES,
    BlockMemory,
    block_geometric_median,
    bucketing,
    build_rule,
    centered_clipping,
    divide_and_conquer,
    flame,
    geometric_median,
    krum,
    nearest_neighbor_averaging,
    nearest_neighbor_mixing,
    norm_threshold,
    project,
    spectral_filter,
    trimmed_mean,
)
from fl_bgmd.strategies import RobustStrategy
from simulations.config import Value, validate
from simulations.experiment import build_strategy
from simulations.grid import InProcessGrid

N, D = 12, 3_000


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Yield a CUDA device, pretended where there is none."""
    real = torch.cuda.is_available()
    with nullcontext(torch.device("cuda")) if real else pretend_gpu() as device:
        yield device


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Every rule as it is by default, and by choice what goes other ways through the code.
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    # What bgmd draws by default hangs on the last bit of the scores.
    **{name: partial(call, name, byzantine_fraction=0.2) for name in RULES if name != "bgmd"},
    "gmd-weiszfeld": partial(geometric_median, solver="weiszfeld"),
    "gmd-newton": partial(geometric_median, solver="newton"),
    "gmd-weights": lambda rows: geometric_median(rows, weights=torch.arange(1.0, 1.0 + N)),
    "bgmd-top-k": partial(block_geometric_median, selection="top-k"),
    "bgmd-uniform": lambda rows: block_geometric_median(
        rows, selection="uniform", generator=seeded()
    ),
    "bgmd-everything": partial(block_geometric_median, block_fraction=1.0),
    **{
        f"bgmd-memory-{rule}": partial(
            block_geometric_median, selection="top-k", memory_rule=rule, min_block_size=1
        )
        for rule in ("robust", "mean", "per-client", "none")
    },
    "trimmed-mean-own": partial(trimmed_mean, trim_fraction=0.2),
    "norm-threshold-reported": lambda rows: norm_threshold(rows, norms=torch.arange(1.0, 1.0 + N)),
    "project": lambda rows: project(rows[0], 5.0),
    "robust-filter-saddle": partial(spectral_filter, method="saddle"),
    "dnc-coordinates": lambda rows: divide_and_conquer(rows, coordinates=500, generator=seeded()),
    "flame-noise": lambda rows: flame(rows, noise=0.01, generator=seeded()),
    "monna-root": lambda rows: nearest_neighbor_averaging(rows, rows[5]),
    "nearest-neighbor-mixing": nearest_neighbor_mixing,
    "bucketing": lambda rows: bucketing(rows, generator=seeded()),
    "pipeline": build_rule("gmd+nearest-neighbor"),
}


def rows_of(dtype: torch.dtype) -> Tensor:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 0.3
    rows[:3] *= 50
    return rows.to(dtype)


def tensors_of(result: Any) -> dict[str, Tensor]:
    """Everything of a result that is as long as the updates."""
    if isinstance(result, Tensor):
        return {"tensor": result}
    found = {name: getattr(result, name, None) for name in ("vector", "block")}
    if isinstance(getattr(result, "memory", None), BlockMemory):
        found["memory"] = result.memory.vector
    return {name: value for name, value in found.items() if value is not None}


def agree(found: Tensor, expected: Tensor) -> None:
    size = float(expected.double().abs().max()) or 1.0
    close = 1e-9 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=0, atol=close * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rules(name: str, dtype: torch.dtype, gpu: torch.device) -> None:
    rows = rows_of(dtype)
    expected, result = FUNCTIONS[name](rows), FUNCTIONS[name](rows.to(gpu))
    wanted, found = tensors_of(expected), tensors_of(result)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert found[key].device.type == "cuda"
        assert found[key].dtype == value.dtype
        agree(found[key], value)
    for key in ("weights", "kept"):  # n numbers for the host
        value, other = getattr(expected, key, None), getattr(result, key, None)
        assert (value is None) == (other is None)
        if value is not None and other is not None:
            assert other.device.type == "cpu"
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("gmd", "bgmd-top-k", "cmd", "trimmed-mean-own", "krum"),
        *("centered-clipping", "nearest-neighbor-mixing", "bucketing", "robust-filter"),
    ],
)
def test_rules_on_many_rows(name: str, gpu: torch.device) -> None:
    """More rows than any n x n matrix is made for."""
    rows = torch.randn(1_050, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    rows[:100] *= 50
    expected, result = FUNCTIONS[name](rows), FUNCTIONS[name](rows.to(gpu))
    wanted, found = tensors_of(expected), tensors_of(result)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert found[key].device.type == "cuda"
        agree(found[key], value)


@pytest.mark.parametrize("memory_rule", ["robust", "mean", "per-client"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_block_and_its_memory(memory_rule: str, dtype: torch.dtype, gpu: torch.device) -> None:
    """Rounds that continue from each other's memory."""
    rows = rows_of(dtype)
    memories: dict[str, Tensor | None] = {"cpu": None, "gpu": None}
    for turn in range(3):
        options: dict[str, Any] = {"selection": "top-k", "memory_rule": memory_rule}
        options["min_block_size"] = 1
        moved = rows * (turn + 1)
        expected = block_geometric_median(moved, memory=memories["cpu"], **options)
        result = block_geometric_median(moved.to(gpu), memory=memories["gpu"], **options)
        agree(result.vector, expected.vector)
        memories = {"cpu": expected.memory, "gpu": result.memory}
        assert expected.memory is not None
        assert result.memory is not None
        assert result.memory.vector.device.type == "cuda"
        agree(result.memory.vector, expected.memory.vector)


def test_a_sampled_block(gpu: torch.device) -> None:
    rows = rows_of(torch.float32).to(gpu)
    result = block_geometric_median(rows, generator=seeded(), min_block_size=1)
    block = result.block.cpu()
    assert result.block.device.type == "cuda"
    assert len(block.unique()) == D // 10
    assert (result.vector.cpu() != 0).nonzero().flatten().tolist() == block.tolist()


def test_a_center_on_the_device(gpu: torch.device) -> None:
    rows, center = rows_of(torch.float32), torch.ones(D)
    expected = centered_clipping(rows, center=center)
    agree(centered_clipping(rows.to(gpu), center=center.to(gpu)).vector, expected.vector)


@pytest.mark.parametrize("name", ["gmd", "cmd", "bgmd-top-k"])
def test_rows_that_are_not_finite(name: str, gpu: torch.device) -> None:
    rows = rows_of(torch.float32)
    rows[4, 7] = float("nan")
    with pytest.raises(ValueError, match="row 4"):
        FUNCTIONS[name](rows.to(gpu))


@pytest.mark.parametrize("size", [1e-170, 1e170, 1e300])
def test_rows_out_of_the_range_of_squares(size: float, gpu: torch.device) -> None:
    rows = rows_of(torch.float64)
    rows[:2] *= size
    for rule in (geometric_median, krum, partial(block_geometric_median, selection="top-k")):
        agree(rule(rows.to(gpu)).vector, rule(rows).vector)


CONFIGURED: dict[str, dict[str, Value]] = {
    **{
        name: {"strategy": name}
        for name, kind in RULES.items()
        if name != "bgmd" and not kind.needs_root
    },
    **{
        f"bgmd-{rule}": {
            "strategy": f"bgmd:memory={rule},selection=top-k,block-fraction=0.5,min-block-size=1"
        }
        for rule in ("robust", "mean", "per-client", "none")
    },
    "gmd-nesterov": {"strategy": "gmd", "server-momentum": 0.9, "server-nesterov": True},
    "gmd-examples": {"strategy": "gmd", "weighting": "examples"},
    "centered-clipping-momentum": {"strategy": "centered-clipping", "server-momentum": 0.5},
    "gmd-mixed": {"strategy": "gmd+nearest-neighbor"},
    "cmd-buckets": {"strategy": "cmd+bucketing"},
    "gmd-shared": {"strategy": "gmd", "compressor": "rand-k:0.5", "shared-coordinates": True},
}
SHARED: dict[str, Value] = {
    "num-clients": N,
    "partition": "iid",
    "fraction-evaluate": 0.0,
    "assumed-byzantine-fraction": 0.25,
    "device": "cpu",
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_strategies(name: str, gpu: torch.device) -> None:
    """Four rounds, their state saved and loaded on the way, end where the CPU's do."""
    config = validate(SHARED | CONFIGURED[name])

    def strategy(device: torch.device) -> RobustStrategy:
        made = build_strategy(config)
        # Without a GPU the constructor refuses it.
        vars(made.settings)["torch_device"] = device
        return made

    ended = {}
    for device in (torch.device("cpu"), gpu):
        arrays, state = regression_model(), None
        for _ in range(2):
            running = strategy(device)
            if state is not None:
                running.load_state_dict(state)
            grid = InProcessGrid(regression_app(), N, {})
            arrays = running.start(grid, arrays, num_rounds=2).arrays
            state = running.state_dict()
        ended[device.type] = to_numpy(arrays)
    for key, value in ended["cpu"].items():
        np.testing.assert_allclose(ended["cuda"][key], value, rtol=1e-4, atol=1e-6)
