"""The model and the data: 1,797 images of 8 x 8 pixels that scikit-learn ships."""

from collections import OrderedDict
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Examples = tuple[Tensor, Tensor]


def build_net() -> nn.Module:
    """Return a network with one hidden layer."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@lru_cache
def split_digits() -> tuple[Examples, Examples]:
    """Return 80 % of the digits for the clients and 20 % for the server's test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.float32(images / 16), labels, test_size=0.2, random_state=42, stratify=labels
    )
    a, b, c, d = (torch.from_numpy(part) for part in parts)
    return (a, c), (b, d)


def load_data(partition_id: int, num_partitions: int) -> Examples:
    """Return a client's own examples."""
    images, labels = split_digits()[0]
    return images[partition_id::num_partitions], labels[partition_id::num_partitions]


def get_weights(net: nn.Module) -> list[NDArray[np.float32]]:
    """Return the network's arrays."""
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net: nn.Module, weights: list[NDArray[np.float32]]) -> None:
    """Set the network's arrays."""
    named = zip(net.state_dict(), weights, strict=True)
    net.load_state_dict(OrderedDict((name, torch.from_numpy(w.copy())) for name, w in named))


def train(net: nn.Module, examples: Examples, epochs: int, learning_rate: float) -> float:
    """Train on batches of 16; return the last loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    images, labels = examples
    loss = torch.zeros(())
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(16):
            optimizer.zero_grad()
            loss = cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


def test(net: nn.Module, examples: Examples) -> tuple[float, float]:
    """Return loss and accuracy."""
    images, labels = examples
    with torch.no_grad():
        outputs = net(images)
    accuracy = (outputs.argmax(1) == labels).float().mean()
    return cross_entropy(outputs, labels).item(), accuracy.item()
