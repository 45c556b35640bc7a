"""Train one client's model on its partition."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import Dataset, normalize
from ..data.augmentation import crop_and_flip
from ..devices import to_input
from ..schedules import Schedule, scheduled_learning_rate

Corrupt = Callable[[NDArray[Any], NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.int64]]]
"""Takes and returns stored images and labels; images that it returns as floats are normalized."""

State = dict[str, Tensor]
"""A model's ``state_dict``."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round.

    Attributes
    ----------
    steps : int
        Mini-batches; 0 means ``epochs`` passes over the partition.
    epochs : int
        Passes over the partition when ``steps`` is 0.
    batch_size : int
        Examples in a mini-batch.
    learning_rate, momentum, weight_decay : float
        Of plain SGD, started anew in each round.
    precision : {"fp32", "bf16"}
        Of the forward and backward passes; weights and steps are those of the model either way.
    augmentation : {"none", "crop-flip"}
        What is done to each batch before anything else.
    """

    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    precision: str = "fp32"
    augmentation: str = "none"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], server_round: int) -> Self:
        """Return how a run configuration has clients train in a round."""
        return cls(
            steps=int(config["local-steps"]),
            epochs=int(config["local-epochs"]),
            batch_size=int(config["batch-size"]),
            learning_rate=scheduled_learning_rate(
                float(config["learning-rate"]),
                cast(Schedule, config["lr-schedule"]),
                server_round,
                int(config["num-server-rounds"]),
                period=int(config["lr-period"]),
                decay=float(config["lr-decay"]),
            ),
            momentum=float(config["momentum"]),
            weight_decay=float(config["weight-decay"]),
            precision=str(config.get("precision", "fp32")),
            augmentation=str(config.get("augmentation", "none")),
        )


@dataclass(frozen=True, eq=False)
class Job:
    """What a client is asked to do in a round.

    Attributes
    ----------
    model : nn.Module
        As received. Training gives it other tensors in its parameters' place, and writes into its
        buffers.
    dataset : Dataset
        Shared by the clients of a process.
    indices : (m,) int64
        The client's examples.
    settings : LocalTraining
        How to train.
    seed : int
        Fixes the order of the examples and all that the model draws (dropout).
    device : torch.device
        Where to train.
    corrupt : callable, optional
        Changes each batch of raw images and labels, which may have been augmented.
    """

    model: nn.Module
    dataset: Dataset
    indices: NDArray[np.int64]
    settings: LocalTraining
    seed: int
    device: torch.device
    corrupt: Corrupt | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """What training came to.

    Attributes
    ----------
    state : dict of Tensor
        The trained model's ``state_dict``.
    loss : float
        Mean cross-entropy over the steps, each before it was taken.
    """

    state: State
    loss: float


def train(job: Job) -> Trained:
    """Train a client's model; the tensors that it came with stay as they are."""
    seed_torch(job.seed, job.device)
    model = placed(job.model, job.device)
    if not model.training:  # it is no small part of a small model's round to tell every layer
        model.train()
    descent = Descent(list(model.parameters()), job.settings)
    lower = job.settings.precision == "bf16"
    losses: list[Tensor] = []
    for images, labels in batches(job):
        with torch.autocast(job.device.type, torch.bfloat16, enabled=lower):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step()
        losses.append(loss.detach())
    # The mean of one is itself.
    mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
    return Trained(model.state_dict(), float(mean))


class Descent:
    """The steps of :class:`torch.optim.SGD` from values that it leaves as they are.

    The first step of a parameter is written elsewhere, which takes no longer and spares a copy of
    the model that all clients begin with. (And torch's class loads its compiler: seconds.)

    Parameters
    ----------
    parameters : list of nn.Parameter
        What is trained; each is given memory of its own by its first step.
    settings : LocalTraining
        Learning rate, momentum and weight decay.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: LocalTraining) -> None:
        self._parameters = parameters
        self._settings = settings
        self._own: set[int] = set()
        self._velocities: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters along their gradients, which are used up."""
        settings = self._settings
        for number, parameter in enumerate(self._parameters):
            direction = parameter.grad
            if direction is None:
                continue
            parameter.grad = None
            if settings.weight_decay:
                direction = direction.add(parameter, alpha=settings.weight_decay)
            if settings.momentum:
                velocity = self._velocities.get(number)
                if velocity is not None:
                    direction = velocity.mul(settings.momentum).add_(direction)
                self._velocities[number] = direction
            if number in self._own:
                parameter.add_(direction, alpha=-settings.learning_rate)
                continue
            self._own.add(number)
            # Into the gradient's memory, which is in the cache and which nobody needs any more:
            # torch lets a gradient be changed in place, as clipping does.
            free = not settings.momentum and direction.stride() == parameter.stride()
            out = direction if free else torch.empty_like(parameter)
            torch.add(parameter, direction, alpha=-settings.learning_rate, out=out)
            parameter.data = out


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model on a device; one that is there is not gone through once more."""
    first = next(model.parameters(), None)
    return model if first is not None and first.device == device else model.to(device)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed what a model on ``device`` draws from."""
    # Not torch.manual_seed: without a GPU it queues a seeding of every CUDA device for later,
    # with a stack trace, at each call.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mini-batches: shuffled passes over the partition, cut off after ``steps`` if given."""
    settings, generator = job.settings, np.random.default_rng(job.seed)
    size = min(settings.batch_size, len(job.indices))
    taken = 0
    while True:
        order = generator.permutation(job.indices)
        # With a number of steps all batches are full; with epochs every example counts.
        end = len(order) - size + 1 if settings.steps else len(order)
        for start in range(0, end, size):
            yield _load(job, order[start : start + size], generator)
            taken += 1
            if taken == settings.steps:
                return
        if not settings.steps and taken >= settings.epochs * math.ceil(len(order) / size):
            return


def _load(
    job: Job, batch: NDArray[np.int64], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return the examples at ``batch`` as the model wants them."""
    raw, targets = job.dataset.train_images[batch], job.dataset.train_labels[batch]
    if job.settings.augmentation == "crop-flip":
        raw = crop_and_flip(raw, generator)
    if job.corrupt is not None:
        raw, targets = job.corrupt(raw, targets)
    done = raw.dtype != np.uint8
    images = to_input(torch.from_numpy(raw) if done else normalize(raw, job.dataset), job.device)
    return images, torch.from_numpy(targets).to(job.device)
