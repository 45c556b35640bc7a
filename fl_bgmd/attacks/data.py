"""Attacks on the examples a hostile client trains on: raw images and labels, before normalisation.

Functions of uint8 images, (B, H, W) or (B, H, W, C), and int64 labels (B,); they return new arrays
and leave theirs alone. The BGMD authors' code applied the image attacks after normalisation, where
a standard deviation of 10 buries the image; here 10 is 10 of 255 grey levels.
"""

import numpy as np
import torch

from fl_bgmd.extras import require

from .base import Images, Labels


def backdoor(labels: Labels, target: int = 8) -> Labels:
    """Return ``target`` for every label: Acharya et al. (BGMD), Section 7 (8, "bag"; code: 0)."""
    return np.full_like(labels, target)


def label_shift(labels: Labels, num_classes: int = 10) -> Labels:
    """Return ``num_classes - 1 - label`` (9 - y): label flipping."""
    return num_classes - 1 - labels


def random_labels(labels: Labels, num_classes: int, rng: np.random.Generator) -> Labels:
    """Return labels drawn uniformly."""
    return rng.integers(num_classes, size=labels.shape, dtype=np.int64)


def image_noise(images: Images, std: float, rng: np.random.Generator) -> Images:
    """Return the images plus N(0, std^2) on the 0..255 scale, rounded and clipped to it.

    Acharya et al. (BGMD), Section 7: N(0, 100), a standard deviation of 10.
    """
    noisy = images + rng.normal(0.0, std, size=images.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def impulse(images: Images, share: float, rng: np.random.Generator) -> Images:
    """Return the images with ``share`` of the pixels set to 0 or 255, all channels alike.

    Salt and pepper: Acharya et al. (BGMD), Section 7, 90 % of the pixels.
    """
    hit = rng.random(images.shape[:3]) < share
    salt = np.where(rng.random(images.shape[:3]) < 0.5, np.uint8(0), np.uint8(255))
    corrupted = images.copy()
    corrupted[hit] = salt[hit] if images.ndim == 3 else salt[hit][:, None]
    return corrupted


def blur(images: Images, sigma: float) -> Images:
    """Return the images under a Gaussian filter of ``sigma`` pixels.

    Acharya et al. (BGMD), Figure 4 (d).
    """
    require("torchvision", "the attack blur", "vision")
    from torchvision.transforms.v2 import functional as transforms

    pixels = torch.from_numpy(images.copy())
    pixels = pixels[:, None] if images.ndim == 3 else pixels.permute(0, 3, 1, 2)
    size = 2 * max(1, round(3 * sigma)) + 1
    size = min(size, 2 * (min(images.shape[1:3]) - 1) + 1)
    blurred: torch.Tensor = transforms.gaussian_blur(pixels, [size, size], [sigma, sigma])
    result: Images = (blurred[:, 0] if images.ndim == 3 else blurred.permute(0, 2, 3, 1)).numpy()
    return np.ascontiguousarray(result)
