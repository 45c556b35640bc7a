"""Augmentation of the clients' batches: what the CIFAR-10 literature trains with."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Augmentation = Literal["none", "crop-flip"]

PADDING = 4
"""Zeros around an image before it is cropped."""


def crop_and_flip(images: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return random crops of zero-padded images, half of them mirrored.

    As He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2: four pixels of
    padding on each side, a crop of the original size.

    Parameters
    ----------
    images : ndarray
        uint8 (B, H, W) or (B, H, W, C); stays as it is.
    generator : np.random.Generator
        What crops and mirrors are drawn from.
    """
    count, height, width = images.shape[:3]
    around: list[Any] = [(0, 0), (PADDING, PADDING), (PADDING, PADDING)]
    padded = np.pad(images, around + [(0, 0)] * (images.ndim - 3))
    top, left = generator.integers(0, 2 * PADDING + 1, (2, count, 1))
    mirrored = generator.random((count, 1)) < 0.5
    rows, columns = top + np.arange(height), left + np.arange(width)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    made: NDArray[np.uint8] = padded[
        np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return made
