"""The trust boundary: what is accepted, to the bit, and what is rejected, with which reason."""

import io
import math
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    MALFORMED,
    UNPICKLED,
    USELESS_COUNTS,
    USELESS_METRICS,
    batch_norm_model,
    error_reply,
    honest_reply,
    npy_of_shape,
    pickled_objects,
    plain_model,
    random_update,
    replace_bytes,
    replace_metrics,
    replace_values,
    reply_with,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
    train_message,
    update_row,
)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.replies import (
    Rejection,
    Screened,
    median_metrics,
    partition_id,
    screen,
)

WEIGHT = (4, 3)


def read(reply: Message, layout: ModelLayout, **options: Any) -> tuple[Screened, Any, Any]:
    """Screen a reply into fresh rows."""
    row = np.full(layout.num_directions, np.nan, dtype=layout.dtype)
    buffers = np.full(layout.num_buffers, np.nan)
    return screen(reply, layout, row, buffers, **options), row, buffers


def reason(reply: Message, layout: ModelLayout, **options: Any) -> Rejection | None:
    return read(reply, layout, **options)[0].reason


@pytest.fixture
def message() -> Message:
    return train_message(plain_model())


@pytest.fixture
def layout() -> ModelLayout:
    return ModelLayout(plain_model())


# ------------------------------------------------------------------------------ accepted


def test_an_honest_reply_becomes_exactly_sent_minus_received(
    message: Message, layout: ModelLayout
) -> None:
    reply = honest_reply(message, random_update(plain_model(), 1), num_examples=32)
    screened, row, buffers = read(reply, layout)
    assert screened.reason is None
    assert screened.detail == ""
    assert screened.num_examples == 32
    np.testing.assert_array_equal(row, update_row(message, reply))
    assert row.dtype == np.float32
    assert buffers.size == 0


@pytest.mark.parametrize("name", ["", "arrays", "my-model", "metrics2", "k" * 100_000])
def test_one_array_record_is_accepted_under_any_name(
    name: str, message: Message, layout: ModelLayout
) -> None:
    content = RecordDict({name: plain_model(3), "other": MetricRecord({"num-examples": 1})})
    screened, row, _ = read(Message(content, reply_to=message), layout)
    assert screened.reason is None
    assert row.any()


def test_keys_may_come_in_another_order(message: Message, layout: ModelLayout) -> None:
    straight = honest_reply(message, random_update(plain_model(), 1))
    reversed_keys = dict(reversed(list(sent_arrays(straight).items())))
    _, expected, _ = read(straight, layout)
    screened, row, _ = read(reply_with(message, reversed_keys), layout)
    assert screened.reason is None
    np.testing.assert_array_equal(row, expected)


def test_arrays_in_fortran_order(message: Message, layout: ModelLayout) -> None:
    values = np.asfortranarray(np.random.default_rng(2).normal(size=WEIGHT).astype(np.float32))
    reply = replace_values(message, Array(values))
    assert b"'fortran_order': True" in sent_arrays(reply)["weight"].data
    screened, row, _ = read(reply, layout)
    assert screened.reason is None
    np.testing.assert_array_equal(row, update_row(message, reply))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_another_float_dtype_is_accepted(dtype: str, message: Message, layout: ModelLayout) -> None:
    values = np.random.default_rng(2).normal(size=WEIGHT).astype(dtype)
    screened, row, _ = read(replace_values(message, values), layout)
    assert screened.reason is None
    sent = to_numpy(plain_model())["weight"]
    expected = (sent.astype(np.float64) - values).astype(np.float32)
    np.testing.assert_array_equal(row[:12], expected.ravel())


def test_npy_version_2_is_accepted(message: Message, layout: ModelLayout) -> None:
    stream = io.BytesIO()
    values = to_numpy(plain_model(4))["weight"]
    np.lib.format.write_array(stream, values, version=(2, 0))
    screened, row, _ = read(replace_bytes(message, stream.getvalue()), layout)
    assert screened.reason is None
    np.testing.assert_array_equal(row[:12], (to_numpy(plain_model())["weight"] - values).ravel())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_of_the_row_follows_the_model(dtype: str) -> None:
    model = plain_model(dtype=dtype)
    message, layout = train_message(model), ModelLayout(model)
    assert layout.dtype == (np.float64 if dtype == "float64" else np.float32)
    reply = honest_reply(message, random_update(model, 3))
    screened, row, _ = read(reply, layout)
    assert screened.reason is None
    sent, received = to_numpy(model), to_numpy(sent_arrays(reply))
    expected = [
        (sent[key].astype(np.float64) - received[key].astype(np.float64)).ravel() for key in sent
    ]
    np.testing.assert_array_equal(row, np.concatenate(expected).astype(layout.dtype))


def test_a_row_may_be_float16() -> None:
    """It holds the update rounded; one that leaves its range is not finite."""
    model = plain_model(dtype="float16")
    message, layout = train_message(model), ModelLayout(model)
    assert layout.is_half
    assert not ModelLayout(plain_model()).is_half
    reply = honest_reply(message, random_update(model, 3))
    _, expected, buffers = read(reply, layout)
    row = np.empty(layout.num_directions, np.float16)
    assert screen(reply, layout, row, buffers).reason is None
    np.testing.assert_array_equal(row, expected.astype(np.float16))
    far = replace_values(reply, np.full(WEIGHT, 1e5, np.float32))
    assert read(far, layout)[0].reason is None
    assert screen(far, layout, row, buffers).reason is Rejection.NON_FINITE


def test_zero_dimensional_and_empty_arrays_buffers_and_integers() -> None:
    model = batch_norm_model()
    message, layout = train_message(model), ModelLayout(model)
    assert [spec.key for spec in layout.directions] == ["weight", "scale", "nothing", "bias"]
    assert [spec.key for spec in layout.buffers] == [
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
        "mask",
    ]
    arrays = to_numpy(honest_record(message))
    arrays["bn.running_mean"] += 2
    arrays["bn.num_batches_tracked"] = np.array(9)
    arrays["mask"] = np.array([False, True])
    reply = reply_with(message, arrays)
    screened, row, buffers = read(reply, layout)
    assert screened.reason is None
    np.testing.assert_array_equal(row, update_row(message, reply))
    np.testing.assert_array_equal(buffers[:4], arrays["bn.running_mean"].astype(np.float64))
    np.testing.assert_array_equal(buffers[4:8], arrays["bn.running_var"].astype(np.float64))
    np.testing.assert_array_equal(buffers[8:], [9, 0, 1])


def honest_record(message: Message) -> ArrayRecord:
    return sent_arrays(honest_reply(message, random_update(sent_arrays(message), 5)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bn.num_batches_tracked", np.array(7.0)),
        ("bn.num_batches_tracked", np.array(7, dtype=np.int32)),
        ("bn.num_batches_tracked", np.array(7, dtype=np.uint64)),
        ("bn.running_mean", np.zeros(4, dtype=np.int64)),
        ("mask", np.array([1, 0], dtype=np.uint8)),
        ("mask", np.array([1.0, 0.0])),
    ],
)
def test_buffers_keep_their_kind(key: str, value: NDArray[Any]) -> None:
    message, layout = train_message(batch_norm_model()), ModelLayout(batch_norm_model())
    assert reason(replace_values(message, value, key), layout) is Rejection.DTYPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_buffers_must_be_finite(value: float) -> None:
    message, layout = train_message(batch_norm_model()), ModelLayout(batch_norm_model())
    values = np.ones(4, dtype=np.float32)
    values[2] = value
    reply = replace_values(message, values, "bn.running_var")
    assert reason(reply, layout) is Rejection.NON_FINITE


def test_a_buffer_beyond_the_dtype_sent_is_not_finite_there() -> None:
    """As float32, which the model holds, 1e300 is an infinity."""
    message, layout = train_message(batch_norm_model()), ModelLayout(batch_norm_model())
    reply = replace_values(message, np.full(4, 1e300), "bn.running_var")
    assert reason(reply, layout) is Rejection.NON_FINITE


# ------------------------------------------------------------------------------ rejected


@pytest.mark.parametrize("kind", MALFORMED)
def test_each_malformed_kind_is_rejected_with_its_reason(
    kind: str, message: Message, layout: ModelLayout
) -> None:
    screened, _, _ = read(MALFORMED[kind].build(message), layout)
    assert screened.reason is MALFORMED[kind].reason, screened.detail
    assert screened.detail
    assert not UNPICKLED


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_logged_about_a_reply_is_short(
    kind: str, message: Message, layout: ModelLayout
) -> None:
    screened, _, _ = read(MALFORMED[kind].build(message), layout)
    assert len(screened.detail) < 600


TRACEBACK = """\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=127.0.0.1, actor_id=d1)
  File "client_app.py", line 161, in __call__
    return handlers[name](message, context)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: no such file: data.csv
hint: a second line of the message

The above exception was the direct cause of the following exception:

\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=127.0.0.1, actor_id=d1)
  File "ray_actor.py", line 65, in run
    raise ClientAppException(str(ex)) from ex
flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. Message: no
hint: a second line of the message"""


RAISED = "ValueError: no such file: data.csv hint: a second line of the message"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<class 'ValueError'>:<'no disk'>", "ValueError: no disk"),
        (f"<class 'ray.RayTaskError(X)'>:<'{TRACEBACK}'>", RAISED),
        (TRACEBACK, RAISED),
        ('Traceback:\n  File "a.py"\n    x()\nKeyboardInterrupt\n', "KeyboardInterrupt"),
        ("ValueError: no disk", "ValueError: no disk"),
        ("\x1b[31mno\x1b[0m disk", "no disk"),
        ("Node unavailable", "Node unavailable"),
        ("", ""),
    ],
)
def test_the_reason_of_an_error_reply_is_the_exceptions_line(
    message: Message, layout: ModelLayout, text: str, shown: str
) -> None:
    screened, _, _ = read(Message(Error(code=2, reason=text), reply_to=message), layout)
    assert (screened.reason, screened.detail) == (Rejection.ERROR, shown)


@pytest.mark.parametrize(
    "text", ["x" * 2_000_000, "a\nb " * 500_000, "<class 'X'>:<'" + "y\n" * 999]
)
def test_the_reason_of_an_error_reply_is_cut_to_its_end_on_one_line(
    message: Message, layout: ModelLayout, text: str
) -> None:
    text += "\nWARNING: a forged line"
    screened, _, _ = read(Message(Error(code=2, reason=text), reply_to=message), layout)
    assert screened.detail.endswith("WARNING: a forged line")
    assert len(screened.detail) <= 300
    assert "\n" not in screened.detail


def test_keys_cannot_forge_lines_of_the_log(message: Message, layout: ModelLayout) -> None:
    extra = {**sent_arrays(message), "a\nb": np.zeros(1)}
    metric = {"num-examples": 10, "a\nb": np.nan}
    for reply in (reply_with(message, extra), replace_metrics(message, metric)):
        assert "\n" not in read(reply, layout)[0].detail


def test_every_reason_is_exercised() -> None:
    reasons = {entry.reason for entry in MALFORMED.values()} | {Rejection.DUPLICATE}
    # Tested in test_packed_replies.py, in test_rounds.py, and further down in this file.
    elsewhere = {Rejection.PACKED, Rejection.UNASKED, Rejection.SIZE}
    assert reasons == set(Rejection) - elsewhere - {Rejection.NUM_EXAMPLES}


def test_the_trap_would_spring_if_unpickled() -> None:
    """Control for the tests above: the payload does leave its trace."""
    try:
        np.load(io.BytesIO(pickled_objects()), allow_pickle=True)
        assert UNPICKLED
    finally:
        UNPICKLED.clear()


@pytest.mark.parametrize(
    "kind",
    [
        "header-claims-terabytes",
        "all-claim-terabytes",
        "header-size-of-gigabytes",
        "trailing-megabytes",
        "too-large",
        "garbage",
        "objects",
        "float-subarrays",
    ],
)
def test_nothing_of_the_claimed_size_is_allocated(
    kind: str, message: Message, layout: ModelLayout
) -> None:
    reply = MALFORMED[kind].build(message)
    read(reply, layout)  # imports and caches are not the reply's doing
    row = np.empty(layout.num_directions, dtype=layout.dtype)
    tracemalloc.start()
    try:
        screened = screen(reply, layout, row, np.empty(0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert screened.reason is not None
    assert peak < 200_000


def test_an_accepted_reply_is_not_copied() -> None:
    model = to_record({"weight": np.zeros(1_000_000, dtype=np.float32)})
    message, layout = train_message(model), ModelLayout(model)
    reply = honest_reply(message, {"weight": np.ones(1_000_000, dtype=np.float32)})
    row = np.empty(layout.num_directions, dtype=layout.dtype)
    tracemalloc.start()
    try:
        assert screen(reply, layout, row, np.empty(0)).reason is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000


def test_a_difference_that_overflows_float32() -> None:
    model = to_record({"weight": np.full(WEIGHT, 3e38, dtype=np.float32)})
    message, layout = train_message(model), ModelLayout(model)
    reply = replace_values(message, np.full(WEIGHT, -3e38, dtype=np.float32))
    assert np.isfinite(to_numpy(sent_arrays(reply))["weight"]).all()
    assert reason(reply, layout) is Rejection.NON_FINITE


def test_the_largest_finite_values_are_no_reason_to_reject(
    message: Message, layout: ModelLayout
) -> None:
    reply = replace_values(message, np.full(WEIGHT, -3e38, dtype=np.float32))
    screened, row, _ = read(reply, layout)
    assert screened.reason is None
    assert np.isfinite(row).all()


def test_a_header_of_python_2_gets_one_answer_whatever_warnings_do(
    message: Message, layout: ModelLayout
) -> None:
    """NumPy reads ``(4L, 3L)`` with a warning: a client must not make the server warn."""
    values = to_numpy(plain_model())["weight"].tobytes()
    reply = replace_bytes(message, npy_of_shape("(4L, 3L)", values))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lenient = reason(reply, layout)
    assert not caught
    assert lenient is reason(reply, layout)


@settings(deadline=None, max_examples=300)
@given(
    position=st.integers(0, 175),
    replacement=st.binary(min_size=0, max_size=12),
    removed=st.integers(0, 40),
)
def test_damaged_bytes_are_rejected_or_still_a_finite_update(
    position: int, replacement: bytes, removed: int
) -> None:
    message, layout = train_message(plain_model()), ModelLayout(plain_model())
    data = sent_arrays(message)["weight"].data
    damaged = data[:position] + replacement + data[position + removed :]
    screened, row, _ = read(replace_bytes(message, damaged), layout)
    if screened.reason is None:
        assert len(damaged) == len(data)
        assert np.isfinite(row).all()


# ------------------------------------------------------------------------------- metrics


def test_other_metrics_are_passed_on_as_floats(message: Message, layout: ModelLayout) -> None:
    metrics = {
        "num-examples": 3,
        "partition-id": 4,
        "loss": 0.5,
        "count": 2,
        "list": [1, 2],
        "empty": [],
    }
    screened, _, _ = read(replace_metrics(message, metrics), layout)
    assert screened.reason is None
    assert screened.num_examples == 3.0
    assert screened.metrics == {"loss": 0.5, "count": 2.0, "list": [1.0, 2.0], "empty": []}
    assert isinstance(screened.metrics["count"], float)


@pytest.mark.parametrize("value", [0, 0.5, 10**18, 2**63 - 1, 1e300])
def test_num_examples_may_be_any_finite_number(
    value: float, message: Message, layout: ModelLayout
) -> None:
    screened, _, _ = read(replace_metrics(message, {"num-examples": value}), layout)
    assert screened.reason is None
    assert screened.num_examples == float(value)


def test_missing_num_examples_count_as_one_or_are_rejected(
    message: Message, layout: ModelLayout
) -> None:
    reply = replace_metrics(message, {"loss": 1.0})
    screened, _, _ = read(reply, layout)
    assert screened.reason is None
    assert screened.num_examples == 1.0
    assert reason(reply, layout, needs_examples=True) is Rejection.NUM_EXAMPLES


@pytest.mark.parametrize("kind", USELESS_COUNTS)
def test_num_examples_of_no_use_count_as_one_or_are_rejected(
    message: Message, layout: ModelLayout, kind: str
) -> None:
    reply = replace_metrics(message, {"num-examples": USELESS_COUNTS[kind], "loss": 2.0})
    screened, row, _ = read(reply, layout)
    assert (screened.reason, screened.num_examples) == (None, 1.0)
    assert screened.metrics == {"loss": 2.0}
    assert np.array_equal(row, update_row(message, reply))
    assert reason(reply, layout, needs_examples=True) is Rejection.NUM_EXAMPLES


@pytest.mark.parametrize("kind", USELESS_METRICS)
def test_a_metric_that_is_not_finite_is_dropped_and_the_update_stays(
    message: Message, layout: ModelLayout, kind: str
) -> None:
    metrics = {**USELESS_METRICS[kind], "accuracy": 0.5}
    reply = reply_with(message, to_numpy(plain_model(3)), metrics)
    screened, row, _ = read(reply, layout)
    assert (screened.reason, screened.dropped) == (None, 1)
    assert (screened.num_examples, screened.metrics) == (10.0, {"accuracy": 0.5})
    assert len(screened.detail) < 150
    assert np.array_equal(row, update_row(message, reply))


def test_the_key_of_the_examples_can_be_chosen(message: Message, layout: ModelLayout) -> None:
    reply = replace_metrics(message, {"samples": 5, "num-examples": 7})
    screened, _, _ = read(reply, layout, examples_key="samples", needs_examples=True)
    assert screened.num_examples == 5.0
    assert screened.metrics == {"num-examples": 7.0}


def test_a_node_is_heard_once(layout: ModelLayout) -> None:
    seen: set[int] = set()
    first, second = (train_message(plain_model(), node) for node in (1, 2))
    assert reason(honest_reply(first), layout, seen_nodes=seen) is None
    assert reason(honest_reply(first), layout, seen_nodes=seen) is Rejection.DUPLICATE
    assert reason(honest_reply(second), layout, seen_nodes=seen) is None
    assert seen == {1, 2}


def test_a_rejected_reply_uses_up_the_turn_of_its_node_but_an_error_does_not(
    layout: ModelLayout,
) -> None:
    """Flower reports a node that died under the id of the SuperLink: that is nobody's turn."""
    seen: set[int] = set()
    message = train_message(plain_model())
    assert reason(error_reply(message), layout, seen_nodes=seen) is Rejection.ERROR
    bad = MALFORMED["nan"].build(message)
    assert reason(bad, layout, seen_nodes=seen) is Rejection.NON_FINITE
    assert reason(honest_reply(message), layout, seen_nodes=seen) is Rejection.DUPLICATE


def test_without_a_layout_only_the_metrics_are_read(message: Message) -> None:
    reply = Message(RecordDict({"m": MetricRecord({"num-examples": 2, "a": 1})}), reply_to=message)
    assert screen(reply, None).metrics == {"a": 1.0}
    reply = Message(RecordDict({"m": MetricRecord({"a": 1, "b": np.nan})}), reply_to=message)
    assert (screen(reply, None).metrics, screen(reply, None).dropped) == ({"a": 1.0}, 1)
    assert screen(MALFORMED["two-array-records"].build(message), None).reason is None


# ---------------------------------------------------------------------------- partition id


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (-1, None), (2**31, None), (1.0, None), ([1], None)],
)
def test_partition_id_is_a_small_integer_or_nothing(
    value: Any, expected: int | None, message: Message
) -> None:
    assert partition_id(replace_metrics(message, {"partition-id": value})) == expected


def test_partition_id_of_anything_malformed(message: Message) -> None:
    for kind in MALFORMED.values():
        assert partition_id(kind.build(message)) is None


# --------------------------------------------------------------------------- ModelLayout


def test_to_arrays_gives_back_what_was_sent() -> None:
    for model in (batch_norm_model(), plain_model(dtype="float16"), plain_model(dtype="float64")):
        layout = ModelLayout(model)
        assert same_bits(layout.to_arrays(layout.values, layout.buffer_values), model)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
)
def test_every_integer_dtype_survives_the_round_trip(dtype: str) -> None:
    info = None if dtype == "bool" else np.iinfo(dtype)
    values = [0, 1] if info is None else [info.min, 0, 1, info.max]
    model = to_record({"w": np.ones(2, np.float32), "n": np.array(values, dtype=dtype)})
    layout = ModelLayout(model)
    back = layout.to_arrays(layout.values, layout.buffer_values)
    assert same_bits(back, model), (back["n"].numpy(), values)


@pytest.mark.parametrize(("value", "expected"), [(1.4, 1), (1.5, 2), (2.5, 2), (-0.6, -1)])
def test_integers_are_rounded(value: float, expected: int) -> None:
    model = to_record({"w": np.ones(1, np.float32), "n": np.array([3])})
    layout = ModelLayout(model)
    back = layout.to_arrays(layout.values, np.array([value]))
    assert back["n"].numpy().tolist() == [expected]
    assert back["n"].dtype == "int64"


@pytest.mark.parametrize(("value", "expected"), [(0.4, False), (0.5, False), (0.6, True)])
def test_masks_are_rounded(value: float, expected: bool) -> None:
    model = to_record({"w": np.ones(1, np.float32), "mask": np.array([True])})
    layout = ModelLayout(model)
    back = layout.to_arrays(layout.values, np.array([value]))
    assert back["mask"].numpy().tolist() == [expected]
    assert back["mask"].dtype == "bool"


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    dtypes=st.lists(
        st.sampled_from(["float16", "float32", "float64", "int64", "bool"]), min_size=5, max_size=5
    ),
    seed=st.integers(0, 1000),
)
def test_any_layout_survives_the_round_trip(
    shapes: list[tuple[int, ...]], dtypes: list[str], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    arrays = {"first": np.ones(1, np.float32)}
    for i, shape in enumerate(shapes):
        arrays[f"a{i}"] = np.asarray(draw.normal(size=shape) * 5).astype(dtypes[i])
    model = to_record(arrays)
    layout = ModelLayout(model)
    assert same_bits(layout.to_arrays(layout.values, layout.buffer_values), model)
    assert layout.num_directions + layout.num_buffers == sum(a.size for a in arrays.values())
    screened, row, _ = read(honest_reply(train_message(model)), layout)
    assert screened.reason is None
    assert not row.any()


@pytest.mark.parametrize("dtype", ["complex64", "U4", "M8[s]"])
def test_a_model_of_another_dtype_is_refused(dtype: str) -> None:
    model = to_record({"w": np.ones(1, np.float32), "odd": np.zeros(2, dtype=dtype)})
    with pytest.raises(ValueError, match=r"'odd' of the model has dtype .*allowed: float16"):
        ModelLayout(model)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"n": np.arange(3)},
        {"bn.running_mean": np.ones(3, np.float32)},
        {"w": np.zeros((0, 2), np.float32)},
    ],
)
def test_a_model_with_nothing_to_train_is_refused(arrays: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(ValueError, match="no floating-point array to train"):
        ModelLayout(to_record(arrays))


# ------------------------------------------------------------------------- median_metrics

finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(data=st.data(), honest=st.lists(finite, min_size=1, max_size=9))
def test_a_minority_cannot_move_a_metric_out_of_the_honest_range(
    data: st.DataObject, honest: list[float]
) -> None:
    hostile = data.draw(st.lists(finite, max_size=len(honest) - 1))
    order = data.draw(st.permutations(honest + hostile))
    median = median_metrics({"loss": value} for value in order)["loss"]
    assert isinstance(median, float)
    assert min(honest) <= median <= max(honest)


@settings(deadline=None)
@given(
    honest=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=7),
    data=st.data(),
)
def test_a_minority_cannot_bend_a_list(honest: list[list[float]], data: st.DataObject) -> None:
    hostile = data.draw(
        st.lists(st.one_of(finite, st.lists(finite, max_size=5)), max_size=len(honest) - 1)
    )
    median = median_metrics({"losses": value} for value in [*hostile, *honest])["losses"]
    assert isinstance(median, list)
    values = np.array(honest)
    assert (values.min(axis=0) <= median).all()
    assert (median <= values.max(axis=0)).all()


def test_the_median_of_an_even_number_is_the_middle_of_two() -> None:
    assert median_metrics([{"a": 1}, {"a": 2}, {"a": 10}, {"a": 0}]) == {"a": 1.5}


def test_keys_of_a_minority_are_dropped() -> None:
    reports = [{"loss": 1.0}, {"loss": 2.0, "forged": 9.0}, {"loss": 3.0, "forged": 9.0}]
    assert median_metrics(reports) == {"loss": 2.0, "forged": 9.0}
    assert median_metrics([*reports, {"loss": 0.0}]) == {"loss": 1.5}


def test_a_metric_in_two_shapes_counts_where_the_majority_is() -> None:
    assert median_metrics([{"a": [1.0, 2.0]}, {"a": [3.0, 4.0]}, {"a": 7.0}]) == {"a": [2.0, 3.0]}
    assert median_metrics([{"a": [1.0, 2.0]}, {"a": [3.0]}, {"a": 7.0}]) == {}


def test_no_metrics_empty_metrics_and_empty_lists() -> None:
    assert median_metrics([]) == {}
    assert median_metrics([{}, {}]) == {}
    assert median_metrics([{"a": []}, {"a": []}]) == {"a": []}


def test_screened_metrics_can_always_be_combined(message: Message) -> None:
    """Values at the end of the range pass the screening, so their median must be finite."""
    largest = float(np.finfo(np.float64).max)
    reply = replace_metrics(message, {"num-examples": 1, "loss": largest})
    screened = screen(reply, None)
    assert screened.reason is None
    median = median_metrics([screened.metrics, screened.metrics])["loss"]
    assert isinstance(median, float)
    assert math.isfinite(median)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"metrics": MetricRecord({"list": [1.0] * 10_001})}, Rejection.METRICS),
        ({"metrics": MetricRecord({str(i): 1 for i in range(10_001)})}, Rejection.METRICS),
        ({"metrics": MetricRecord({"num-examples": [1] * 10_001})}, Rejection.METRICS),
        ({"more": ConfigRecord({"blob": bytes(2**20)})}, Rejection.SIZE),
        ({"more": ConfigRecord({"list": [1] * 2**17})}, Rejection.SIZE),
    ],
)
def test_what_no_client_has_to_send_is_too_much(content: Any, reason: Rejection) -> None:
    message = train_message(plain_model())
    reply = honest_reply(message, random_update(sent_arrays(message), 1))
    for name, record in content.items():
        reply.content[name] = record
    layout = ModelLayout(plain_model())
    row = np.empty(layout.num_directions, np.float32)
    assert screen(reply, layout, row, np.empty(0, BUFFER_DTYPE)).reason == reason
