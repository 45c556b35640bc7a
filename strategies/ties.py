"""Tied weights: a tensor that a model lists under two keys is one, and stays equal under both.

An ArrayRecord does not say which of its arrays share storage, and arrays that go out equal need
not: layers made by copying start equal, biases start at zero. The replies tell. Clients whose
arrays are one train them alike, to the bit; clients whose arrays are not do not. So two arrays are
tied where they go out equal and more than half of the accepted replies bring them back changed and
equal, and stay so until more than half bring them back different: neither making nor breaking a
tie is in the hands of a minority. A tie counts by its first array; what single clients send under
the other key is not looked at.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.layout import ArraySpec, ModelLayout

LOG = logging.getLogger("flwr.fl_bgmd")

_PROBE = 16
"""Values that tell most arrays apart."""


def equal_arrays(specs: Sequence[ArraySpec], values: NDArray[np.floating]) -> list[list[ArraySpec]]:
    """Return the groups of arrays of one shape, dtype and value; ``values`` (d,) has them all."""
    groups: dict[tuple[object, ...], list[list[ArraySpec]]] = {}
    for spec in specs:
        own = values[part(spec)]
        alike = groups.setdefault((spec.shape, spec.dtype.name, *own[:_PROBE].tolist()), [])
        for group in alike if spec.size else ():
            if np.array_equal(values[part(group[0])], own):
                group.append(spec)
                break
        else:
            alike.append([spec])
    return [group for alike in groups.values() for group in alike if len(group) > 1]


def find_ties(
    specs: Sequence[ArraySpec],
    values: NDArray[np.floating],
    replies: NDArray[np.floating],
    known: Mapping[str, str],
) -> dict[str, str]:
    """Return which arrays are one, by the replies of a round.

    Parameters
    ----------
    specs : sequence of ArraySpec
        The arrays, in their order in the model.
    values : ndarray
        (d,): what went out.
    replies : ndarray
        (n, d): what came back, or how far it is from what went out.
    known : dict of str to str
        The result of the round before.

    Returns
    -------
    dict of str to str
        For each key that is a copy the first key of its tensor.
    """
    found: dict[str, str] = {}
    n = len(replies)
    for group in equal_arrays(specs, values):
        firsts: list[ArraySpec] = []
        for spec in group:
            for first in firsts:
                alike, apart = _votes(replies[:, part(first)], replies[:, part(spec)])
                was = known.get(spec.key) == first.key
                if 2 * apart <= n if was else 2 * alike > n:
                    found[spec.key] = first.key
                    break
            else:
                firsts.append(spec)
    return found


def count_once(
    layout: ModelLayout, rows: Tensor, known: Mapping[str, str]
) -> tuple[Tensor, dict[str, str]]:
    """Return the rows of a round with each tensor once, in place, and which arrays are one.

    ``rows`` are (n, d) updates of the model of ``layout``, ``known`` is what was found before.
    """
    ties = find_ties(layout.directions, layout.values, rows.numpy(), known)
    for key in ties.keys() - known.keys():
        LOG.info("arrays %r and %r are one tensor (tied): counted once", ties[key], key)
    for key in known.keys() - ties.keys():
        LOG.warning("arrays %r and %r are no longer tied", known[key], key)
    return Tied(layout.directions, ties).merge(rows) if ties else rows, ties


class Tied:
    """Between an update with each tensor once, (c,), and one with all keys, (d,).

    Parameters
    ----------
    specs : sequence of ArraySpec
        The arrays of an update.
    ties : dict of str to str
        Of :func:`find_ties`.
    """

    def __init__(self, specs: Sequence[ArraySpec], ties: Mapping[str, str]) -> None:
        parts = {spec.key: part(spec) for spec in specs}
        self._width = max(piece.stop for piece in parts.values())
        self._copies = [(parts[key], parts[first]) for key, first in ties.items()]
        self._kept: list[slice] = []
        for key, piece in parts.items():
            if key in ties:
                continue
            if self._kept and self._kept[-1].stop == piece.start:
                piece = slice(self._kept.pop().start, piece.stop)
            self._kept.append(piece)

    def merge(self, rows: Tensor) -> Tensor:
        """Drop the copies' columns from (n, d) rows in memory, in place; return them as (n, c)."""
        flat, end = rows.numpy().reshape(-1), 0
        for start in range(0, flat.size, self._width):
            for piece in self._kept:
                size = piece.stop - piece.start
                # Never ahead of what is still to be read; NumPy minds the overlap.
                flat[end : end + size] = flat[start + piece.start : start + piece.stop]
                end += size
        return rows.view(-1)[:end].view(len(rows), -1)

    def spread(self, update: Tensor) -> Tensor:
        """Return an update (c,) as (d,), a copy's values those of its tensor."""
        full, end = torch.empty(self._width, dtype=update.dtype, device=update.device), 0
        for piece in self._kept:
            size = piece.stop - piece.start
            full[piece] = update[end : end + size]
            end += size
        for copy, first in self._copies:
            full[copy] = full[first]
        return full

    def level(self, values: NDArray[np.floating]) -> None:
        """Write each tensor's values (d,) over those of its copies."""
        for copy, first in self._copies:
            values[copy] = values[first]


def part(spec: ArraySpec) -> slice:
    """Return where an array lies in a flat row."""
    return slice(spec.offset, spec.offset + spec.size)


def _votes(first: NDArray[np.floating], other: NDArray[np.floating]) -> tuple[int, int]:
    """Return in how many rows (n, size) two arrays are equal and not zero, and in how many not."""
    same = (first[:, :_PROBE] == other[:, :_PROBE]).all(axis=1)
    alike, apart = 0, int(len(same) - same.sum())
    for row in np.flatnonzero(same):
        if not np.array_equal(first[row], other[row]):
            apart += 1
        elif first[row].any():
            alike += 1
    return alike, apart
