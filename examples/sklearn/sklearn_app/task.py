"""The model and the data: 1,797 images of 8 x 8 pixels that scikit-learn ships."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

NUM_CLASSES, NUM_FEATURES = 10, 64

Examples = tuple[NDArray[np.float64], NDArray[np.int64]]


@lru_cache
def split_digits() -> tuple[Examples, Examples]:
    """Return 80 % of the digits for the clients and 20 % for the server's test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=42, stratify=labels)
    return (parts[0], parts[2]), (parts[1], parts[3])


def load_data(partition_id: int, num_partitions: int) -> Examples:
    """Return a client's own examples."""
    images, labels = split_digits()[0]
    return images[partition_id::num_partitions], labels[partition_id::num_partitions]


def create_model(local_epochs: int) -> LogisticRegression:
    """Return a model whose parameters can be set before it has seen any data."""
    model = LogisticRegression(max_iter=local_epochs, warm_start=True)
    model.classes_ = np.arange(NUM_CLASSES)
    set_parameters(model, [np.zeros((NUM_CLASSES, NUM_FEATURES)), np.zeros(NUM_CLASSES)])
    return model


def get_parameters(model: LogisticRegression) -> list[NDArray[np.float64]]:
    """Return coefficients and intercepts."""
    return [model.coef_, model.intercept_]


def set_parameters(model: LogisticRegression, parameters: list[NDArray[np.float64]]) -> None:
    """Set coefficients and intercepts."""
    model.coef_, model.intercept_ = parameters
