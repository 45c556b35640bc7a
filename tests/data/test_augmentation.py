"""Random crops and mirror images of the clients' batches."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_bgmd.data.augmentation import PADDING, crop_and_flip


def crops_of(image: NDArray[Any]) -> list[NDArray[Any]]:
    """Return what can become of an image, one crop after the other by plain slices."""
    height, width = image.shape[:2]
    sides = [(PADDING, PADDING)] * 2 + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image, sides)
    crops = [
        padded[top : top + height, left : left + width]
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    ]
    return crops + [crop[:, ::-1] for crop in crops]


@pytest.mark.parametrize("shape", [(28, 20), (6, 7, 3)])
def test_every_image_is_a_crop_of_its_own_and_all_crops_come_up(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    two = draw.integers(0, 256, (2, *shape), np.uint8)
    images = two[[0, 1] * 1000]
    before = images.copy()
    made = crop_and_flip(images, np.random.default_rng(1))
    assert made.dtype == np.uint8
    assert made.shape == images.shape
    np.testing.assert_array_equal(images, before)
    for which, image in enumerate(two):
        possible = [crop.tobytes() for crop in crops_of(image)]
        found = [possible.index(crop.tobytes()) for crop in made[which::2]]
        assert len(set(found)) > 0.99 * len(possible)  # 162 of them, 1,000 draws
        assert 400 < sum(index >= len(possible) // 2 for index in found) < 600
    again = crop_and_flip(images, np.random.default_rng(1))
    np.testing.assert_array_equal(made, again)
