"""What comes in: malformed replies change nothing, and neither does the order of arrival."""

import functools
import logging
import random
from typing import Any

import pytest
from flower_messages import (
    MALFORMED,
    error_reply,
    honest_reply,
    plain_model,
    random_update,
    reply_with,
    same_bits,
)
from flwr.app import ArrayRecord, Message, MetricRecord
from strategy_rounds import (
    BAD_NODE,
    NODES,
    ONE_OF_EACH,
    honest_replies,
    honest_without_bad,
    messages_of,
    named,
    train_round,
    with_one_bad,
    without_time,
)

from fl_bgmd.aggregators import RULES


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
@pytest.mark.parametrize("partitions", [True, False], ids=["partitions", "nodes"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_order_of_arrival_changes_nothing(name: str, partitions: bool, mixing: str) -> None:
    if name == "fools-gold" and mixing == "bucketing":
        pytest.skip("refused by the constructor")
    results = []
    for seed in (None, 1, 2):
        strategy = named(name, mixing=mixing)
        replies = honest_replies(messages_of(strategy, plain_model()), partitions=partitions)
        if seed is not None:
            random.Random(seed).shuffle(replies)
        results.append(strategy.aggregate_train(1, iter(replies)))
    arrays, metrics = results[0]
    assert arrays is not None
    assert metrics is not None
    for other, other_metrics in results[1:]:
        assert other is not None
        assert other_metrics is not None
        assert same_bits(other, arrays)
        assert without_time(other_metrics) == without_time(metrics)


def test_rows_are_ordered_by_partition_where_node_ids_are_chance() -> None:
    """Krum breaks ties by the order of the rows: the partition decides, not the node."""
    update = random_update(plain_model(), 1)
    results = []
    for partitions in (range(NODES), reversed(range(NODES))):
        strategy = named("bgmd", mixing="bucketing")
        replies = [
            honest_reply(
                message, {k: v * (1 + p) for k, v in update.items()}, partition=p, num_examples=1
            )
            for message, p in zip(messages_of(strategy, plain_model()), partitions, strict=True)
        ]
        results.append(strategy.aggregate_train(1, replies)[0])
    assert results[0] is not None
    assert results[1] is not None
    assert same_bits(results[0], results[1])


@functools.cache
def result_without_bad(name: str) -> tuple[ArrayRecord, MetricRecord]:
    return train_round(named(name), plain_model(), reply=honest_without_bad)


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", RULES)
def test_a_malformed_reply_changes_nothing_to_the_bit(name: str, kind: str) -> None:
    arrays, metrics = train_round(named(name), plain_model(), reply=with_one_bad(kind))
    expected, alone = result_without_bad(name)
    assert same_bits(arrays, expected)
    counts = {
        "accepted": NODES - 1,
        "rejected": 1,
        "missing": 0,
        f"rejected-{MALFORMED[kind].reason}": 1,
    }
    assert {key: metrics[key] for key in counts} == counts
    assert (alone["accepted"], alone["rejected"], alone["missing"]) == (NODES - 1, 0, 1)
    assert without_time(metrics, *counts, "bytes-rejected") == without_time(alone, *counts)


@pytest.mark.parametrize("claim", [0, 3, 2**31 - 1, -1, 1.5, [0], 2**62])
def test_a_claimed_partition_id_gains_nothing(claim: Any) -> None:
    """A rejected reply may claim any place in the order: the honest rows keep theirs."""

    def reply(messages: list[Message]) -> list[Message]:
        replies = honest_replies(messages)
        message = messages[BAD_NODE - 1]
        metrics = {"num-examples": 10, "partition-id": claim}
        replies[BAD_NODE - 1] = reply_with(message, {}, metrics)
        return replies

    arrays, _ = train_round(named("bgmd", mixing="bucketing"), plain_model(), reply=reply)
    expected, _ = train_round(
        named("bgmd", mixing="bucketing"), plain_model(), reply=honest_without_bad
    )
    assert same_bits(arrays, expected)


def test_nine_kinds_at_once_and_one_honest_reply() -> None:
    kinds = ["nan", "missing-key", "two-metric-records", "garbage", "complex64", "error-reply"]
    kinds += ["flattened", "two-array-records", "too-many-metrics"]

    def reply(messages: list[Message]) -> list[Message]:
        bad = [MALFORMED[kind].build(m) for kind, m in zip(kinds, messages, strict=False)]
        return [*bad, *honest_replies(messages[len(kinds) :])]

    arrays, metrics = train_round(named("mean"), plain_model(), reply=reply)
    expected, _ = train_round(
        named("mean"), plain_model(), reply=lambda m: honest_replies(m[len(kinds) :])
    )
    assert same_bits(arrays, expected)
    assert metrics["accepted"] == 1
    assert metrics["rejected"] == len(kinds)
    for kind in kinds:
        assert metrics[f"rejected-{MALFORMED[kind].reason}"] == 1


def test_a_node_that_replies_twice_counts_once() -> None:
    def reply(messages: list[Message]) -> list[Message]:
        replies = honest_replies(messages)
        again = honest_reply(messages[2], random_update(plain_model(), 77), partition=2)
        return [*replies, again, again]

    arrays, metrics = train_round(named("gmd"), plain_model(), reply=reply)
    expected, _ = train_round(named("gmd"), plain_model())
    assert same_bits(arrays, expected)
    assert metrics["accepted"] == NODES
    assert metrics["rejected-duplicate"] == 2
    assert metrics["missing"] == 0


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_replies_keep_the_model(name: str) -> None:
    arrays, metrics = train_round(named(name), plain_model(), reply=lambda messages: [])
    assert same_bits(arrays, plain_model())
    counts = {"accepted": 0, "rejected": 0, "missing": NODES, "bytes-up": 0}
    assert without_time(metrics, "bytes-down") == counts
    assert metrics["bytes-down"] == NODES * sum(len(a.data) for a in arrays.values())


def test_only_bad_replies_keep_the_model() -> None:
    arrays, metrics = train_round(
        named("bgmd"), plain_model(), reply=lambda messages: [error_reply(m) for m in messages]
    )
    assert same_bits(arrays, plain_model())
    assert metrics["rejected-error"] == NODES


def test_each_rejection_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flwr"):
        train_round(named("bgmd"), plain_model(), reply=with_one_bad("flattened"))
    [record] = caplog.records
    assert f"node {BAD_NODE} (shape)" in record.getMessage()
    assert "'weight'" in record.getMessage()
