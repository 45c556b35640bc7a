"""Logistic regression by hand; 569 tumors, 30 features, benign or malignant (Wisconsin, 1995)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer

NUM_FEATURES = 30
NUM_TEST = 113

Examples = tuple[NDArray[np.float64], NDArray[np.float64]]


@lru_cache
def split_tumors() -> tuple[Examples, Examples]:
    """Return the clients' examples and the server's, features standardized."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    order = np.random.default_rng(42).permutation(len(labels))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return (features[train], labels[train]), (features[test], labels[test])


def load_data(partition_id: int, num_partitions: int) -> Examples:
    """Return a client's own examples."""
    features, labels = split_tumors()[0]
    return features[partition_id::num_partitions], labels[partition_id::num_partitions]


def predict(
    weights: NDArray[np.float64], bias: NDArray[np.float64], features: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the probability that each tumor is benign."""
    return 0.5 * (1 + np.tanh(0.5 * (features @ weights + bias)))


def train(
    weights: NDArray[np.float64],
    bias: NDArray[np.float64],
    examples: Examples,
    steps: int,
    learning_rate: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take steps of gradient descent; return the new weights and bias."""
    features, labels = examples
    for _ in range(steps):
        error = predict(weights, bias, features) - labels
        weights = weights - learning_rate * features.T @ error / len(labels)
        bias = bias - learning_rate * error.mean()
    return weights, bias


def accuracy(weights: NDArray[np.float64], bias: NDArray[np.float64], examples: Examples) -> float:
    """Return the share of tumors that are told right."""
    features, labels = examples
    return float(np.mean((predict(weights, bias, features) > 0.5) == labels))
