"""What stands in front of the values in an .npy array, the form of Flower's arrays."""

import warnings
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

NPY = "numpy.ndarray"
"""What Flower calls this form: the ``stype`` of an ``Array``."""

_VERSION_1 = b"\x01\x00"
_MOST_BYTES = 4096
"""Of the text in a header, which takes NumPy about a hundred."""


class Header(NamedTuple):
    """What a header says.

    Attributes
    ----------
    shape : tuple of int
        Of the array.
    fortran_order : bool
        Whether its first index is the fastest.
    dtype : numpy.dtype
        Of its values; one of objects has not been refused yet.
    start : int
        Bytes in front of the values.
    """

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int


def read_header(data: bytes) -> Header:
    """Read the header of an .npy array of version 1 or 2, which may be anybody's bytes.

    Literals are evaluated, nothing is unpickled. Whatever is wrong with it raises an exception of
    NumPy's or Python's choice.
    """
    most = _MOST_BYTES + 12
    if data[6:8] != _VERSION_1:
        return _parse(data[:most])
    # All clients write the same ones, and parsing one takes longer than a small array's values.
    return _parse_once(data[: min(10 + int.from_bytes(data[8:10], "little"), most)])


def _parse(data: bytes) -> Header:
    stream = BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(stream, max_header_size=_MOST_BYTES)
    return Header(tuple(shape), bool(fortran_order), dtype, stream.tell())


_parse_once = lru_cache(maxsize=512)(_parse)


@lru_cache(maxsize=512)
def header_bytes(
    dtype: np.dtype[Any], shape: tuple[int, ...], fortran_order: bool = False
) -> bytes:
    """Return what NumPy writes in front of the values of such an array."""
    stream = BytesIO()
    nothing = np.broadcast_to(np.zeros((), dtype), shape)
    head = np.lib.format.header_data_from_array_1_0(nothing) | {"fortran_order": fortran_order}
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue()


@lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return what an ``Array`` calls a dtype, which takes NumPy longer than a dictionary."""
    return str(dtype)
