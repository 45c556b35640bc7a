"""Arrays of a model in a file: what a server sends, keeps and writes without a copy in memory.

A model that is a large part of the memory is there once as a record of bytes, which Flower sends
from, and what Flower makes of a reply takes two models more. Here the record's bytes are in a file
without a name (:mod:`fl_bgmd.mapped`), whose pages the system takes back when it needs them. To
everyone else such an array is Flower's own.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fl_bgmd.flower import chunks_of, put
from fl_bgmd.held import HeldArray, values_of
from fl_bgmd.mapped import mapped
from fl_bgmd.npy import header_bytes

_ALIGNED = 64  # NumPy's own headers are as long as a multiple of it


class FiledArray(HeldArray):
    """A held array whose bytes, NumPy's header and the values behind it, are in a file.

    Parameters
    ----------
    encoded : ndarray
        uint8: the bytes, a view of the file.
    values : ndarray
        Those in ``encoded``. Nobody changes them any more.
    folder : Path
        Where the file is.
    """

    folder: Path

    __qualname__ = Array.__qualname__  # how Flower says on the wire what something is

    def __init__(self, encoded: NDArray[np.uint8], values: NDArray[Any], folder: Path) -> None:
        super().__init__(values)
        self.__dict__.update(_encoded=encoded, folder=folder)

    @property
    def encoded(self) -> memoryview | bytes:
        """The bytes of :attr:`data`, in the file."""
        return memoryview(self.__dict__["_encoded"]) if self.is_held else self.data

    @property
    def data(self) -> bytes:
        """The bytes that Flower's own class would hold: a copy, which is not kept."""
        if not self.is_held:
            return super().data
        return bytes(self.__dict__["_encoded"])

    @data.setter
    def data(self, data: bytes) -> None:
        self.__dict__["_bytes"] = data

    def slice_array(self) -> list[tuple[str, Any]]:
        """Return the chunks that Flower sends, as views of the file, with their ids."""
        if not self.is_held:
            return super().slice_array()
        if "_chunks" not in self.__dict__:
            self.__dict__["_chunks"] = chunks_of(memoryview(self.__dict__["_encoded"]))
        found: list[tuple[str, Any]] = self.__dict__["_chunks"]
        return found


def filed(arrays: Mapping[str, Array], folder: Path) -> ArrayRecord:
    """Return one's own record as one in a file in ``folder``; one that is there already stays.

    Raises :class:`~fl_bgmd.mapped.NoRoomError`.
    """
    if isinstance(arrays, ArrayRecord) and folder_of(arrays) is not None:
        return arrays
    values = {key: values_of(array) for key, array in arrays.items()}
    room = Room(((key, value.shape, value.dtype) for key, value in values.items()), folder)
    for key, value in values.items():
        room[key][...] = value
    return room.record()


def folder_of(arrays: Mapping[str, Array]) -> Path | None:
    """Return where the file of a record is, None for one that is not in a file as a whole."""
    folders = {
        a.folder if isinstance(a, FiledArray) and a.is_held else None for a in arrays.values()
    }
    return folders.pop() if len(folders) == 1 else None


def encoded(array: Array) -> memoryview | bytes:
    """Return the bytes of one's own array, without a copy where they are in a file."""
    return array.encoded if isinstance(array, FiledArray) else array.data


class Room:
    """A file for the arrays of a record, to be written to once.

    Parameters
    ----------
    specs : iterable of (key, shape, dtype)
        What is to go there.
    folder : Path
        Where.

    Raises
    ------
    NoRoomError
        See :func:`fl_bgmd.mapped.mapped`.
    """

    def __init__(
        self, specs: Iterable[tuple[str, tuple[int, ...], np.dtype[Any]]], folder: Path
    ) -> None:
        heads: dict[str, tuple[int, bytes, tuple[int, ...], np.dtype[Any]]] = {}
        end = 0
        for key, shape, dtype in specs:
            head = header_bytes(dtype, shape)
            heads[key] = end, head, shape, dtype
            end += len(head) + math.prod(shape) * dtype.itemsize
            end += -end % _ALIGNED
        pages = mapped((end,), torch.uint8, folder).numpy()
        self._folder = folder
        self._encoded: dict[str, NDArray[np.uint8]] = {}
        self._values: dict[str, NDArray[Any]] = {}
        for key, (start, head, shape, dtype) in heads.items():
            first = start + len(head)
            stop = first + math.prod(shape) * dtype.itemsize
            pages[start:first] = np.frombuffer(head, np.uint8)
            self._encoded[key] = pages[start:stop]
            self._values[key] = pages[first:stop].view(dtype).reshape(shape)

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Return where the values of an array go."""
        return self._values[key]

    def record(self) -> ArrayRecord:
        """Return what was written. Nobody changes it any more."""
        record = ArrayRecord()
        for key, values in self._values.items():
            put(record, key, FiledArray(self._encoded[key], values, self._folder))
        return record
