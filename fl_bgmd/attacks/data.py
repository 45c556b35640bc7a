"""Attacks on the examples a hostile client trains on: raw images and labels, before normalization.

Functions of uint8 images, (B, H, W) or (B, H, W, C), and int64 labels (B,); they return new arrays
and leave theirs alone. The BGMD authors' code applied the image attacks after normalization, where
a standard deviation of 10 buries the image; here 10 is 10 of 255 gray levels unless an option
``normalized`` says otherwise.
"""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import AllowInfNan

from fl_bgmd.extras import require
from fl_bgmd.options import Allowed, Fraction, Positive

from .attack import Images, Labels, Strength, attack

Finite = Annotated[float, AllowInfNan(False), Allowed("a finite number")]

_BGMD = "Acharya et al. (BGMD), Section 7"


@attack(_BGMD, sweep=(1, 8), authors_code={"": 0}, target="target")
def backdoor(
    labels: Labels,
    target: Annotated[int, Ge(0), Le(9)] = 8,
    rng: np.random.Generator | None = None,
    *,
    share: Fraction = 1.0,
) -> Labels:
    """Return ``target`` for every label (8 is "bag"), or for a share of them.

    Acharya et al. corrupt the samples of some clients; ``backdoor:8,share=0.4`` on all of them
    (a hostile share of 1) corrupts some samples of all clients.

    Parameters
    ----------
    labels : ndarray
        (B,) int64.
    target : int
        The label that the model is to see in every image.
    rng : numpy.random.Generator, optional
        What the examples are drawn with; one of its own by default.
    share : float
        Share of the examples, each drawn for itself.
    """
    if share == 1.0:
        return np.full_like(labels, target)
    rng = rng or np.random.default_rng()
    return np.where(rng.random(len(labels)) < share, np.int64(target), labels)


@attack("Ghosh et al., Section 8 (9 - y)")
def label_shift(labels: Labels, num_classes: int = 10) -> Labels:
    """Return ``num_classes - 1 - label`` (9 - y) for labels (B,): label flipping."""
    return num_classes - 1 - labels


@attack("Ghosh et al., Section 8")
def random_labels(labels: Labels, num_classes: int, rng: np.random.Generator) -> Labels:
    """Return as many labels (B,), drawn uniformly."""
    return rng.integers(num_classes, size=labels.shape, dtype=np.int64)


@attack(_BGMD, sweep=(10.0, 100.0))
def image_noise(
    images: Images,
    std: Strength = 10.0,
    rng: np.random.Generator | None = None,
    *,
    mean: Finite = 0.0,
    normalized: bool = False,
) -> Images:
    """Return the images plus N(mean, std^2) in every value.

    Acharya et al. (BGMD), Section 7: N(0, 100) on the 0..255 scale, a standard deviation of 10;
    rounded and clipped to that scale. Their code adds it after normalization, their slides say
    N(100, 1): ``image-noise:10,normalized=on`` and ``image-noise:1,mean=100,normalized=on``.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8; normalized (B, C, H, W) float32.
    std : float
        Standard deviation.
    rng : numpy.random.Generator, optional
        What the noise is drawn from; one of its own by default.
    mean : float
        Mean of the noise.
    normalized : bool
        Whether it is added to what the model sees, in its units, and not to 255 gray levels.
    """
    rng = rng or np.random.default_rng()
    noisy = images + rng.normal(mean, std, size=images.shape)
    if normalized:
        return noisy.astype(images.dtype)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@attack(_BGMD, sweep=(0.5, 0.9))
def impulse(
    images: Images, share: Fraction = 0.9, rng: np.random.Generator | None = None
) -> Images:
    """Return the images with ``share`` of the pixels set to 0 or 255, all channels alike.

    Salt and pepper: Acharya et al. (BGMD), Section 7, 90 % of the pixels.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    share : float
        Share of the pixels.
    rng : numpy.random.Generator, optional
        What they are drawn from; one of its own by default.
    """
    rng = rng or np.random.default_rng()
    hit = rng.random(images.shape[:3]) < share
    salt = np.where(rng.random(images.shape[:3]) < 0.5, np.uint8(0), np.uint8(255))
    corrupted = images.copy()
    corrupted[hit] = salt[hit] if images.ndim == 3 else salt[hit][:, None]
    return corrupted


@attack("Acharya et al. (BGMD), Figure 4", sweep=(2.0, 4.0))
def blur(
    images: Images,
    sigma: Positive = 2.0,
) -> Images:
    """Return the images under a Gaussian filter (Figure 4 (d)).

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    sigma : float
        Standard deviation of the filter in pixels.
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
