"""The model that is evaluated and kept: an average over the last rounds, if that is wanted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fl_bgmd.layout import ModelLayout

_PIECE = 2**20
"""Values that are averaged together: a model in a file is not taken into memory."""


class ModelAverage:
    """A running average over about the last share of the rounds.

    In round t the average moves by ``1 / (share t)`` of the way to the new model, all of it while
    that is 1 or more: polynomial-decay averaging (Shamir and Zhang, ICML 2013, Section 4) with
    ``share`` for ``1 / (eta + 1)``, without its lag in the first rounds. Clients train the last
    model as ever, so that the average is in nobody's way.

    Parameters
    ----------
    share : float
        0 to 1: 0 is the last model, 1 the mean of all.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._values: NDArray[Any] | None = None
        self._buffers: NDArray[np.float64] = np.empty(0)

    def after(self, number: int, arrays: ArrayRecord) -> ArrayRecord:
        """Return the average after round ``number``, from 1 up, which came to ``arrays``."""
        if not self.share:
            return arrays
        layout = ModelLayout(arrays)
        buffers = layout.buffer_values.astype(np.float64)
        if self._values is None:
            self._values, self._buffers = layout.values, buffers
            return arrays
        weight = 1 / max(self.share * number, 1.0)
        _move(self._values, layout.values, weight)
        _move(self._buffers, buffers, weight)
        return layout.to_arrays(self._values, self._buffers)

    def now(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the average as a record like ``arrays``, the last model."""
        if self._values is None:
            return arrays
        return ModelLayout(arrays).to_arrays(self._values, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next average depends on."""
        if self._values is None:
            return {}
        own = {"values": self._values, "buffers": self._buffers}
        return {name: torch.from_numpy(values) for name, values in own.items()}

    def load_state_dict(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Continue from what :meth:`state_dict` returned when ``arrays`` was the last model."""
        if state:
            self._values = ModelLayout(arrays).values  # in a file where the model is in one
            self._values[...] = state["values"].numpy()
            self._buffers = state["buffers"].numpy().copy()


def _move(average: NDArray[Any], values: NDArray[Any], weight: float) -> None:
    """Move an average (size,) towards values (size,), in place."""
    for start in range(0, len(average), _PIECE):
        piece = slice(start, start + _PIECE)
        average[piece] *= 1 - weight
        average[piece] += weight * values[piece]
