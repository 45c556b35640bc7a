"""The model that is evaluated and kept: an average over the last rounds, if that is wanted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fl_bgmd.layout import ModelLayout


def newest_weight(share: float, number: int) -> float:
    """Return the weight of round ``number``'s model, ``1 / (share number)`` and at most 1."""
    return 1 / max(share * number, 1.0)


class ModelAverage:
    """A running average over about the last share of the rounds.

    In each round the average moves by :func:`newest_weight` of the way to the new model:
    polynomial-decay averaging (Shamir and Zhang, ICML 2013, Section 4) with ``share`` for
    ``1 / (eta + 1)``, without its lag in the first rounds. Clients train the last model as ever, so
    that the average is in nobody's way.

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
        weight = newest_weight(self.share, number)
        if weight == 1.0 or self._values is None:
            self._values, self._buffers = layout.values, buffers
            return arrays
        for own, new in ((self._values, layout.values), (self._buffers, buffers)):
            # In place: a model in a file is not taken into memory.
            torch.from_numpy(own).mul_(1 - weight).add_(torch.from_numpy(new), alpha=weight)
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
