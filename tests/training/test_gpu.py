"""Clients on a GPU: the steps of the CPU, one client after the other and together."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_together import CONFIG, dataset_of, flat, jobs_of

from fl_bgmd.devices import repeatable
from fl_bgmd.models import build
from fl_bgmd.training import Trained, train, train_together
from simulations.backends import run
from simulations.config import validate

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def float32_throughout() -> Iterator[None]:
    """Convolutions round their inputs to TF32 by default, to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


STEPS: list[dict[str, Any]] = [{"steps": 1}, {"steps": 3}, {"steps": 0, "epochs": 2}]


def distance(one: Trained, other: Trained, before: torch.Tensor) -> float:
    steps = [flat(result.state).cpu() - before for result in (one, other)]
    return float((steps[0] - steps[1]).norm() / steps[0].norm())


@pytest.mark.parametrize("changes", STEPS)
@pytest.mark.parametrize("name", ["mlp", "lenet", "small-cnn"])
def test_together_the_clients_take_the_steps_that_each_takes_alone(
    name: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build(name)
    dataset = dataset_of((32, 32, 3) if name == "small-cnn" else (28, 28))
    jobs = [replace(job, device=GPU) for job in jobs_of(model, dataset, (20, 20, 5), **changes)]
    before = flat(model.state_dict())
    alone = [train(replace(job, model=deepcopy(model))) for job in jobs]
    for one, other in zip(alone, train_together(deepcopy(model), jobs), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert {value.device.type for value in other.state.values()} == {"cpu"}
        assert distance(one, other, before) < 1e-3


@pytest.mark.parametrize("changes", STEPS)
def test_a_client_takes_the_steps_that_it_takes_on_the_cpu(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build("small-cnn")  # lenet has dropout, which draws others there
    [job] = jobs_of(model, dataset_of((32, 32, 3)), (20,), **changes)
    before = flat(model.state_dict())
    here, there = (
        train(replace(job, model=deepcopy(model), device=device)) for device in (job.device, GPU)
    )
    assert distance(here, there, before) < 1e-3


def test_a_thousand_clients_fit_into_a_step() -> None:
    model = build("mlp")
    jobs = jobs_of(model, dataset_of((28, 28)), (16,) * 6, steps=2)
    many = [replace(jobs[i % 6], device=GPU) for i in range(1000)]
    found = train_together(model, many)
    assert torch.allclose(flat(found[0].state), flat(found[996].state), atol=1e-6)
    assert not torch.allclose(flat(found[0].state), flat(found[1].state), atol=1e-3)


@pytest.mark.parametrize("attack", ["none", "bit-flip", "label-shift"])
def test_a_run_is_that_of_the_cpu_but_for_rounding(attack: str) -> None:
    share = 0.0 if attack == "none" else 0.2
    config = validate({**CONFIG, "attack": attack, "byzantine-fraction": share})
    ways = (("inprocess", "cpu"), ("inprocess", "cuda"), ("vectorized", "cuda"))
    results = [run({**config, "device": device}, backend=name) for name, device in ways]
    losses = [[entry["train-loss"] for entry in result.rounds[1:]] for result in results]
    assert [result.error for result in results] == ["", "", ""]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_bf16_is_near_fp32() -> None:
    torch.manual_seed(0)
    model = build("small-cnn", input_shape=(1, 28, 28))
    found = []
    for precision in ("fp32", "bf16"):
        [job] = jobs_of(model, dataset_of((28, 28)), (20,), precision=precision)
        found.append(train(replace(job, model=deepcopy(model), device=GPU)))
    assert {value.dtype for value in found[1].state.values()} == {torch.float32}
    assert 0 < distance(found[0], found[1], flat(model.state_dict())) < 0.1


def test_a_run_repeats_to_the_bit() -> None:
    torch.manual_seed(0)
    model = build("small-cnn")
    [job] = jobs_of(model, dataset_of((32, 32, 3)), (64,), steps=5)
    states = []
    for _ in range(3):
        with repeatable(1):
            states.append(flat(train(replace(job, model=deepcopy(model), device=GPU)).state))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
