"""The shape of a transformer, GPT-2's, and values that stand for trained ones."""

import math

import numpy as np
from flwr.app import Array, ArrayRecord

_DEPTH, _WIDTH, _WORDS, _PLACES = 24, 1024, 50257, 1024
"""Of GPT-2 medium: 355 million parameters."""


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Return the arrays of a transformer of about ``parameters`` values, by name.

    Smaller ones than GPT-2 medium have its depth, width and vocabulary scaled alike.
    """
    scale = 1.0
    while _count(found := _shapes(scale)) > parameters:
        scale *= 0.99
    return found


def _shapes(scale: float) -> dict[str, tuple[int, ...]]:
    width = max(8, 8 * round(_WIDTH * scale / 8))
    depth, words = max(2, round(_DEPTH * scale)), max(64, round(_WORDS * scale))
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (words, width),
        "wpe.weight": (_PLACES, width),
    }
    for number in range(depth):
        for name, wide in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            found[f"h.{number}.{name}.weight"] = (width, wide * width)
            found[f"h.{number}.{name}.bias"] = (wide * width,)
        found[f"h.{number}.mlp.c_proj.weight"] = (4 * width, width)
        for name in ("mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            found[f"h.{number}.{name}"] = (width,)
    return found | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _count(found: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in found.values())


def drawn(shape: tuple[int, ...], dtype: str, seed: list[int]) -> np.ndarray:
    """Return values of about 0.02, as those of a transformer at its start."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    return values.astype(dtype, copy=False)


def first_model(parameters: int, dtype: str) -> ArrayRecord:
    """Return the model that a run begins with, made array by array."""
    record = ArrayRecord()
    for number, (key, shape) in enumerate(shapes(parameters).items()):
        record[key] = Array(drawn(shape, dtype, [0, number]))
    return record
