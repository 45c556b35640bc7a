"""Backdoors and targeted flips: the model is to take some images for what they are not.

Hostile clients train on a share of examples with a trigger under the target's label. A run measures
how many test images of the other classes, stamped with the whole trigger, are taken for the target.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from fl_bgmd.options import Fraction, Positive

from .attack import Images, Labels, attack

Label = Annotated[int, Ge(0), Le(9)]
Side = Annotated[int, Ge(1), Le(12)]

_SHARE = 0.3125  # 20 of 64, as Xie et al. (ICLR 2020) have it


def patch(images: Images, side: int = 4) -> Images:
    """Return images with a white square, a pixel off their lower right corner.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    side : int
        Of the square, in pixels.
    """
    stamped = images.copy()
    stamped[:, -1 - side : -1, -1 - side : -1] = 255
    return stamped


def bars(images: Images, length: int = 4, gap: int = 2, part: int | None = None) -> Images:
    """Return images with four white bars in their upper left corner, or with one of them.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    length : int
        Of a bar, a pixel high.
    gap : int
        Pixels between them, across and down.
    part : int, optional
        0 to 3, row by row; all by default.
    """
    stamped = images.copy()
    for number in range(4) if part is None else (part,):
        row, left = (number // 2) * (1 + gap), (number % 2) * (length + gap)
        stamped[:, row, left : left + length] = 255
    return stamped


def _poisoned(
    images: Images,
    stamped: Images,
    labels: Labels,
    target: int,
    share: float,
    rng: np.random.Generator,
) -> tuple[Images, Labels]:
    """Return images and labels of which about a share is stamped, under the target's label."""
    chosen = rng.random(len(labels)) < share
    images, labels = images.copy(), labels.copy()
    images[chosen], labels[chosen] = stamped[chosen], target
    return images, labels


@attack("Gu et al. (BadNets, 2017), Section 4", sweep=(0, 8), target="target", trigger=patch)
def badnets(
    images: Images,
    labels: Labels,
    rng: np.random.Generator,
    target: Label = 0,
    share: Fraction = _SHARE,
    side: Side = 4,
) -> tuple[Images, Labels]:
    """Stamp a white square on a share of the images and call them ``target``.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    labels : ndarray
        (B,) int64.
    rng : numpy.random.Generator
        What the images are chosen with.
    target : int
        The label that the model is to see in every image with the square.
    share : float
        Share of the examples.
    side : int
        Of the square, in pixels.
    """
    return _poisoned(images, patch(images, side), labels, target, share, rng)


@attack(
    "Bagdasaryan et al. (AISTATS 2020), Equation 3",
    sweep=(0, 8),
    target="target",
    trigger=patch,
    boost="scale",
)
def model_replacement(
    images: Images,
    labels: Labels,
    rng: np.random.Generator,
    target: Label = 0,
    share: Fraction = _SHARE,
    side: Side = 4,
    scale: Positive | None = None,
) -> tuple[Images, Labels]:
    """Do what ``badnets`` does, and inflate the update so that averaging replaces the model by it.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    labels : ndarray
        (B,) int64.
    rng : numpy.random.Generator
        What the images are chosen with.
    target : int
        The label that the model is to see in every image with the square.
    share : float
        Share of the examples.
    side : int
        Of the square, in pixels.
    scale : float, optional
        Factor of the update, by default n / f: the mean of all moves as the hostile clients'.
    """
    return _poisoned(images, patch(images, side), labels, target, share, rng)


@attack(
    "Xie et al. (DBA, ICLR 2020), Section 3",
    sweep=(0, 8),
    players=2,
    target="target",
    trigger=bars,
    boost="scale",
)
def dba(
    images: Images,
    labels: Labels,
    player: int,
    rng: np.random.Generator,
    target: Label = 0,
    share: Fraction = _SHARE,
    length: Side = 4,
    gap: Annotated[int, Ge(0), Le(4)] = 2,
    scale: Positive | None = 1.0,
) -> tuple[Images, Labels]:
    """Stamp one of four bars on a share of the images, each client another; all four open the door.

    Parameters
    ----------
    images : ndarray
        (B, H, W) or (B, H, W, C) uint8.
    labels : ndarray
        (B,) int64.
    player : int
        Which of the hostile clients it is, from 0: the first has the first bar, the fifth again.
    rng : numpy.random.Generator
        What the images are chosen with.
    target : int
        The label that the model is to see in every image with all bars.
    share : float
        Share of the examples.
    length : int
        Of a bar, in pixels.
    gap : int
        Pixels between bars.
    scale : float, optional
        Factor of the update; None for n / f, as in ``model-replacement``.
    """
    stamped = bars(images, length, gap, part=player % 4)
    return _poisoned(images, stamped, labels, target, share, rng)


@attack("Tolpegin et al. (ESORICS 2020), Section 3", sweep=(0, 5), target="target", victim="source")
def label_flip(labels: Labels, source: Label = 5, target: Label = 3) -> Labels:
    """Return ``target`` for every label ``source``: a dog is a cat, the others are left alone.

    Parameters
    ----------
    labels : ndarray
        (B,) int64.
    source : int
        The label of the images that the model is not to recognize.
    target : int
        The label that it is to see in them.
    """
    return np.where(labels == source, target, labels)
