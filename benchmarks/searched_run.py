"""One training run in which colluders search their strength against the deployed rule.

They see everything: the honest updates, the rule, what it remembers and what it will draw next. The
clients train an MLP, one gradient each a round; a third of the examples is shared out at random,
the others are sorted by label.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from fl_bgmd.aggregators import Aggregate, build_rule
from fl_bgmd.attacks import ATTACKS, View, alie, build_attacks, huge, ipm
from fl_bgmd.attacks.search import SEARCH_EVERY, searched
from fl_bgmd.data import load, normalize, partition
from strategies.averaging import newest_weight

CLIENTS, HOSTILE, BATCH, SHARED = 14, 4, 64, 1 / 3
SHARE, AVERAGE = HOSTILE / CLIENTS, 0.1
LOST = 1e9
"""A parameter of this size ends the run: nothing brings the model back, and squares overflow."""

# ------------------------------------------------------------------------------ the rule


@dataclass
class Deployed:
    """A rule as a server has it: its memory and its generator carry over from round to round."""

    rule: Callable[[Tensor, Any], Aggregate]
    generator: torch.Generator
    memory: Any = None

    def __call__(self, updates: Tensor) -> Tensor:
        """Return the step (d,) of a round with updates (n, d)."""
        result = self.rule(updates, self.memory)
        self.memory = result.memory
        return result.vector

    def preview(self, updates: Tensor, rounds: int) -> Tensor:
        """Return the sum of the steps of rounds with these updates, and leave the rule as it is."""
        memory, drawn = self.memory, self.generator.get_state()
        try:
            moved = self(updates)
            if self.memory is None and torch.equal(self.generator.get_state(), drawn):
                return rounds * moved  # nothing that the next round would do differently
            for _ in range(1, rounds):
                moved = moved + self(updates)
            return moved
        finally:
            self.memory = memory
            self.generator.set_state(drawn)


def make_rule(spec: str, generator: torch.Generator) -> Deployed:
    """Return a rule by its spec, told how many clients lie, that draws from the generator.

    Raises ``ValueError`` for one that does not exist.
    """
    rule = build_rule(spec, byzantine_fraction=SHARE, generator=generator)
    return Deployed(rule, generator)


# --------------------------------------------------------------------------- the attacks


def _alie(honest: Tensor, strength: float) -> Tensor:
    """Of those who know the honest updates, not only the hostile clients' own."""
    return alie(honest, CLIENTS, strength)


def _signs(direction: Tensor, honest: Tensor, strength: float) -> Tensor:
    """Return the opposite signs of a direction, as long as the median honest update."""
    length = float(torch.linalg.vector_norm(honest, dim=1).median())
    return huge(direction, strength * length / direction.numel() ** 0.5)


def _consistent(honest: Tensor, strength: float) -> Tensor:
    """Xie et al. (PoisonedFL, CVPR 2025): one direction of signs, the same in all rounds."""
    fixed = torch.Generator().manual_seed(99)
    return _signs(torch.randn(honest.shape[1], generator=fixed), honest, strength)


_LENGTHS = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
SEARCHED: dict[str, tuple[Callable[[Tensor, float], Tensor], Sequence[float]]] = {
    "ipm": (ipm, (0.1, 0.5, 1.0, 2.0, 5.0, 20.0)),
    "alie": (_alie, (0.25, 0.5, 1.0, 1.5, 2.5, 5.0)),
    "consistent": (_consistent, _LENGTHS),
}
"""Lies of the honest updates and a strength, and the strengths to be tried. ``memory-takeover``,
``memory-consistent``, ``fang``, ``fang-krum`` and ``optimal-...`` of the laboratory search by
themselves; its other attacks of colluders are played as strongly as their papers say."""


def lie(attack: str, view: View) -> Tensor:
    """Return what all hostile clients send, (d,)."""
    if attack in SEARCHED:
        make, grid = SEARCHED[attack]
        assert view.honest is not None
        of_strength = partial(make, view.honest)
        strength = searched(of_strength, grid, view.honest, view.memory, view.pipeline)
        return of_strength(strength)
    [bound] = build_attacks(attack)
    return bound.lie(view)


# ------------------------------------------------------------------------- the federation


@dataclass(frozen=True)
class Federation:
    """Images (N, pixels) and labels (N,) to train and to test on, and who has which."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    parts: list[Tensor]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a batch of each client: (clients, BATCH, pixels) and (clients, BATCH)."""
        chosen = torch.stack(
            [part[torch.randint(len(part), (BATCH,), generator=generator)] for part in self.parts]
        )
        return self.images[chosen], self.labels[chosen]


def dealt(labels: NDArray[np.int64], seed: int) -> list[Tensor]:
    """Deal out a share at random and the others sorted by label; return each client's indices."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shared, rest = np.split(order, [int(SHARED * len(order))])
    sorted_parts = partition(labels[rest], CLIENTS, scheme="shards", num_shards=CLIENTS, seed=seed)
    return [
        torch.from_numpy(np.concatenate([alike, rest[own]]))
        for alike, own in zip(np.array_split(shared, CLIENTS), sorted_parts, strict=True)
    ]


@cache
def _examples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a process needs once: images and labels to train and to test on."""
    dataset = load("mnist")
    images, test_images = (
        normalize(part, dataset).flatten(1) for part in (dataset.train_images, dataset.test_images)
    )
    return (
        images,
        torch.tensor(dataset.train_labels),
        test_images,
        torch.tensor(dataset.test_labels),
    )


def mnist(seed: int) -> Federation:
    """Return the federation of a seed."""
    examples = _examples()
    return Federation(*examples, dealt(examples[1].numpy(), seed))


class Network:
    """An MLP of one hidden layer as a function of all its parameters in one vector (d,)."""

    def __init__(self, pixels: int, hidden: int, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        self.module = nn.Sequential(*layers)
        self.start = parameters_to_vector(self.module.parameters()).detach()
        self.gradients = vmap(grad(self._loss), in_dims=(None, 0, 0))
        """(d,), (n, B, pixels), (n, B) -> (n, d): each client's gradient."""

    def accuracy(self, vector: Tensor, images: Tensor, labels: Tensor) -> float:
        """Return the accuracy in percent."""
        with torch.no_grad():
            return 100 * float((self._scores(vector, images).argmax(1) == labels).double().mean())

    def _loss(self, vector: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._scores(vector, images), labels)

    def _scores(self, vector: Tensor, images: Tensor) -> Tensor:
        parameters = dict(self.module.named_parameters())
        parts = torch.split(vector, [values.numel() for values in parameters.values()])
        shaped = zip(parameters.items(), parts, strict=True)
        named = {name: part.view(values.shape) for (name, values), part in shaped}
        scores: Tensor = functional_call(self.module, named, (images,))
        return scores


# ------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Cell:
    """One run. Raises ``ValueError`` for names and numbers that none can have."""

    rule: str
    attack: str
    momentum: float = 0.0
    learning_rate: float = 0.2
    steps: int = 300
    hidden: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        make_rule(self.rule, torch.Generator())
        played = (name for name, entry in ATTACKS.items() if entry.knows != "own")
        attacks = ("none", *dict.fromkeys((*SEARCHED, *played)))
        for name, value, fits, allowed in (
            ("attack", self.attack, self.attack in attacks, ", ".join(attacks)),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1"),
            ("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            ("steps", self.steps, self.steps >= 1, "1 or more"),
            ("hidden", self.hidden, self.hidden >= 1, "1 or more"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Outcome:
    """What a run came to: accuracy in percent, and the strengths that were found.

    ``averaged`` is the accuracy of a running average of the models, over about the last tenth of
    the rounds: the last model's swings from round to round.
    """

    accuracy: float
    averaged: float
    strengths: tuple[float, ...]
    seconds: float


def measure(cell: Cell, federation: Federation | None = None) -> Outcome:
    """Train as the cell says, by default on MNIST."""
    started = time.perf_counter()
    federation = federation or mnist(cell.seed)
    network = Network(federation.images.shape[1], cell.hidden, cell.seed)
    batches, server, liars = (
        torch.Generator().manual_seed(3 * cell.seed + which) for which in range(3)
    )
    rule = make_rule(cell.rule, server)
    model, strengths = network.start.clone(), []
    average = model.clone()
    momentum = torch.zeros(CLIENTS, len(model))
    notes: dict[str, Any] = {}
    step: Tensor | None = None
    for number in range(1, cell.steps + 1):
        gradients = network.gradients(model, *federation.batch(batches))
        momentum = cell.momentum * momentum + (1 - cell.momentum) * gradients
        updates = momentum.clone()
        if cell.attack != "none":
            view = _view(momentum, rule, liars, notes, step)
            updates[:HOSTILE] = lie(cell.attack, view)
            strengths.append(notes.get("strength"))
        step = rule(updates)
        model = model - cell.learning_rate * step
        average = average.lerp(model, newest_weight(AVERAGE, number))
        if not model.abs().max() < LOST:
            break
    accuracy, averaged = (
        round(network.accuracy(each, federation.test_images, federation.test_labels), 2)
        for each in (model, average)
    )
    found = tuple(strength for strength in strengths[::SEARCH_EVERY] if strength is not None)
    return Outcome(accuracy, averaged, found, round(time.perf_counter() - started, 1))


def _view(
    updates: Tensor, rule: Deployed, generator: torch.Generator, notes: Any, step: Tensor | None
) -> View:
    """Return all that there is to see in a round, and the server's step in the round before."""

    def pipeline(candidate: Tensor, rounds: int = 1) -> Tensor:
        sent = updates.clone()
        sent[:HOSTILE] = candidate
        return rule.preview(sent, rounds)

    return View(
        update=updates[0],
        generator=generator,
        num_clients=CLIENTS,
        num_byzantine=HOSTILE,
        colluders=updates[:HOSTILE],
        honest=updates[HOSTILE:],
        colluder_ids=tuple(range(HOSTILE)),
        honest_ids=tuple(range(HOSTILE, CLIENTS)),
        memory=notes,
        last_step=step,
        pipeline=pipeline,
    )
