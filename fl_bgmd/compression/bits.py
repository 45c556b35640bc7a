"""Packing numbers into bytes: float32, bit planes, and sorted indices after Elias-Fano.

All lengths follow from the counts alone, so a receiver knows how many bytes to expect before it
touches them.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

FLOAT = np.dtype("<f4")
LARGEST = float(np.finfo(np.float32).max)


def check_length(data: bytes, expected: int, name: str) -> None:
    """Raise ``ValueError`` for a message of another length than expected."""
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes of {name}; expected {expected}")


def pack_floats(vector: Tensor) -> bytes:
    """Return the values as little-endian float32, those beyond its range at its ends."""
    values = vector.detach().to(torch.float32).clamp(-LARGEST, LARGEST).numpy()
    return bytes(values.astype(FLOAT))


def unpack_floats(data: bytes, count: int) -> NDArray[np.float32]:
    """Return a view of ``count`` finite values; raises ``ValueError`` for others."""
    values = np.frombuffer(data, FLOAT, count=count)
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite")
    return values


def planes_size(count: int, bits: int) -> int:
    """Return the number of bytes of :func:`pack_planes`."""
    return bits * ((count + 7) // 8)


def pack_planes(values: NDArray[np.unsignedinteger], bits: int) -> Bytes:
    """Pack values below ``2^bits`` plane by plane: all lowest bits, then all second ones, ..."""
    planes = [np.packbits((values >> np.uint8(j)) & np.uint8(1) != 0) for j in range(bits)]
    return np.concatenate(planes) if planes else np.zeros(0, np.uint8)


def unpack_planes(data: Bytes, count: int, bits: int) -> NDArray[np.uint32]:
    """Undo :func:`pack_planes`; ``data`` has :func:`planes_size` bytes."""
    values = np.zeros(count, np.uint32)
    size = (count + 7) // 8
    for j in range(bits):
        plane = np.unpackbits(data[j * size : (j + 1) * size], count=count)
        values |= plane.astype(np.uint32) << np.uint32(j)
    return values


def indices_size(count: int, size: int) -> int:
    """Return the number of bytes of :func:`pack_indices`.

    About ``log2(size / count) + 2`` bits for each index; no code needs fewer than
    ``log2(size / count) + 1.44`` on average.
    """
    low = _low_bits(count, size)
    return planes_size(count, low) + (count + (size >> low) + 1 + 7) // 8


def pack_indices(indices: NDArray[np.int64], size: int) -> Bytes:
    """Pack ascending, distinct indices below ``size``: Elias-Fano (Elias 1974; Fano 1971).

    The low bits as they are, the high bits as a bitmap with one 1 for each index.
    """
    low = _low_bits(len(indices), size)
    high = np.zeros(len(indices) + (size >> low) + 1, dtype=bool)
    high[(indices >> low) + np.arange(len(indices))] = True
    lows = (indices & ((1 << low) - 1)).astype(np.uint32)
    return np.concatenate((pack_planes(lows, low), np.packbits(high)))


def unpack_indices(data: Bytes, count: int, size: int) -> NDArray[np.int64]:
    """Undo :func:`pack_indices`.

    Raises ``ValueError`` for bytes that are not ``count`` ascending, distinct indices below
    ``size``.
    """
    if len(data) != indices_size(count, size):
        raise ValueError(
            f"{len(data)} bytes of indices; expected {indices_size(count, size)} for {count} of "
            f"{size}"
        )
    low = _low_bits(count, size)
    split = planes_size(count, low)
    bitmap = np.unpackbits(data[split:], count=count + (size >> low) + 1)
    ones = np.flatnonzero(bitmap)
    if len(ones) != count:
        raise ValueError(f"{len(ones)} indices are marked; expected {count}")
    indices: NDArray[np.int64] = ((ones - np.arange(count)) << low) | unpack_planes(
        data[:split], count, low
    )
    if count and (indices[-1] >= size or (np.diff(indices) <= 0).any()):
        raise ValueError(f"the indices are not ascending, distinct and below {size}")
    return indices


def _low_bits(count: int, size: int) -> int:
    return max(0, int(math.log2(size / count))) if count else 0
