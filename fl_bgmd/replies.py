"""The trust boundary: what a client sends is hostile until it was looked at here.

:class:`~fl_bgmd.layout.ModelLayout` says what was sent out; :func:`screen` looks at one reply
alone, decodes it without unpickling and without allocating more than the model allows, and writes
its update into a row of the update matrix. It never raises for anything a client can send.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise, takewhile
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from numpy.typing import NDArray

from fl_bgmd.compression import Compressor
from fl_bgmd.filed import encoded
from fl_bgmd.held import HeldArray
from fl_bgmd.layout import FLOATS, ArraySpec, ModelLayout
from fl_bgmd.npy import NPY, Header, dtype_name, read_header
from fl_bgmd.wire import EXAMPLES, PACKED_KEY, PACKED_RECORD, PARTITION, packed_keys

_PIECE = 2**16
"""Values that are looked at while they are in the cache."""

MetricValue = int | float | list[int] | list[float]

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

MAX_METRIC_VALUES = 10_000
"""Values of metrics in a reply, those in lists counted one by one."""

_MAX_CONFIG_BYTES = 2**20
_MAX_DETAIL = 300
_MAX_REASON = 2**16
_MAX_KEY = 80
_WRAPPED = re.compile(r"<class '([^'\n]{1,200})'>:<'")
_COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RAISED = re.compile(r"[A-Za-z_][\w.]*(:|$)")


class Rejection(StrEnum):
    """Why a reply was not used; one reason each, the first that applies."""

    ERROR = "error"
    """The client, its process or its node failed: the reply carries an error."""
    UNASKED = "unasked"
    """It does not answer a message of this round to the node it comes from."""
    DUPLICATE = "duplicate"
    """The node has replied already in this round."""
    ARRAY_RECORDS = "array-records"
    """Not exactly one ArrayRecord."""
    KEYS = "keys"
    """The array keys differ from those sent."""
    SHAPE = "shape"
    """An array has another shape than the one sent."""
    DTYPE = "dtype"
    """An array has a dtype that does not convert safely to the one sent."""
    ENCODING = "encoding"
    """The bytes are not a plain .npy array of the declared shape and dtype."""
    NON_FINITE = "non-finite"
    """An array, or its difference to the one sent, holds a NaN or an infinity."""
    PACKED = "packed"
    """A packed update is not what the compressor that was asked for writes."""
    METRIC_RECORDS = "metric-records"
    """Not exactly one MetricRecord."""
    METRICS = "metrics"
    """There are too many values of metrics."""
    NUM_EXAMPLES = "num-examples"
    """The number of examples is needed and is missing or not a finite number of 0 or more."""
    SIZE = "size"
    """Its ConfigRecords hold more than a mebibyte: no part of the protocol."""


class InvalidReplyError(Exception):
    """Raised inside this module while a reply is screened; ends up as a :class:`Rejection`."""

    def __init__(self, reason: Rejection, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Screened:
    """What :func:`screen` found.

    Attributes
    ----------
    reason : Rejection or None
        None when the reply was accepted.
    detail : str
        The reason in words, for the log; of an accepted reply, which metric was dropped first.
    num_examples : float
        As reported, 1 where it was missing or not a finite number of 0 or more.
    metrics : dict
        The other metrics of an accepted reply, those that are finite.
    dropped : int
        How many were not.
    norm : float or None
        The norm of its uncompressed update, where a packed reply reports it.
    """

    reason: Rejection | None
    detail: str = ""
    num_examples: float = 1.0
    metrics: dict[str, MetricValue] = field(default_factory=dict)
    dropped: int = 0
    norm: float | None = None


def screen(
    reply: Message,
    layout: ModelLayout | None,
    row: NDArray[np.floating] | None = None,
    buffers: NDArray[np.floating] | None = None,
    *,
    examples_key: str = EXAMPLES,
    needs_examples: bool = False,
    seen_nodes: set[int] | None = None,
    asked: Mapping[str, int] | None = None,
    compressor: Compressor | None = None,
    coordinates: NDArray[np.int64] | None = None,
) -> Screened:
    """Accept or reject one reply; write an accepted one's update into ``row``.

    Parameters
    ----------
    reply : Message
        Anything a client sent.
    layout : ModelLayout or None
        The model that was sent out; None for a reply without arrays (evaluation).
    row : ndarray, optional
        (d,) of ``layout.dtype``, or float16: receives ``sent - received``, the update, rounded to
        its dtype. Holds nothing of use when the reply is rejected.
    buffers : ndarray, optional
        (number of buffer values,) of :data:`~fl_bgmd.layout.BUFFER_DTYPE`: receives the reply's
        buffers.
    examples_key : str
        The metric with the number of examples.
    needs_examples : bool
        Whether a reply without that metric, or with one that is not a finite number of 0 or more,
        is rejected rather than counted as 1.
    seen_nodes : set of int, optional
        Nodes that have replied already; the reply's node is added.
    asked : dict of str to int, optional
        The node that each message of this round went to, by message id.
    compressor : Compressor, optional
        What clients were asked to pack their updates with; plain arrays are accepted as well.
    coordinates : ndarray, optional
        (k,): the coordinates of the update that ``row``, (k,), receives, where the server chose
        them for all.

    Returns
    -------
    Screened
        Never raises for what a client can send.
    """
    norm: float | None = None
    try:
        if reply.has_error():
            raise InvalidReplyError(Rejection.ERROR, _error_line(reply.error.reason or ""))
        node = reply.metadata.src_node_id
        if asked is not None and asked.get(reply.metadata.reply_to_message_id) != node:
            raise InvalidReplyError(Rejection.UNASKED, f"node {node} was not asked this")
        if seen_nodes is not None:
            if node in seen_nodes:
                raise InvalidReplyError(Rejection.DUPLICATE, f"node {node} has replied already")
            seen_nodes.add(node)
        _check_size(reply)
        num_examples, metrics, dropped = _read_metrics(reply, examples_key, needs_examples)
        if layout is not None:
            assert row is not None
            assert buffers is not None
            if coordinates is None:
                norm = _read_arrays(reply, layout, row, buffers, compressor)
            else:
                update = np.empty(layout.num_directions, layout.dtype)
                norm = _read_arrays(reply, layout, update, buffers, compressor)
                row[:] = update[coordinates]
                [arrays] = records_of(reply, ArrayRecord)
                if compressor is not None and PACKED_KEY not in arrays:
                    _scale(row, compressor.scale(len(update)))
    except InvalidReplyError as invalid:
        return Screened(invalid.reason, _one_line(str(invalid)))
    except Exception as unforeseen:  # a client must not be able to end the run
        return Screened(Rejection.ENCODING, _one_line(f"{type(unforeseen).__name__}: {unforeseen}"))
    detail = f"metric {_one_line(dropped[0], _MAX_KEY)!r} is not finite" if dropped else ""
    return Screened(None, detail, num_examples, metrics, len(dropped), norm)


def _one_line(text: str, limit: int = _MAX_DETAIL) -> str:
    """Cut a text short and keep it on one line: clients write into the log through it."""
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def _error_line(reason: str) -> str:
    """Return what went wrong from the reason of an error reply: the exception and its message.

    Flower writes ``<class 'X'>:<'text'>`` where the text may be a traceback with color codes, its
    own exception last. A text without a traceback is shown whole if it fits, else its end.
    """
    wrapped = _WRAPPED.match(reason)
    text = _COLORS.sub("", reason[wrapped.end() if wrapped else 0 :][-_MAX_REASON:])
    text = text.rstrip().removesuffix("'>").rstrip() if wrapped else text.strip()
    lines = text.splitlines()
    raised = [
        number
        for number, (before, line) in enumerate(pairwise(lines), start=1)
        if before[:1].isspace() and _RAISED.match(line) and "ClientAppException" not in line
    ]
    if raised:
        return "\n".join(takewhile(str.strip, lines[raised[-1] :]))
    if wrapped:
        text = f"{wrapped[1]}: {text}"
    return text if len(text) <= _MAX_DETAIL else "..." + text[3 - _MAX_DETAIL :]


def records_of(reply: Message, kind: type[Record]) -> list[Record]:
    """Return the records of one kind: Flower's own properties check every one of them again."""
    return [record for record in reply.content.values() if isinstance(record, kind)]


def partition_id(reply: Message) -> int | None:
    """Return the ``partition-id`` that a reply claims in its metrics, if it is one.

    Used to bring replies into a reproducible order, never for trust.
    """
    if not reply.has_content():
        return None
    for record in records_of(reply, MetricRecord):
        value = record.get(PARTITION)
        if isinstance(value, int) and 0 <= value < 2**31:
            return value
    return None


def arrays_to_state(arrays: ArrayRecord) -> dict[str, Any]:
    """Return arrays as plain values and bytes, for a checkpoint."""
    return {key: [a.dtype, list(a.shape), a.stype, encoded(a)] for key, a in arrays.items()}


def arrays_from_state(state: Mapping[str, Any]) -> ArrayRecord:
    """Undo :func:`arrays_to_state`."""
    return ArrayRecord(
        {
            key: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
            for key, (dtype, shape, stype, data) in state.items()
        }
    )


def median_metrics(metrics: Iterable[dict[str, MetricValue]]) -> MetricRecord:
    """Combine clients' metrics so that no minority can bend them.

    A key that more than half of the clients report, with one shape, becomes the (element-wise)
    median of their values; others are left out.
    """
    collected = list(metrics)
    values: dict[tuple[str, int], list[MetricValue]] = {}
    for client in collected:
        for key, value in client.items():
            length = len(value) if isinstance(value, list) else -1
            values.setdefault((key, length), []).append(value)
    result: dict[str, MetricValue] = {}
    for (key, length), reported in values.items():
        if 2 * len(reported) > len(collected):
            ordered = np.sort(np.asarray(reported, dtype=np.float64), axis=0)
            low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
            # The mean of the two must neither overflow nor lose the smallest of numbers.
            middle = np.where(low == high, low, low / 2 + high / 2)
            result[key] = float(middle) if length < 0 else [float(value) for value in middle]
    return MetricRecord(result)


def _check_size(reply: Message) -> None:
    """Raise for more configuration than any client has to send."""
    size = sum(
        len(key) + _size_of(value)
        for record in records_of(reply, ConfigRecord)
        for key, value in record.items()
    )
    if size > _MAX_CONFIG_BYTES:
        raise InvalidReplyError(
            Rejection.SIZE, f"{size} bytes of configuration; allowed: {_MAX_CONFIG_BYTES}"
        )


def _size_of(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_size_of, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _read_metrics(
    reply: Message, examples_key: str, needs_examples: bool
) -> tuple[float, dict[str, MetricValue], list[str]]:
    """Return the number of examples, the metrics, and the names of those that are not finite."""
    records = records_of(reply, MetricRecord)
    if len(records) != 1:
        raise InvalidReplyError(
            Rejection.METRIC_RECORDS, f"{len(records)} metric records; allowed: 1"
        )
    record = dict(records[0])
    examples = record.pop(examples_key, None)
    is_count = (
        not isinstance(examples, list) and _is_finite(examples) and cast(float, examples) >= 0
    )
    if needs_examples and not is_count:
        shown = "missing" if examples is None else repr(examples)[:_MAX_KEY]
        raise InvalidReplyError(
            Rejection.NUM_EXAMPLES,
            f"{examples_key} is {shown}; allowed: a finite number of 0 or more",
        )
    num_examples = float(cast(float, examples)) if is_count else 1.0
    record.pop(PARTITION, None)
    count = sum(len(value) if isinstance(value, list) else 1 for value in record.values())
    count += len(examples) if isinstance(examples, list) else 0
    if count > MAX_METRIC_VALUES:
        raise InvalidReplyError(
            Rejection.METRICS, f"{count} values of metrics; allowed: {MAX_METRIC_VALUES}"
        )
    metrics: dict[str, MetricValue] = {}
    dropped: list[str] = []
    for key, value in record.items():
        if not _is_finite(value):
            dropped.append(key)
        else:
            metrics[key] = [float(v) for v in value] if isinstance(value, list) else float(value)
    return num_examples, metrics, dropped


def _is_finite(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_finite(item) and not isinstance(item, list) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1000


def _read_arrays(
    reply: Message,
    layout: ModelLayout,
    row: NDArray[np.floating],
    buffers: NDArray[np.floating],
    compressor: Compressor | None,
) -> float | None:
    """Write the update into ``row`` and the buffers into ``buffers``; return a reported norm."""
    records = records_of(reply, ArrayRecord)
    if len(records) != 1:
        raise InvalidReplyError(
            Rejection.ARRAY_RECORDS, f"{len(records)} array records; allowed: 1"
        )
    arrays = records[0]
    if compressor is not None and PACKED_KEY in arrays:
        _check_keys(arrays, packed_keys(layout))
        _read_packed(arrays[PACKED_KEY], row, compressor.for_shapes(layout.shapes))
        _read_buffers(arrays, layout, buffers)
        return _read_norm(reply, compressor)
    _check_keys(arrays, layout.keys)
    with np.errstate(all="ignore"):
        for spec in layout.directions:
            part = slice(spec.offset, spec.offset + spec.size)
            received = view_array(arrays[spec.key], spec)
            if not _subtract(layout.values[part], received.reshape(-1), row[part]):
                raise InvalidReplyError(
                    Rejection.NON_FINITE, f"array {spec.key!r} leads to a non-finite update"
                )
    _read_buffers(arrays, layout, buffers)
    return None


def _scale(row: NDArray[np.floating], factor: float) -> None:
    """Scale a plain update's coordinates as packing would have."""
    if factor == 1:
        return
    with np.errstate(over="ignore"):
        row *= factor
    if not np.isfinite(row).all():
        raise InvalidReplyError(Rejection.NON_FINITE, f"the update times {factor:g} is not finite")


def _check_keys(arrays: ArrayRecord, expected: list[str]) -> None:
    if set(arrays.keys()) != set(expected):
        missing = sorted(set(expected) - set(arrays.keys()))[:3]
        extra = sorted(key[:80] for key in set(arrays.keys()) - set(expected))[:3]
        raise InvalidReplyError(Rejection.KEYS, f"missing array keys {missing}, extra {extra}")


def _read_buffers(arrays: ArrayRecord, layout: ModelLayout, buffers: NDArray[np.floating]) -> None:
    with np.errstate(all="ignore"):
        for spec in layout.buffers:
            part = slice(spec.offset, spec.offset + spec.size)
            value = view_array(arrays[spec.key], spec).ravel()
            if not np.isfinite(value.astype(spec.dtype)).all():
                raise InvalidReplyError(
                    Rejection.NON_FINITE, f"array {spec.key!r} is not finite as {spec.dtype}"
                )
            buffers[part] = value


def _read_packed(array: Array, row: NDArray[np.floating], compressor: Compressor) -> None:
    """Decode a packed update into ``row``; its length is known before anything is decoded."""
    expected = compressor.num_bytes(len(row))
    spec = ArraySpec(PACKED_KEY, (expected,), np.dtype(np.uint8), 0)
    data = view_array(array, spec)
    try:
        row[:] = compressor.decode(data.tobytes(), len(row)).numpy()
    except ValueError as error:
        raise InvalidReplyError(Rejection.PACKED, f"{compressor.name}: {error}") from error
    if not np.isfinite(row).all():
        raise InvalidReplyError(Rejection.NON_FINITE, f"array {PACKED_KEY!r} is not finite")


def _read_norm(reply: Message, compressor: Compressor) -> float | None:
    """Return the norm that a packed reply reports, if it does.

    The compressor that it names has to be the server's own: nothing is built from a client's text.
    """
    record = reply.content.config_records.get(PACKED_RECORD, ConfigRecord())
    named = record.get("compressor", compressor.name)
    if named != compressor.name:
        raise InvalidReplyError(
            Rejection.PACKED, f"compressor is {repr(named)[:80]}; allowed: {compressor.name!r}"
        )
    norm = record.get("norm")
    if norm is None:
        return None
    if isinstance(norm, list) or not _is_finite(norm) or float(norm) < 0:
        raise InvalidReplyError(
            Rejection.PACKED, f"norm is {repr(norm)[:80]}; allowed: a finite number of 0 or more"
        )
    return float(norm)


def _subtract(
    sent: NDArray[np.floating], received: NDArray[np.generic], out: NDArray[np.floating]
) -> bool:
    """Write ``sent - received`` into ``out``, all (size,); return whether it is finite throughout.

    In pieces that stay in the cache: looking at them costs no second pass over the memory. A sum
    is finite only if all its terms are; one that overflows is looked at term by term. The sum is
    einsum's, half the time of ``add.reduce``.
    """
    suspicious, wide = False, np.promote_types(out.dtype, np.float32)
    for start in range(0, len(out), _PIECE):
        piece = slice(start, start + _PIECE)
        np.subtract(sent[piece], received[piece], out=out[piece], casting="same_kind")
        suspicious |= not math.isfinite(np.einsum("i->", out[piece], dtype=wide))
    return not suspicious or bool(np.isfinite(out).all())


def view_array(array: Array, spec: ArraySpec) -> NDArray[np.generic]:
    """Return the values of an untrusted ``Array`` as a view of its bytes, nothing copied.

    The .npy header is parsed without unpickling and must agree with ``spec`` and with the number
    of bytes that follow. Held arrays (:mod:`fl_bgmd.held`) never were on a wire and have no header:
    of them the values themselves must agree. Raises :class:`InvalidReplyError` otherwise.
    """
    # An empty dtype declares nothing, neither does its shape: the header below decides.
    if array.dtype and tuple(array.shape) != spec.shape:
        shown = repr(tuple(array.shape))[:80]
        raise InvalidReplyError(
            Rejection.SHAPE, f"array {spec.key!r} declares shape {shown}; sent: {spec.shape}"
        )
    if array.stype != NPY:
        raise InvalidReplyError(
            Rejection.ENCODING, f"array {spec.key!r} is serialized as {array.stype[:80]!r}"
        )
    held = array.values if isinstance(array, HeldArray) else None
    if held is not None:
        _check_values(array, spec, held.shape, held.dtype)
        return held
    shape, fortran_order, dtype, start = _read_header(array.data, spec.key)
    _check_values(array, spec, shape, dtype)
    if len(array.data) - start != spec.size * dtype.itemsize:
        raise InvalidReplyError(
            Rejection.ENCODING,
            f"array {spec.key!r} has {len(array.data) - start} bytes of values; "
            f"expected {spec.size * dtype.itemsize}",
        )
    values = np.frombuffer(array.data, dtype=dtype, count=spec.size, offset=start)
    return values.reshape(spec.shape, order="F" if fortran_order else "C")


def _check_values(
    array: Array, spec: ArraySpec, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Raise unless an array has the shape and dtype that are expected, whatever it declares."""
    if shape != spec.shape:
        raise InvalidReplyError(
            Rejection.SHAPE,
            f"array {spec.key!r} holds shape {repr(shape)[:80]}; sent: {spec.shape}",
        )
    if not _converts_safely(dtype, spec.dtype) or array.dtype != dtype_name(dtype):
        raise InvalidReplyError(
            Rejection.DTYPE,
            f"array {spec.key!r} holds {dtype}, declares {array.dtype[:80]!r}; sent: {spec.dtype}",
        )


def declared_array(data: bytes, stype: str = NPY) -> Array:
    """Return untrusted bytes as an ``Array`` that declares what their own header says.

    For Flower's older API, whose tensors declare neither shape nor dtype. Where the header cannot
    be read both are left empty, and :func:`screen` rejects the array for its encoding.
    """
    try:
        shape, _, dtype, _ = _read_header(data, "")
    except InvalidReplyError:
        return Array("", (), stype, data)
    return Array(dtype.name, shape, stype, data)


def _read_header(data: bytes, key: str) -> Header:
    try:
        return read_header(data)
    except Exception as error:
        raise InvalidReplyError(
            Rejection.ENCODING, f"array {key!r} is not a .npy array: {type(error).__name__}"
        ) from error


def _converts_safely(received: np.dtype[np.generic], sent: np.dtype[np.generic]) -> bool:
    """Whether values may be used in place of those sent: the same dtype, or float for float."""
    if received.hasobject or not received.isnative or received.subdtype is not None:
        return False
    return received == sent or (received.name in FLOATS and sent.name in FLOATS)
