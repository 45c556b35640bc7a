"""Arrays that are still values: what the in-process grid hands on in place of Flower's bytes.

Server and clients of one process need not write a model as bytes for each other. The grid that
knows so (:class:`fl_bgmd.simulations.grid.InProcessGrid`) sends :class:`HeldArray`; a client app
answers in the form in which it was asked (:func:`answer`). Nothing that was on a wire, or that
somebody else pickled, is one: both make a plain :class:`flwr.app.Array` of it.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.flower import put
from fl_bgmd.npy import NPY, dtype_name, header_bytes, read_header

_FIELDS = ("dtype", "shape", "stype", "data")


class HeldArray(Array):
    """An ``Array`` that encodes its values when somebody asks for :attr:`data`, and not before.

    Parameters
    ----------
    values : ndarray
        Whoever hands them over changes them no more.
    data : bytes, optional
        The values as bytes, where they have been that before.
    """

    def __init__(self, values: NDArray[Any], data: bytes | None = None) -> None:
        # Not through the constructor, which encodes, nor through __setattr__, which gives up.
        self.__dict__.update(
            dtype=dtype_name(values.dtype), shape=values.shape, stype=NPY, _held=values, _bytes=data
        )

    @classmethod
    def of(cls, array: Array) -> "HeldArray":
        """Return one's own array, decoded if it is bytes."""
        return array if isinstance(array, cls) else cls(array.numpy(), array.data)

    @property
    def values(self) -> NDArray[Any] | None:
        """The values, read-only; None once somebody has changed an attribute of the array."""
        held: NDArray[Any] | None = self.__dict__["_held"]
        if held is not None:
            held = held.view()
            held.flags.writeable = False
        return held

    @property
    def is_held(self) -> bool:
        """Whether it is still values: nobody has changed an attribute of it."""
        return self.__dict__["_held"] is not None

    @property
    def data(self) -> bytes:
        """The bytes that Flower's own class would hold."""
        if self.__dict__["_bytes"] is None:
            self.__dict__["_bytes"] = Array(self.__dict__["_held"]).data
        found: bytes = self.__dict__["_bytes"]
        return found

    @data.setter
    def data(self, data: bytes) -> None:
        self.__dict__["_bytes"] = data

    @property
    def num_bytes(self) -> int:
        """Length of :attr:`data`, which it does not take to know."""
        held = self.__dict__["_held"]
        if held is None or self.__dict__["_bytes"] is not None:
            return len(self.data)
        return len(header_bytes(held.dtype, held.shape, held.flags.fnc)) + int(held.nbytes)

    def tensor(self) -> Tensor:
        """Return the values as a tensor that shares their memory: it must not be written to."""
        held = self.__dict__["_held"]
        return torch.from_numpy(self.numpy() if held is None else held)

    def numpy(self) -> NDArray[Any]:
        """Return a copy of the values, the caller's own."""
        held: NDArray[Any] | None = self.__dict__["_held"]
        return super().numpy() if held is None else held.copy(order="K")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the array is one of bytes from then on."""
        if name in _FIELDS:
            self.__dict__["_bytes"] = None if name == "data" else self.data
            self.__dict__["_held"] = None
        super().__setattr__(name, value)

    def __copy__(self) -> Self:
        """Return an array of the same values; what is set on one is not set on the other."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Become a plain Array on the way to another process."""
        return Array, tuple(getattr(self, name) for name in _FIELDS)

    def __eq__(self, other: object) -> bool:
        """Whether the other is an array of the same dtype, shape and bytes."""
        return isinstance(other, Array) and all(
            getattr(self, name) == getattr(other, name) for name in _FIELDS
        )

    __hash__ = None  # type: ignore[assignment]


def hold(values: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return a record of held arrays. The values are no longer the caller's."""
    record = ArrayRecord()
    for key, value in values.items():
        put(record, key, HeldArray(value))
    return record


def held(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return one's own record as one of held arrays."""
    record = ArrayRecord()
    for key, array in arrays.items():
        put(record, key, HeldArray.of(array))
    return record


def is_held(arrays: Mapping[str, Array]) -> bool:
    """Whether all arrays are held ones."""
    return all(isinstance(array, HeldArray) for array in arrays.values())


def answer(asked: ArrayRecord, state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a ``state_dict`` in the form in which the model came: held, or bytes.

    The tensors are no longer the caller's.
    """
    if not is_held(asked):
        return ArrayRecord(dict(state))
    return hold({key: value.detach().cpu().numpy() for key, value in state.items()})


def values_of(array: Array) -> NDArray[Any]:
    """Return the values of one's own array, which may be read-only: nothing is copied."""
    held = array.values if isinstance(array, HeldArray) else None
    if held is not None:
        return held
    if array.stype != NPY:
        return array.numpy()
    shape, fortran_order, dtype, start = read_header(array.data)
    if dtype.hasobject or math.prod(shape) == 0:
        return array.numpy()
    values = np.frombuffer(array.data, dtype, math.prod(shape), start)
    return values.reshape(shape, order="F" if fortran_order else "C")


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the ``state_dict`` in a record of one's own; nothing may be written to it."""
    return {
        key: array.tensor() if isinstance(array, HeldArray) else torch.from_numpy(array.numpy())
        for key, array in arrays.items()
    }


def num_bytes(array: Array) -> int:
    """Return how many bytes an array takes on a wire."""
    return array.num_bytes if isinstance(array, HeldArray) else len(array.data)
