"""Random replies, in every way a message can be filled, against every strategy.

Nothing a client sends raises, and the round's result is to the bit that of the replies that were
accepted. ``make test`` draws 2,000 replies, each 20 of them for three of all strategies,
``make test-slow`` 20,000 for all.
"""

import io
import struct
import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    error_reply,
    honest_reply,
    plain_model,
    random_update,
    reply_with,
    same_bits,
    sent_arrays,
    train_message,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from strategy_rounds import named, train_round

from fl_bgmd.aggregators import RULES
from fl_bgmd.compression import build_compressor
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.replies import screen
from fl_bgmd.wire import PACKED_KEY, PACKED_RECORD

HONEST, FUZZED = 5, 20
KEYS = ("weight", "bias")

# ----------------------------------------------------------------------- what a client may send

dtypes = st.one_of(
    st.sampled_from(
        [
            "float32",
            "<f4",
            ">f4",
            "float64",
            "float16",
            "int8",
            "uint64",
            "bool",
            "complex64",
            "object",
            "O",
            "S8",
            "U4",
            "datetime64[s]",
            "longdouble",
            "V16",
            "f4,f4",
            "bfloat16",
        ]
    ),
    st.text(max_size=8),
)
shapes = st.one_of(
    st.sampled_from([(4, 3), (4,), (12,), (3, 4), (1, 1), (), (0,), (4, 3, 1)]),
    st.lists(st.integers(-1, 2**62), max_size=4).map(tuple),
)
values = st.one_of(
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.bool_, np.complex64]),
        st.sampled_from([(4, 3), (4,), (12,), (), (0,)]),
    ),
    npst.arrays(np.float32, (4, 3), elements=st.floats(width=32)),
    npst.arrays(np.float32, (4,), elements=st.floats(width=32)),
)


def npy(value: Any) -> bytes:
    """Return an array as Flower sends it."""
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return file.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return the bytes of an array with some changed, cut off or added."""
    data = bytearray(npy(draw(values)))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)))):
        data[place % len(data)] = byte
    end = draw(st.integers(0, 2 * len(data)))
    return bytes(data[:end]) + (b"" if end < len(data) else draw(st.binary(max_size=20)))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Return a .npy file whose header says anything."""
    described = {
        "descr": draw(st.one_of(dtypes, st.integers(), st.just([("x", "<f4")]))),
        "fortran_order": draw(st.one_of(st.booleans(), st.none())),
        "shape": draw(shapes),
    }
    text = draw(st.one_of(st.just(repr(described)), st.text(max_size=60))).encode()
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**32 - 1)))
    packed = (
        struct.pack("<I", length) if version != b"\x01\x00" else struct.pack("<H", length % 2**16)
    )
    return b"\x93NUMPY" + version + packed + text + draw(st.binary(max_size=60))


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Return an array that says anything about itself."""
    if draw(st.booleans()):
        return Array(draw(values))
    data = draw(st.one_of(damaged(), headers(), st.binary(max_size=100)))
    stype = draw(st.sampled_from(["numpy.ndarray", "pickle", "torch", ""]))
    return Array(dtype=draw(dtypes), shape=draw(shapes), stype=stype, data=data)


keys = st.one_of(st.sampled_from([*KEYS, PACKED_KEY, "Weight"]), st.text(max_size=5))
array_records = st.one_of(
    st.fixed_dictionaries({key: arrays() for key in KEYS}),
    st.dictionaries(keys, arrays(), max_size=4),
).map(ArrayRecord)
numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.floats(), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
names = st.one_of(st.sampled_from(["num-examples", "partition-id", "loss"]), st.text(max_size=5))
metric_records = st.dictionaries(names, numbers, max_size=4).map(MetricRecord)
config_records = st.dictionaries(
    st.one_of(st.sampled_from(["norm", "compressor"]), st.text(max_size=5)),
    st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=9), st.binary()),
    max_size=3,
).map(ConfigRecord)
contents = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["arrays", "x"]), array_records),
        st.tuples(st.sampled_from(["metrics", "y"]), metric_records),
        st.tuples(st.sampled_from([PACKED_RECORD, "z"]), config_records),
    ),
    max_size=4,
)


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, Any]:
    """Return how a reply is made: nothing honest, an honest one with a change, or an error."""
    kind = draw(st.sampled_from(["anything", "anything", "array", "metrics", "extra", "error"]))
    if kind == "anything":
        return kind, draw(contents)
    if kind == "array":
        return kind, (draw(st.sampled_from(KEYS)), draw(arrays()))
    if kind == "metrics":
        return kind, draw(metric_records)
    if kind == "extra":
        return kind, draw(st.one_of(array_records, metric_records, config_records))
    return kind, None


def build(message: Message, kind: str, content: Any) -> Message:
    """Return the reply to a message that :func:`replies` describes."""
    if kind == "error":
        return error_reply(message)
    if kind == "anything":
        return Message(RecordDict(dict(content)), reply_to=message)
    reply = honest(message)
    if kind == "array":
        name, array = content
        reply.content["arrays"] = ArrayRecord(
            {**reply.content.array_records["arrays"], name: array}
        )
    else:
        reply.content["metrics" if kind == "metrics" else "more"] = content
    return reply


def honest(message: Message) -> Message:
    """Return an honest reply, the update drawn for its node."""
    node = message.metadata.dst_node_id
    # The model is the same in all rounds, and most of their time would go into these.
    return reply_with(
        message, dict(honest_arrays(node)), {"num-examples": 10, "partition-id": node - 1}
    )


@cache
def honest_arrays(node: int) -> ArrayRecord:
    """Return the arrays of a node's honest reply."""
    message = train_message(plain_model(), node)
    update = random_update(sent_arrays(message), [node])
    return sent_arrays(honest_reply(message, update))


# ------------------------------------------------------------------------------------ the rounds

MOST = 10_000_000
"""Bytes: the replies hold kilobytes, and declare up to exabytes."""


def replies_to(messages: list[Message], fuzzed: list[tuple[str, Any]]) -> list[Message]:
    """Return honest replies to the first messages, random ones to the others."""
    pairs = zip(messages[HONEST:], fuzzed, strict=True)
    return [honest(m) for m in messages[:HONEST]] + [build(m, *described) for m, described in pairs]


def accepted_of(fuzzed: list[tuple[str, Any]], compressor: str) -> set[int]:
    """Return the nodes whose replies the screening accepts, each looked at alone."""
    model = plain_model()
    layout = ModelLayout(model)
    row, buffers = np.empty(layout.num_directions, np.float32), np.empty(0, BUFFER_DTYPE)
    accepted = set()
    nodes = range(1, HONEST + len(fuzzed) + 1)
    for reply in replies_to([train_message(model, node) for node in nodes], fuzzed):
        packing = None if compressor == "none" else build_compressor(compressor)
        screened = screen(reply, layout, row, buffers, compressor=packing)
        spotless = screened.reason is None and not screened.dropped
        assert spotless == (screened.detail == "")
        if screened.reason is None:
            accepted.add(reply.metadata.src_node_id)
            assert np.isfinite(row).all()
    return accepted


def check(fuzzed: list[tuple[str, Any]], families: list[str], compressor: str = "none") -> None:
    """Compare each family's round with one in which only the accepted replies ever came."""
    accepted = accepted_of(fuzzed, compressor)
    assert set(range(1, HONEST + 1)) <= accepted

    def run(name: str, keep: set[int]) -> tuple[ArrayRecord, MetricRecord]:
        def reply(messages: list[Message]) -> list[Message]:
            return [m for m in replies_to(messages, fuzzed) if m.metadata.src_node_id in keep]

        strategy = named(name, compressor=compressor)
        return train_round(strategy, plain_model(), reply=reply, nodes=HONEST + len(fuzzed))

    everybody = set(range(1, HONEST + len(fuzzed) + 1))
    for name in families:
        expected, alone = run(name, accepted)
        if name == families[0]:  # one is enough, after what Python imports and caches at first use
            tracemalloc.start()
        model, metrics = run(name, everybody)
        if name == families[0]:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MOST
        assert same_bits(model, expected)
        assert metrics["rejected"] == len(everybody) - len(accepted)
        assert without_counts(metrics) == without_counts(alone)


def without_counts(metrics: MetricRecord) -> dict[str, Any]:
    """Return what the replies that were rejected must not change."""
    counts = ("rejected", "missing", "bytes-rejected", "aggregation-seconds")
    counts += ("screening-seconds", "rule-seconds", "waiting-seconds")
    return {key: value for key, value in metrics.items() if not key.startswith(counts)}


batch = st.lists(replies(), min_size=FUZZED, max_size=FUZZED)
LASTING = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=2_000 // FUZZED, deadline=None, suppress_health_check=LASTING)
@given(fuzzed=batch, families=st.lists(st.sampled_from(list(RULES)), min_size=3, max_size=3))
def test_two_thousand_random_replies(fuzzed: list[tuple[str, Any]], families: list[str]) -> None:
    check(fuzzed, list(dict.fromkeys(families)))


@settings(max_examples=2_000 // FUZZED, deadline=None, suppress_health_check=LASTING)
@given(fuzzed=batch)
def test_two_thousand_where_packed_replies_are_asked_for(fuzzed: list[tuple[str, Any]]) -> None:
    check(fuzzed, ["gmd"], "top-k:0.5")


@pytest.mark.slow
@settings(max_examples=20_000 // FUZZED, deadline=None, suppress_health_check=LASTING)
@given(fuzzed=batch)
def test_twenty_thousand_random_replies(fuzzed: list[tuple[str, Any]]) -> None:
    check(fuzzed, list(RULES))
