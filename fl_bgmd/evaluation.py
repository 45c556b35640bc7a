"""What a model makes of the test examples: for clients on their shares, for a server on all."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .data import Dataset, normalize
from .devices import to_input


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model makes of test examples.

    Attributes
    ----------
    loss : float
        Mean cross-entropy.
    confusion : (C, C) int64
        How many examples of the row's class were taken for the column's.
    """

    loss: float
    confusion: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Number of examples."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the examples that were recognized."""
        return float(np.trace(self.confusion)) / self.count

    @property
    def class_accuracies(self) -> list[float]:
        """Share of each class that was recognized; 0 for a class without examples."""
        totals = self.confusion.sum(axis=1)
        return [float(v) for v in np.diagonal(self.confusion) / np.maximum(totals, 1)]

    def backdoor_success(self, target: int, victim: int | None = None) -> float:
        """Share of the examples of another class, by default of all, that were taken for one."""
        classes = range(len(self.confusion)) if victim is None else (victim,)
        others = self.confusion[[c for c in classes if c != target]]
        return float(others[:, target].sum()) / max(1, int(others.sum()))


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    indices: NDArray[np.int64] | None,
    device: torch.device,
    batch_size: int = 200,
    stamp: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    part: Literal["test", "train"] = "test",
) -> Evaluation:
    """Evaluate ``model`` on the examples of a part at ``indices``, all for None.

    ``stamp`` changes the images before anything else is done to them: a backdoor's trigger.
    """
    model.to(device).eval()
    all_images, all_labels = dataset.part(part)
    chosen = np.arange(len(all_labels)) if indices is None else indices
    classes = dataset.num_classes
    loss, confusion = 0.0, np.zeros(classes * classes, dtype=np.int64)
    with torch.inference_mode():
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            raw = all_images[batch]
            images = normalize(raw if stamp is None else stamp(raw), dataset)
            images = to_input(images, device)
            labels = torch.from_numpy(all_labels[batch]).to(device)
            outputs = model(images)
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
            pairs = labels * classes + outputs.argmax(dim=1)
            confusion += np.bincount(pairs.cpu().numpy(), minlength=classes * classes)
    return Evaluation(loss / len(chosen), confusion.reshape(classes, classes))


_KNOWN: dict[tuple[Any, ...], Evaluation] = {}
_MOST_KNOWN = 16


def evaluate_once(model: nn.Module, dataset: Dataset, device: torch.device) -> Evaluation:
    """Evaluate a model on all test examples, or return what its weights came to in this process.

    For what runs begin with: those of a study have one model for each seed.
    """
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    key = (dataset, str(model), str(device), torch.get_num_threads(), digest.digest())
    if key not in _KNOWN:
        if len(_KNOWN) == _MOST_KNOWN:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = evaluate(model, dataset, None, device)
    return _KNOWN[key]
