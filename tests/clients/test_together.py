"""One-step rounds of all clients at once, against one client after the other."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import clients.client_app
import clients.training
from clients.together import train_together
from clients.training import Job, LocalTraining, train
from fl_bgmd.data import Dataset
from fl_bgmd.models import build
from simulations.backends import run
from simulations.config import ConfigError, validate

CPU = torch.device("cpu")


def dataset_of(shape: tuple[int, ...]) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (96, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, 96)
    return Dataset("cifar10" if len(shape) == 3 else "mnist", images, labels, images, labels, 10)


def jobs_of(
    model: nn.Module, dataset: Dataset, sizes: tuple[int, ...], **changes: Any
) -> list[Job]:
    settings: dict[str, Any] = {
        "steps": 1,
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
    }
    settings |= changes
    starts = np.cumsum((0, *sizes))
    return [
        Job(model, dataset, np.arange(starts[i], starts[i + 1]), LocalTraining(**settings), i, CPU)
        for i in range(len(sizes))
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lenet", (28, 28)), ("tiny-cnn", (28, 28)), ("small-cnn", (32, 32, 3)),
     ("resnet18", (32, 32, 3))],
)  # fmt: skip
def test_the_step_is_the_one_that_each_client_takes_alone(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In ResNet's gradients on a handful of images the other layout alone makes 1e-3.
    monkeypatch.setattr(clients.training, "to_input", lambda images, device: images.to(device))
    torch.manual_seed(0)
    model = build(name)
    dataset = dataset_of(shape)
    # The last one has less than a batch.
    jobs = jobs_of(model, dataset, (20, 20, 20, 3))
    before = deepcopy(model.state_dict())
    alone = [train(Job(deepcopy(model), *_rest(job))) for job in jobs]
    together = train_together(model, jobs)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    for one, other in zip(alone, together, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert [*one.state] == [*other.state]
        steps = [flat(result.state) - flat(before) for result in (one, other)]
        assert (steps[0] - steps[1]).norm() < 1e-5 * steps[0].norm()


def flat(state: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def _rest(job: Job) -> tuple[Any, ...]:
    return job.dataset, job.indices, job.settings, job.seed, job.device, job.corrupt


def test_more_than_one_step_is_refused() -> None:
    model = build("tiny-cnn")
    with pytest.raises(ValueError, match="steps is 2; allowed: 1"):
        train_together(model, jobs_of(model, dataset_of((28, 28)), (20,), steps=2))


CONFIG = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "partition": "iid",
    "num-clients": 5,
    "local-steps": 1,
    "batch-size": 16,
    "num-server-rounds": 3,
    "strategy": "gmd",
    "evaluate-every": 3,
}


@pytest.mark.parametrize(
    "changes", [{}, {"attack": "bit-flip"}, {"attack": "label-shift"}, {"compressor": "qsgd"}]
)
def test_a_run_is_the_same_but_for_the_order_of_sums(changes: dict[str, Any]) -> None:
    hostile = {"byzantine-fraction": 0.2} if "attack" in changes else {}
    config = validate({**CONFIG, **changes, **hostile})
    one, other = (run(config, backend=name) for name in ("inprocess", "vectorized"))
    assert one.error == other.error == ""
    assert one.played == other.played
    losses = [[entry["train-loss"] for entry in result.rounds[1:]] for result in (one, other)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_clients_do_not_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.client_app, "train", None)
    result = run(validate(CONFIG), backend="vectorized")
    assert result.status == "finished"
    assert result.rounds[-1]["accepted"] == 5


@pytest.mark.parametrize("changes", [{"local-steps": 2}, {"downlink-compressor": "qsgd"}])
def test_what_cannot_be_vectorized_is_refused(changes: dict[str, Any]) -> None:
    [key] = changes
    with pytest.raises(ConfigError, match=f"{key} is .* allowed with backend vectorized"):
        run(validate({**CONFIG, **changes}), backend="vectorized")
