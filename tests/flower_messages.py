"""Messages as Flower makes them: train messages, honest replies, every malformed kind of reply.

Not a test: the tests of the parts that face Flower build their traffic here, from the real
classes. :data:`MALFORMED` holds one entry for each way in which a reply can be wrong.
"""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fl_bgmd.aggregators import RULES
from fl_bgmd.replies import Rejection
from fl_bgmd.strategies import RobustStrategy

Arrays = dict[str, NDArray[Any]]

# ------------------------------------------------------------------------------- models


def plain_model(seed: int = 0, dtype: str = "float32") -> ArrayRecord:
    """Return a model of two arrays, ``weight`` (4, 3) and ``bias`` (4,)."""
    draw = np.random.default_rng(seed)
    return to_record(
        {
            "weight": draw.normal(size=(4, 3)).astype(dtype),
            "bias": draw.normal(size=4).astype(dtype),
        }
    )


def batch_norm_model(seed: int = 0) -> ArrayRecord:
    """Return a model with everything a state dict may hold: 0-d, empty, buffers, integers, bool."""
    draw = np.random.default_rng(seed)
    return to_record(
        {
            "weight": draw.normal(size=(4, 3)).astype(np.float32),
            "bn.running_mean": draw.normal(size=4).astype(np.float32),
            "bn.running_var": draw.uniform(1, 2, size=4).astype(np.float32),
            "bn.num_batches_tracked": np.array(7),
            "scale": np.array(1.5, dtype=np.float32),
            "nothing": np.zeros((0, 3), dtype=np.float32),
            "mask": np.array([True, False]),
            "bias": draw.normal(size=4).astype(np.float32),
        }
    )


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Put arrays into an ArrayRecord."""
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def to_numpy(record: ArrayRecord) -> Arrays:
    """Return writable copies of the arrays of a record."""
    return {key: _loaded(array.data).copy() for key, array in record.items()}


@lru_cache(maxsize=256)
def _loaded(data: bytes) -> NDArray[Any]:
    """Return an array from its bytes: the same model comes in thousands of messages."""
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def same_bits(first: ArrayRecord, second: ArrayRecord) -> bool:
    """Whether two records hold the same keys in the same order with the same bytes."""
    return list(first.keys()) == list(second.keys()) and all(
        (first[key].dtype, first[key].shape, first[key].data)
        == (second[key].dtype, second[key].shape, second[key].data)
        for key in first
    )


# ------------------------------------------------------------------------------ messages


def train_message(
    arrays: ArrayRecord,
    node: int = 1,
    config: Mapping[str, Any] | None = None,
    message_type: str = MessageType.TRAIN,
) -> Message:
    """Return the message that a strategy sends to a node."""
    # Messages can only be made inside a run: Flower keeps its identity in a global.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    content = RecordDict(
        {"arrays": arrays, "config": ConfigRecord({"server-round": 1, **(config or {})})}
    )
    return Message(content, dst_node_id=node, message_type=message_type)


def sent_arrays(message: Message) -> ArrayRecord:
    """Return the model in a train message."""
    [arrays] = message.content.array_records.values()
    return arrays


def reply_with(
    message: Message,
    arrays: Mapping[str, NDArray[Any] | Array] | ArrayRecord,
    metrics: Mapping[str, Any] | None = None,
) -> Message:
    """Reply with arrays and metrics, ``num-examples`` 10 where no metrics are given."""
    record = (
        arrays
        if isinstance(arrays, ArrayRecord)
        else ArrayRecord(
            {
                key: value if isinstance(value, Array) else Array(np.asarray(value))
                for key, value in arrays.items()
            }
        )
    )
    found = MetricRecord({"num-examples": 10} if metrics is None else dict(metrics))
    return Message(RecordDict({"arrays": record, "metrics": found}), reply_to=message)


def honest_reply(
    message: Message,
    update: Mapping[str, NDArray[Any]] | None = None,
    *,
    num_examples: float = 10,
    partition: int | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Message:
    """Reply with ``sent - update``; keys without an update come back as they were sent."""
    arrays = to_numpy(sent_arrays(message))
    for key, value in (update or {}).items():
        arrays[key] = (arrays[key] - value).astype(arrays[key].dtype)
    found = {"num-examples": num_examples, **(metrics or {})}
    if partition is not None:
        found["partition-id"] = partition
    return reply_with(message, arrays, found)


def random_update(arrays: ArrayRecord, seed: int | Sequence[int], size: float = 1.0) -> Arrays:
    """Return normal values for every float array of a model, buffers left alone."""
    draw = np.random.default_rng(seed)
    return {
        key: (size * draw.normal(size=value.shape)).astype(value.dtype)
        for key, value in to_numpy(arrays).items()
        if value.dtype.kind == "f" and "running" not in key
    }


def update_row(message: Message, reply: Message) -> NDArray[Any]:
    """Return ``sent - received`` of all trained arrays, flat, in the order sent: a slow oracle."""
    sent, received = to_numpy(sent_arrays(message)), to_numpy(sent_arrays(reply))
    return np.concatenate(
        [
            (value - received[key]).ravel()
            for key, value in sent.items()
            if value.dtype.kind == "f" and "running" not in key
        ]
    )


# -------------------------------------------------------------------- malformed replies


@dataclass(frozen=True)
class Malformed:
    """A way in which a reply can be wrong.

    Attributes
    ----------
    build : callable
        From the train message to the reply.
    reason : Rejection
        Why it must be rejected.
    """

    build: Callable[[Message], Message]
    reason: Rejection


MALFORMED: dict[str, Malformed] = {}
"""By name; each wants a model with a float32 array ``weight`` of shape (4, 3)."""

KEY = "weight"
UNPICKLED: list[str] = []
"""Grows when a payload of this module is unpickled."""


def malformed(
    reason: Rejection,
) -> Callable[[Callable[[Message], Message]], Callable[[Message], Message]]:
    """Enter a function into :data:`MALFORMED` under its name."""

    def enter(build: Callable[[Message], Message]) -> Callable[[Message], Message]:
        MALFORMED[build.__name__.replace("_", "-")] = Malformed(build, reason)
        return build

    return enter


def replace_values(message: Message, value: NDArray[Any] | Array, key: str = KEY) -> Message:
    """Reply honestly but for one array."""
    return reply_with(message, {**sent_arrays(message), key: value})


def replace_bytes(message: Message, data: bytes, **declared: Any) -> Message:
    """Reply honestly but for the bytes of one array; ``declared`` may change its other fields."""
    sent = sent_arrays(message)[KEY]
    fields = {"dtype": sent.dtype, "shape": sent.shape, "stype": sent.stype, "data": data}
    return replace_values(message, Array(**(fields | declared)))


def replace_metrics(message: Message, metrics: Mapping[str, Any]) -> Message:
    """Reply with an honest model and other metrics."""
    return reply_with(message, sent_arrays(message), metrics)


def npy(header: str, values: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """Build .npy bytes with any header."""
    text = header.encode("latin1") + b"\n"
    size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + text + values


def npy_of_shape(shape: str, values: bytes, descr: str = "'<f4'") -> bytes:
    """Build .npy bytes whose header claims any shape and dtype."""
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", values)


def _weight(message: Message) -> NDArray[Any]:
    return np.array(sent_arrays(message)[KEY].numpy())


def _with_value(message: Message, value: float, key: str = KEY) -> Message:
    values = np.array(sent_arrays(message)[key].numpy())
    values.flat[-1] = value
    return replace_values(message, values, key)


@malformed(Rejection.ERROR)
def error_reply(message: Message) -> Message:
    return Message(Error(code=2, reason="the client raised"), reply_to=message)


@malformed(Rejection.KEYS)
def missing_key(message: Message) -> Message:
    return reply_with(message, dict(list(sent_arrays(message).items())[1:]))


@malformed(Rejection.KEYS)
def extra_key(message: Message) -> Message:
    return reply_with(message, {**sent_arrays(message), "one-more": np.zeros(3)})


@malformed(Rejection.KEYS)
def renamed_key(message: Message) -> Message:
    return reply_with(message, {f"module.{k}": v for k, v in sent_arrays(message).items()})


@malformed(Rejection.KEYS)
def empty_array_record(message: Message) -> Message:
    return reply_with(message, {})


@malformed(Rejection.KEYS)
def huge_key(message: Message) -> Message:
    return reply_with(message, {**sent_arrays(message), "k" * 2_000_000: np.zeros(1)})


@malformed(Rejection.KEYS)
def thousands_of_keys(message: Message) -> Message:
    one = Array(np.zeros(1))
    return reply_with(message, {**sent_arrays(message), **{f"k{i}": one for i in range(3000)}})


@malformed(Rejection.ARRAY_RECORDS)
def no_array_record(message: Message) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": 10})})
    return Message(content, reply_to=message)


@malformed(Rejection.ARRAY_RECORDS)
def two_array_records(message: Message) -> Message:
    reply = honest_reply(message)
    reply.content["more"] = sent_arrays(message)
    return reply


@malformed(Rejection.METRIC_RECORDS)
def no_metric_record(message: Message) -> Message:
    return Message(RecordDict({"arrays": sent_arrays(message)}), reply_to=message)


@malformed(Rejection.METRIC_RECORDS)
def two_metric_records(message: Message) -> Message:
    reply = honest_reply(message)
    reply.content["more"] = MetricRecord({"num-examples": 10})
    return reply


@malformed(Rejection.METRIC_RECORDS)
def empty_content(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


@malformed(Rejection.METRIC_RECORDS)
def config_instead_of_metrics(message: Message) -> Message:
    records = {"arrays": sent_arrays(message), "metrics": ConfigRecord({"num-examples": 10})}
    return Message(RecordDict(records), reply_to=message)


@malformed(Rejection.SHAPE)
def same_size_other_shape(message: Message) -> Message:
    return replace_values(message, _weight(message).T.copy())


@malformed(Rejection.SHAPE)
def flattened(message: Message) -> Message:
    return replace_values(message, _weight(message).ravel())


@malformed(Rejection.SHAPE)
def broadcastable(message: Message) -> Message:
    return replace_values(message, np.full((1, 1), 0.5, dtype=np.float32))


@malformed(Rejection.SHAPE)
def broadcastable_zero_d(message: Message) -> Message:
    return replace_values(message, np.array(0.5, dtype=np.float32))


@malformed(Rejection.SHAPE)
def too_large(message: Message) -> Message:
    return replace_values(message, np.zeros((400, 3), dtype=np.float32))


@malformed(Rejection.SHAPE)
def declared_shape_differs(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data, shape=(3, 4))


@malformed(Rejection.SHAPE)
def header_shape_differs(message: Message) -> Message:
    return replace_bytes(message, Array(_weight(message).T.copy()).data)


@malformed(Rejection.SHAPE)
def header_shape_broadcastable(message: Message) -> Message:
    return replace_bytes(message, Array(np.zeros((1, 1), dtype=np.float32)).data)


@malformed(Rejection.SHAPE)
def header_claims_terabytes(message: Message) -> Message:
    return replace_bytes(message, npy_of_shape("(1000000000000,)", b"\0" * 48))


@malformed(Rejection.SHAPE)
def all_claim_terabytes(message: Message) -> Message:
    data = npy_of_shape("(1000000000000,)", b"\0" * 48)
    return replace_bytes(message, data, shape=(10**12,))


@malformed(Rejection.SHAPE)
def negative_shape(message: Message) -> Message:
    return replace_bytes(message, npy_of_shape("(-4, -3)", b"\0" * 48))


@malformed(Rejection.SHAPE)
def ten_thousand_dimensions(message: Message) -> Message:
    return replace_values(message, Array("float32", (1,) * 10_000, "numpy.ndarray", b""))


@malformed(Rejection.DTYPE)
def complex64(message: Message) -> Message:
    return replace_values(message, _weight(message).astype(np.complex64))


@malformed(Rejection.DTYPE)
def strings(message: Message) -> Message:
    return replace_values(message, _weight(message).astype("U8"))


@malformed(Rejection.DTYPE)
def byte_strings(message: Message) -> Message:
    return replace_values(message, _weight(message).astype("S4"))


@malformed(Rejection.DTYPE)
def dates(message: Message) -> Message:
    return replace_values(message, _weight(message).astype("M8[s]"))


@malformed(Rejection.DTYPE)
def records(message: Message) -> Message:
    return replace_values(message, np.zeros((4, 3), dtype=[("a", "f4")]))


@malformed(Rejection.DTYPE)
def float_subarrays(message: Message) -> Message:
    # A dtype of four float32 has 4 * 3 items of 16 bytes.
    data = npy_of_shape("(4, 3)", b"\0" * 192, descr="('<f4', (4,))")
    return replace_bytes(message, data)


@malformed(Rejection.DTYPE)
def big_endian(message: Message) -> Message:
    return replace_values(message, _weight(message).astype(">f4"))


@malformed(Rejection.DTYPE)
def big_endian_declared_native(message: Message) -> Message:
    return replace_bytes(message, Array(_weight(message).astype(">f4")).data)


@malformed(Rejection.DTYPE)
def bool_for_float(message: Message) -> Message:
    return replace_values(message, _weight(message) > 0)


@malformed(Rejection.DTYPE)
def int_for_float(message: Message) -> Message:
    return replace_values(message, _weight(message).astype(np.int32))


@malformed(Rejection.DTYPE)
def int_declared_float(message: Message) -> Message:
    return replace_bytes(message, Array(_weight(message).astype(np.int32)).data)


@malformed(Rejection.DTYPE)
def long_double(message: Message) -> Message:
    return replace_values(message, _weight(message).astype(np.longdouble))


@malformed(Rejection.DTYPE)
def declared_dtype_differs(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data, dtype="float64")


@malformed(Rejection.DTYPE)
def declared_dtype_huge(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data, dtype="f" * 2_000_000)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> str:
    UNPICKLED.append("unpickled")
    return "caught"


def pickled_objects() -> bytes:
    """Return the .npy bytes of an object array that leaves a trace when it is unpickled."""
    values = np.empty((4, 3), dtype=object)
    values[:] = [[_Trap()] * 3] * 4
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


@malformed(Rejection.DTYPE)
def objects(message: Message) -> Message:
    return replace_bytes(message, pickled_objects())


@malformed(Rejection.DTYPE)
def objects_declared(message: Message) -> Message:
    return replace_bytes(message, pickled_objects(), dtype="object")


@malformed(Rejection.ENCODING)
def bare_pickle(message: Message) -> Message:
    return replace_bytes(message, pickle.dumps(_Trap()))


@malformed(Rejection.ENCODING)
def garbage(message: Message) -> Message:
    return replace_bytes(message, bytes(range(256)) * 8)


@malformed(Rejection.ENCODING)
def no_bytes(message: Message) -> Message:
    return replace_bytes(message, b"")


@malformed(Rejection.ENCODING)
def truncated_values(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data[:-3])


@malformed(Rejection.ENCODING)
def one_value_short(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data[:-4])


@malformed(Rejection.ENCODING)
def truncated_header(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data[:40])


@malformed(Rejection.ENCODING)
def trailing_bytes(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data + b"\0" * 4)


@malformed(Rejection.ENCODING)
def trailing_megabytes(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data + b"\0" * 4_000_000)


@malformed(Rejection.ENCODING)
def header_size_of_gigabytes(message: Message) -> Message:
    data = b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b" " * 48
    return replace_bytes(message, data)


@malformed(Rejection.ENCODING)
def header_too_long(message: Message) -> Message:
    padding = " " * 60_000
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), {padding}}}"
    return replace_bytes(message, npy(header, _weight(message).tobytes()))


@malformed(Rejection.ENCODING)
def header_with_another_key(message: Message) -> Message:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), 'more': 1}"
    return replace_bytes(message, npy(header, _weight(message).tobytes()))


@malformed(Rejection.ENCODING)
def header_is_code(message: Message) -> Message:
    header = "__import__('flower_messages').UNPICKLED.append('evaluated')"
    return replace_bytes(message, npy(header, _weight(message).tobytes()))


@malformed(Rejection.ENCODING)
def header_nested_deeply(message: Message) -> Message:
    return replace_bytes(message, npy("-" * 4000 + "1", b""))


@malformed(Rejection.ENCODING)
def header_of_parentheses(message: Message) -> Message:
    return replace_bytes(message, npy("(" * 4000, b""))


@malformed(Rejection.ENCODING)
def unknown_npy_version(message: Message) -> Message:
    data = sent_arrays(message)[KEY].data
    return replace_bytes(message, data[:6] + b"\x09\x00" + data[8:])


@malformed(Rejection.ENCODING)
def zipped(message: Message) -> Message:
    stream = io.BytesIO()
    np.savez_compressed(stream, weight=_weight(message))
    return replace_bytes(message, stream.getvalue())


@malformed(Rejection.ENCODING)
def other_serialization(message: Message) -> Message:
    return replace_bytes(message, sent_arrays(message)[KEY].data, stype="torch.Tensor")


@malformed(Rejection.NON_FINITE)
def nan(message: Message) -> Message:
    return _with_value(message, np.nan)


@malformed(Rejection.NON_FINITE)
def infinity(message: Message) -> Message:
    return _with_value(message, np.inf)


@malformed(Rejection.NON_FINITE)
def minus_infinity(message: Message) -> Message:
    return _with_value(message, -np.inf)


@malformed(Rejection.NON_FINITE)
def both_infinities(message: Message) -> Message:
    values = _weight(message)
    values.flat[:2] = np.inf, -np.inf
    return replace_values(message, values)


@malformed(Rejection.NON_FINITE)
def beyond_float32(message: Message) -> Message:
    return replace_values(message, np.full((4, 3), 1e300))


@malformed(Rejection.METRICS)
def too_many_metrics(message: Message) -> Message:
    return replace_metrics(message, {"num-examples": 10, "list": [1.0] * 10_001})


USELESS_METRICS: dict[str, dict[str, Any]] = {
    "nan": {"num-examples": 10, "loss": np.nan},
    "infinite": {"num-examples": 10, "loss": -np.inf},
    "nan-in-a-list": {"num-examples": 10, "losses": [0.5, np.nan]},
    "huge-integer": {"num-examples": 10, "loss": 10**400},
    "huge-key": {"num-examples": 10, "k" * 2_000_000: np.inf},
}
"""Metrics of which one is dropped while the reply counts."""

USELESS_COUNTS: dict[str, Any] = {
    "nan": np.nan,
    "infinite": np.inf,
    "negative": -1,
    "huge-integer": 10**400,
    "list": [10, 10],
}
"""Values of ``num-examples`` that count as 1, or are rejected where the number weights."""


# ------------------------------------------------------------------------ a small real app

DIMENSIONS = 8
TRUE_WEIGHTS = np.random.default_rng(99).normal(size=DIMENSIONS).astype(np.float32)


def regression_model() -> ArrayRecord:
    """Return where the regression starts: zero weights and a zero offset."""
    return to_record(
        {"weight": np.zeros(DIMENSIONS, np.float32), "offset": np.zeros((), np.float32)}
    )


def regression_error(arrays: ArrayRecord) -> float:
    """Return the distance to the weights that made the data."""
    values = to_numpy(arrays)
    difference = values["weight"].astype(np.float64) - TRUE_WEIGHTS
    return float(np.sqrt(difference @ difference + float(values["offset"]) ** 2))


@cache
def regression_data(partition: int, examples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a client's inputs (examples, DIMENSIONS) and targets (examples,), float32."""
    draw = np.random.default_rng([5, partition])
    inputs = draw.normal(size=(examples, DIMENSIONS)).astype(np.float32)
    noise = draw.normal(size=examples).astype(np.float32)
    return inputs, (inputs @ TRUE_WEIGHTS + 0.1 * noise).astype(np.float32)


def regression_app(
    mods: Sequence[Mod] = (), *, learning_rate: float = 0.1, examples: int = 64
) -> ClientApp:
    """Return a ClientApp as anyone would write it: linear regression, knows nothing of fl_bgmd."""
    app = ClientApp(mods=list(mods))

    def data(context: Context) -> tuple[NDArray[Any], NDArray[Any]]:
        return regression_data(int(context.node_config["partition-id"]), examples)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = to_numpy(message.content["arrays"])
        inputs, targets = data(context)
        with np.errstate(all="ignore"):
            errors = inputs @ model["weight"] + model["offset"] - targets
            model["weight"] -= np.float32(learning_rate) * (errors @ inputs) / len(errors)
            model["offset"] = model["offset"] - np.float32(learning_rate) * errors.mean()
            loss = float(np.square(errors).mean())
        metrics = {"num-examples": examples, "loss": min(loss, 1e30)}
        return reply_with(message, model, metrics)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = to_numpy(message.content["arrays"])
        inputs, targets = data(context)
        errors = inputs @ model["weight"] + model["offset"] - targets
        metrics = MetricRecord({"num-examples": examples, "loss": float(np.square(errors).mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def shrunk(arrays: ArrayRecord, server_round: int) -> ArrayRecord:
    """Train as a server whose data ask for half of every value."""
    return to_record({key: 0.5 * value for key, value in to_numpy(arrays).items()})


def needed(cls: type[RobustStrategy]) -> dict[str, Any]:
    """Return the options that a strategy class cannot be without."""
    return {"root_update": shrunk} if cls.spec and RULES[cls.spec].needs_root else {}
