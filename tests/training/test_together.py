"""Clients that train together, against one client after the other."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import clients.client_app
from fl_bgmd.data import Dataset
from fl_bgmd.models import build
from fl_bgmd.training import Job, LocalTraining, local, together, train, train_together
from fl_bgmd.training.cohort import can_part
from fl_bgmd.training.local import batches
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
    for part in (local, together):
        monkeypatch.setattr(part, "to_input", lambda images, device: images.to(device))
    torch.manual_seed(0)
    model = build(name)
    dataset = dataset_of(shape)
    # The last one has less than a batch.
    jobs = jobs_of(model, dataset, (20, 20, 20, 3))
    before = deepcopy(model.state_dict())
    alone = [train(Job(deepcopy(model), *_rest(job))) for job in jobs]
    found = train_together(model, jobs)
    assert same_tensors(model.state_dict(), before)
    for one, other in zip(alone, found, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert [*one.state] == [*other.state]
        steps = [flat(result.state) - flat(before) for result in (one, other)]
        assert (steps[0] - steps[1]).norm() < 1e-5 * steps[0].norm()


def flat(state: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def _rest(job: Job) -> tuple[Any, ...]:
    return job.dataset, job.indices, job.settings, job.seed, job.device, job.corrupt


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"steps": 0, "epochs": 2}, {"steps": 3, "augmentation": "crop-flip"}]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_steps_are_those_that_each_client_takes_alone(
    changes: dict[str, Any], momentum: float
) -> None:
    torch.manual_seed(0)
    # Dropout continues its draws, statistics of the batches are each client's own.
    model = nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(192, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 10),
    )  # fmt: skip
    # With epochs their last batches are smaller; one client has less than a batch.
    jobs = jobs_of(model, dataset_of((28, 28)), (20, 20, 20, 5), momentum=momentum, **changes)
    before = deepcopy(model.state_dict())
    alone = [train(Job(deepcopy(model), *_rest(job))) for job in jobs]
    found = train_together(model, jobs)
    assert same_tensors(model.state_dict(), before)
    for one, other in zip(alone, found, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        steps = [flat(result.state) - flat(before) for result in (one, other)]
        assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()


def test_augmented_batches_hold_the_same_examples() -> None:
    dataset = dataset_of((32, 32, 3))
    [plain] = jobs_of(nn.Identity(), dataset, (96,), steps=0, epochs=1, batch_size=96)
    [own] = jobs_of(
        nn.Identity(), dataset, (96,), steps=0, epochs=1, batch_size=96, augmentation="crop-flip"
    )
    [(images, labels)], [(made, same)] = batches(plain), batches(own)
    assert torch.equal(labels, same)
    changed = (images != made).flatten(1).any(1)
    assert changed.sum() > 90  # one in 162 is left as it was


class Scaled(nn.Module):
    """A layer that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


def test_layers_that_are_not_known_are_left_to_torch_func() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), Scaled())
    assert can_part(model[:2])
    assert not can_part(model)
    jobs = jobs_of(model, dataset_of((28, 28)), (20, 20))
    alone = [train(Job(deepcopy(model), *_rest(job))) for job in jobs]
    for one, other in zip(alone, train_together(model, jobs), strict=True):
        assert (flat(one.state) - flat(other.state)).abs().max() < 1e-5


def test_the_one_step_of_a_client_is_torchs_and_leaves_the_model_as_it_came() -> None:
    for momentum, decay, steps in ((0.0, 0.0, 1), (0.0, 0.1, 3), (0.9, 0.0, 3), (0.9, 0.1, 2)):
        torch.manual_seed(0)
        model = build("tiny-cnn")
        [job] = jobs_of(
            model, dataset_of((28, 28)), (20,), momentum=momentum, weight_decay=decay, steps=steps
        )
        came = dict(model.state_dict())
        before = {name: value.clone() for name, value in came.items()}
        expected = deepcopy(model)
        sgd = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
        for images, labels in batches(job):
            sgd.zero_grad()
            nn.functional.cross_entropy(expected(images), labels).backward()
            sgd.step()
        assert same_tensors(train(job).state, expected.state_dict())
        assert same_tensors(came, before)


def same_tensors(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


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
    "changes",
    [
        {},
        {"attack": "bit-flip"},
        {"attack": "label-shift"},
        {"compressor": "qsgd"},
        {"local-steps": 3, "momentum": 0.9},
    ],
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


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"downlink-compressor": "qsgd"}])
def test_what_cannot_be_vectorized_is_refused(changes: dict[str, Any]) -> None:
    [key] = changes
    with pytest.raises(ConfigError, match=f"{key} is .* allowed with backend vectorized"):
        run(validate({**CONFIG, **changes}), backend="vectorized")


def test_bf16_is_near_fp32_and_its_weights_are_fp32() -> None:
    torch.manual_seed(0)
    model = build("small-cnn", input_shape=(1, 28, 28))
    states = []
    for precision in ("fp32", "bf16"):
        [job] = jobs_of(model, dataset_of((28, 28)), (20,), precision=precision)
        states.append(train(Job(deepcopy(model), *_rest(job))).state)
    assert {value.dtype for value in states[1].values()} == {torch.float32}
    before = flat(model.state_dict())
    steps = [flat(state) - before for state in states]
    assert 0 < (steps[0] - steps[1]).norm() < 0.1 * steps[0].norm()
