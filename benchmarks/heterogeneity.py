"""How far clients' gradients are apart, and what that leaves to promise against hostile ones.

``python -m benchmarks.heterogeneity`` trains without attack by averaging mini-batch gradients and
prints, along the way, for the clients' whole gradients ``g_i`` (of up to 1,000 examples each):

- ``B^2 = mean_i |g_i - g|^2 / |g|^2`` and ``1 / (2 + B^2)``: from that hostile share on no rule can
  guarantee descent on all problems whose gradients are that far apart (Allouah et al., arXiv
  2309.13591, with G = 0).
- The *other world*, for f hostile among n. Let f of the clients send ``c``, the others being honest
  with mean ``g``, and choose ``c = -sum_R g_i / f`` for n - 2f honest rows R. To a server that sees
  the updates and nothing else the same rows may come from n - f honest clients, R and the senders
  of ``c``, whose mean is zero, and from f hostile ones, the rest: whatever moves the model toward
  ``g`` moves it away from the optimum of that world (with ``c`` a little longer their mean is
  ``-e g``). Shown are the length of ``c`` relative to the median gradient's, with an R that makes
  it short (the attack ``other-world``), and its median distance from the honest gradients relative
  to theirs from each other: at 1 or below nothing about a single ``c`` is unusual.
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fl_bgmd.attacks import balanced_rows
from fl_bgmd.data import Dataset, load, normalize, partition
from fl_bgmd.devices import to_input
from fl_bgmd.evaluation import evaluate
from fl_bgmd.models import build

MOST_EXAMPLES = 1000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What is trained, and by whom."""

    dataset: str
    model: str
    partition: str
    clients: int
    hostile: int
    learning_rate: float


SETTINGS = {
    "mnist-similarity": Setting("mnist", "mlp", "similarity:0.3", 14, 4, 0.2),
    "mnist-shards": Setting("mnist", "mlp", "shards:80", 10, 4, 0.2),
    "mnist-iid": Setting("mnist", "mlp", "iid", 10, 4, 0.2),
    "cifar10-shards": Setting("cifar10", "small-cnn", "shards:80", 10, 4, 0.05),
    "cifar10-iid": Setting("cifar10", "small-cnn", "iid", 10, 4, 0.05),
}


def gradient(model: nn.Module, dataset: Dataset, chosen: NDArray[np.int64]) -> Tensor:
    """Return the gradient (d,) of the mean loss over examples."""
    images = to_input(normalize(dataset.train_images[chosen], dataset), CPU)
    labels = torch.from_numpy(dataset.train_labels[chosen])
    loss = nn.functional.cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in found])


def dissimilarity(gradients: Tensor) -> float:
    """Return ``mean_i |g_i - g|^2 / |g|^2`` of gradients (n, d)."""
    mean = gradients.mean(0)
    return float((gradients - mean).square().sum(1).mean() / mean.square().sum())


def other_world(gradients: Tensor, hostile: int) -> tuple[float, float]:
    """Return how long, and how far from the others, the lies of the other world are.

    ``gradients`` (m, d) are those of all clients; the honest ones are each choice of m - hostile in
    turn, and the medians over the choices are returned.
    """
    clients = len(gradients)
    gram = (gradients @ gradients.T).double().numpy()
    found = []
    for liars in itertools.combinations(range(clients), hostile):
        honest = [i for i in range(clients) if i not in liars]
        inside = torch.from_numpy(gram[np.ix_(honest, honest)])
        kept = [honest[row] for row in balanced_rows(inside, clients - 2 * hostile)]
        square = gram[np.ix_(kept, kept)].sum() / hostile**2
        squares = gram[honest, honest]
        across = -gram[np.ix_(kept, honest)].sum(0) / hostile
        away = np.sqrt(square - 2 * across + squares)
        apart = np.sqrt(
            np.maximum(squares[:, None] + squares - 2 * gram[np.ix_(honest, honest)], 0)
        )
        usual = np.median(apart[np.triu_indices(len(honest), 1)])
        found.append((np.sqrt(square / np.median(squares)), np.median(away) / usual))
    length, distance = np.median(found, axis=0)
    return float(length), float(distance)


def measure(name: str, rounds: int, every: int, seed: int) -> list[dict[str, float | str | int]]:
    """Train; return a line for every ``every`` rounds."""
    setting, draw = SETTINGS[name], np.random.default_rng(seed)
    torch.manual_seed(seed)
    dataset = load(setting.dataset)
    model = build(setting.model)
    shares = partition(dataset.train_labels, setting.clients, scheme=setting.partition, seed=seed)
    whole = [draw.permutation(share)[:MOST_EXAMPLES] for share in shares]
    lines: list[dict[str, float | str | int]] = []
    for number in range(rounds + 1):
        if number % every == 0:
            gradients = torch.stack([gradient(model, dataset, part) for part in whole])
            apart = dissimilarity(gradients)
            length, distance = other_world(gradients, setting.hostile)
            found = evaluate(model, dataset, np.arange(len(dataset.test_labels)), CPU)
            model.train()
            lines.append(
                {
                    "setting": name,
                    "seed": seed,
                    "round": number,
                    "accuracy": found.accuracy,
                    "dissimilarity": apart,
                    "breakdown": 1 / (2 + apart),
                    "hostile": setting.hostile / setting.clients,
                    "length": length,
                    "distance": distance,
                }
            )
        batches = [draw.choice(share, 64, replace=False) for share in shares]
        step = torch.stack([gradient(model, dataset, batch) for batch in batches]).mean(0)
        with torch.no_grad():
            parameters = list(model.parameters())
            parts = step.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter -= setting.learning_rate * part.view_as(parameter)
    return lines


def main() -> None:
    """Measure each setting; print a table, and write the lines to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| setting | round | accuracy | B^2 | 1 / (2 + B^2) | hostile | length | distance |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.settings:
        for seed in options.seeds:
            for line in measure(name, options.rounds, options.every, seed):
                print(
                    f"| {name} | {line['round']} | {100 * float(line['accuracy']):.1f} | "
                    f"{line['dissimilarity']:.2f} | {line['breakdown']:.2f} | "
                    f"{line['hostile']:.2f} | {line['length']:.2f} | {line['distance']:.2f} |",
                    flush=True,
                )
                if options.output:
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
