"""How the arrays of a model are laid out in flat rows, and how rows become arrays again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fl_bgmd.filed import Room, folder_of
from fl_bgmd.held import hold, is_held, values_of
from fl_bgmd.mapped import mapped

BUFFER_DTYPE = np.dtype(np.longdouble)
"""Holds every float64 and, where it has 64 bits of mantissa, every 64-bit integer."""

FLOATS = ("float16", "float32", "float64")
"""Names of the dtypes that are trained."""

_BUFFER_SUFFIXES = ("running_mean", "running_var")

_PIECE = 2**20
"""Values that are looked at together."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of the model: where it came from and what a reply must hold in its place."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    offset: int
    """Where its values start in the row of its role."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class ModelLayout:
    """How the arrays of a model are laid out in flat rows.

    Attributes
    ----------
    directions : list of ArraySpec
        Floating-point arrays that are trained: rows of the update matrix.
    buffers : list of ArraySpec
        Batch-norm statistics and integer or boolean arrays: their values are combined, not
        their differences.
    dtype : numpy dtype
        What updates are computed in: float64 if any direction is, float32 otherwise.
    held : bool
        Whether the model's arrays are still values (:mod:`fl_bgmd.held`), as :meth:`to_arrays`
        then makes them.
    folder : Path or None
        Where the model is in a file (:mod:`fl_bgmd.filed`); ``values``, and what :meth:`to_arrays`
        makes, are in files there, too.

    Raises
    ------
    ValueError
        If an array of the model is neither floating-point, integer nor boolean, or no array is
        trained.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.keys = list(arrays)
        self.held, self.folder = is_held(arrays), folder_of(arrays)
        self.directions: list[ArraySpec] = []
        self.buffers: list[ArraySpec] = []
        values = {key: values_of(array) for key, array in arrays.items()}
        for key, value in values.items():
            dtype = value.dtype
            if dtype.name in FLOATS and not key.endswith(_BUFFER_SUFFIXES):
                specs = self.directions
            elif dtype.name in FLOATS or dtype.kind in "iub":
                specs = self.buffers
            else:
                raise ValueError(
                    f"array {key!r} of the model has dtype {dtype}; allowed: "
                    f"{', '.join(FLOATS)}, integers and bool"
                )
            offset = specs[-1].offset + specs[-1].size if specs else 0
            specs.append(ArraySpec(key, value.shape, dtype, offset))
        if not self.directions or self.num_directions == 0:
            kinds = ", ".join(sorted({str(spec.dtype) for spec in self.buffers})) or "nothing"
            raise ValueError(
                f"the model holds no floating-point array to train, but {kinds}; allowed: "
                "parameters (tree models, as of XGBoost, have none that could be averaged)"
            )
        wide = any(spec.dtype == np.float64 for spec in self.directions)
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self.values = self._flatten(values, self.directions, self.dtype, self.folder)
        self.buffer_values = self._flatten(values, self.buffers, BUFFER_DTYPE, None)

    @property
    def num_directions(self) -> int:
        """Length d of an update."""
        last = self.directions[-1]
        return last.offset + last.size

    @property
    def is_half(self) -> bool:
        """Whether all directions are float16."""
        return all(spec.dtype == np.float16 for spec in self.directions)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the trained arrays, in the order in which an update holds them."""
        return tuple(spec.shape for spec in self.directions)

    @property
    def num_buffers(self) -> int:
        """Number of values that are combined as they are."""
        return self.buffers[-1].offset + self.buffers[-1].size if self.buffers else 0

    def to_arrays(
        self, directions: NDArray[np.floating], buffers: NDArray[np.floating]
    ) -> ArrayRecord:
        """Build the ArrayRecord of a model from its flat values, in the order and dtypes sent."""
        arrays: dict[str, Any] = {}
        room = None
        if self.folder is not None:
            specs_of = {spec.key: spec for spec in (*self.directions, *self.buffers)}
            ordered_specs = (specs_of[key] for key in self.keys)
            room = Room(((s.key, s.shape, s.dtype) for s in ordered_specs), self.folder)
        for specs, values in ((self.directions, directions), (self.buffers, buffers)):
            for spec in specs:
                value = values[spec.offset : spec.offset + spec.size].reshape(spec.shape)
                if spec.dtype.kind in "iu":
                    limits = np.iinfo(spec.dtype.name)
                    value = np.clip(np.rint(value), limits.min, limits.max)
                elif spec.dtype.kind == "b":
                    value = np.rint(value)
                with np.errstate(over="ignore", invalid="ignore"):
                    if room is not None:
                        room[spec.key][...] = value
                        continue
                    # Not np.ascontiguousarray: it turns a 0-d array into one of shape (1,).
                    made = np.array(value, dtype=spec.dtype, order="C")
                arrays[spec.key] = made if self.held else Array(made)
        if room is not None:
            return room.record()
        ordered = {key: arrays[key] for key in self.keys}
        return hold(ordered) if self.held else ArrayRecord(ordered)

    def holds(self, directions: NDArray[np.floating]) -> bool:
        """Whether all values are finite, also in the dtypes of the arrays they go to."""
        if not all_finite(directions):
            return False
        with np.errstate(over="ignore"):
            return all(
                all_finite(directions[spec.offset : spec.offset + spec.size], spec.dtype)
                for spec in self.directions
                if spec.dtype.itemsize < directions.dtype.itemsize
            )

    @staticmethod
    def _flatten(
        values: dict[str, NDArray[np.generic]],
        specs: list[ArraySpec],
        dtype: np.dtype[np.generic],
        folder: Path | None,
    ) -> NDArray[np.floating]:
        size = sum(spec.size for spec in specs)
        if folder is None:
            flat = np.empty(size, dtype=dtype)
        else:
            flat = mapped((size,), getattr(torch, dtype.name), folder).numpy()
        for spec in specs:
            part = flat[spec.offset : spec.offset + spec.size]
            part.reshape(spec.shape)[...] = values[spec.key]
        return flat


def all_finite(values: NDArray[np.floating], dtype: np.dtype[np.generic] | None = None) -> bool:
    """Whether values (size,) are finite throughout, in ``dtype`` if one is given; in pieces."""
    pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
    return all(
        np.isfinite(piece if dtype is None else piece.astype(dtype)).all() for piece in pieces
    )
