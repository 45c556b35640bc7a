"""What clients measured: combined so that none bends it, and none speaks for the server."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    MALFORMED,
    USELESS_METRICS,
    error_reply,
    honest_reply,
    plain_model,
    random_update,
    reply_with,
    same_bits,
    sent_arrays,
    train_message,
)
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from strategy_rounds import (
    NODES,
    honest_replies,
    named,
    node,
    silent_grid,
    train_round,
    with_one_bad,
)

from fl_bgmd.aggregators import RULES
from fl_bgmd.strategies import RobustStrategy


def test_metrics_are_medians_and_partition_ids_are_no_metric() -> None:
    def reply(messages: list[Message]) -> list[Message]:
        losses = [1e30, -1e30, 1e30, *map(float, range(7))]
        return [
            honest_reply(m, partition=i, metrics={"loss": loss, "list": [loss, -1.0]})
            for i, (m, loss) in enumerate(zip(messages, losses, strict=True))
        ]

    _, metrics = train_round(named("mean"), plain_model(), reply=reply)
    assert metrics["loss"] == 3.5
    assert metrics["list"] == [3.5, -1.0]
    assert "partition-id" not in metrics
    assert "num-examples" not in metrics


def test_clients_cannot_forge_the_diagnostics() -> None:
    forged = {
        "accepted": 99,
        "rejected": -1,
        "missing": 99,
        "update-norm": -1.0,
        "client-weights": [0.0],
        "aggregation-seconds": -5.0,
    }
    _, metrics = train_round(
        named("mean"),
        plain_model(),
        reply=lambda ms: [honest_reply(m, metrics=forged) for m in ms],
    )
    assert (metrics["accepted"], metrics["rejected"], metrics["missing"]) == (NODES, 0, 0)
    assert metrics["update-norm"] == 0.0
    assert metrics["aggregation-seconds"] >= 0
    assert len(metrics["client-weights"]) == NODES


@pytest.mark.parametrize("name", ["gmd", "bgmd"])
def test_clients_cannot_speak_for_the_server(name: str) -> None:
    """A metric of a client's by the name of one of the round's own neither stays nor ends it."""
    strategy = named(name, min_valid_replies=2)

    def one(messages: list[Message]) -> list[Message]:
        [reply] = honest_replies(messages[:1])
        reply.content["metrics"] = MetricRecord(
            {"client-weights": [1.0, 2.0, 3.0], "diverged": 1, "rejected-shape": 7, "latency": 0.5}
        )
        return [reply]

    model = plain_model()
    arrays, metrics = train_round(strategy, model, reply=one)
    assert same_bits(arrays, model)
    assert metrics["latency"] == 0.5
    assert not {"client-weights", "diverged", "rejected-shape"} & set(metrics)


def evaluation_replies(values: Mapping[int, Any]) -> tuple[RobustStrategy, list[Message]]:
    strategy = named("bgmd")
    messages = strategy.configure_evaluate(1, plain_model(), ConfigRecord(), silent_grid())
    replies = []
    for message in messages:
        metrics = {"num-examples": 5, "accuracy": 0.1 * node(message)}
        metrics |= values.get(node(message), {})
        replies.append(Message(RecordDict({"m": MetricRecord(metrics)}), reply_to=message))
    return strategy, replies


def test_evaluation_metrics_are_medians() -> None:
    strategy, replies = evaluation_replies({1: {"accuracy": 1e9}, 2: {"accuracy": -1e9}})
    # 1e9 and -1e9 take the ends: of 0.3 .. 1.0 and those, the middle is that of 0.6 and 0.7.
    metrics = strategy.aggregate_evaluate(1, replies)
    assert metrics is not None
    assert metrics["accuracy"] == pytest.approx(0.65)
    random.Random(1).shuffle(replies)
    assert strategy.aggregate_evaluate(1, replies) == metrics


def test_bad_evaluation_replies_are_left_out() -> None:
    strategy, replies = evaluation_replies({1: {"accuracy": np.nan}, 2: {"num-examples": -1}})
    message = train_message(plain_model(), 11, message_type="evaluate")
    extra = [error_reply(message), MALFORMED["empty-content"].build(message), replies[4]]
    metrics = strategy.aggregate_evaluate(1, [*extra, *replies])
    assert metrics is not None
    assert metrics["accuracy"] == pytest.approx(0.6)  # of 0.2 to 1.0: the count says nothing
    assert strategy.aggregate_evaluate(1, extra[:2]) is None
    assert strategy.aggregate_evaluate(1, []) is None


# ----------------------------------------------------------------------- the user's function


def count_clients(contents: list[RecordDict], key: str) -> MetricRecord:
    [first] = contents[0].metric_records.values()
    return MetricRecord({"clients": len(contents), "first": first[key]})


def test_metrics_can_be_combined_by_the_users_function() -> None:
    strategy = named(
        "mean", train_metrics_aggr_fn=count_clients, evaluate_metrics_aggr_fn=count_clients
    )
    _, metrics = train_round(strategy, plain_model(), reply=with_one_bad("nan"))
    assert (metrics["clients"], metrics["first"]) == (NODES - 1, 10)
    assert metrics["accepted"] == NODES - 1
    _, replies = evaluation_replies({})
    assert strategy.aggregate_evaluate(1, replies) == {"clients": NODES, "first": 5}
    _, metrics = train_round(strategy, plain_model(), reply=lambda messages: [])
    assert "clients" not in metrics


def test_an_accepted_reply_cannot_break_the_users_function() -> None:
    """A combiner reads ``num-examples`` from every reply: one without it counts as 1 there too."""

    def reply(messages: list[Message]) -> list[Message]:
        bad = reply_with(messages[0], sent_arrays(messages[0]), {"loss": 1.0})
        return [bad, *honest_replies(messages[1:])]

    def weighted(contents: list[RecordDict], key: str) -> MetricRecord:
        metrics = [next(iter(content.metric_records.values())) for content in contents]
        return MetricRecord({"total": sum(float(m[key]) for m in metrics)})

    strategy = named("mean", train_metrics_aggr_fn=weighted)
    _, metrics = train_round(strategy, plain_model(), reply=reply)
    assert metrics["accepted"] == NODES
    assert metrics["total"] == 1 + sum(10 * i for i in range(2, NODES + 1))


@pytest.mark.parametrize("kind", USELESS_METRICS)
def test_a_combiner_sees_only_replies_whose_metrics_are_finite(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(messages: list[Message]) -> list[Message]:
        bad = reply_with(messages[0], sent_arrays(messages[0]), USELESS_METRICS[kind])
        return [bad, *honest_replies(messages[1:])]

    def count(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"clients": len(contents)})

    _, metrics = train_round(named("mean", train_metrics_aggr_fn=count), plain_model(), reply=reply)
    assert (metrics["accepted"], metrics["clients"]) == (NODES, NODES - 1)
    assert metrics["dropped-metrics"] == 1
    _, metrics = train_round(
        named("mean", train_metrics_aggr_fn=count),
        plain_model(),
        reply=lambda m: [reply_with(one, sent_arrays(one), USELESS_METRICS[kind]) for one in m],
    )
    assert (metrics["accepted"], "clients" in metrics) == (NODES, False)
    assert "no reply has only finite metrics" in caplog.text


# -------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("name", RULES)
def test_a_nan_loss_costs_an_honest_client_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its update moves the model as if it had not reported the loss at all."""

    def replies(loss: float | None) -> Callable[[list[Message]], list[Message]]:
        given = {} if loss is None else {"lo\nss": loss, "losses": [1.0, loss]}
        return lambda messages: [
            honest_reply(message, random_update(plain_model(), i), metrics=given if i == 2 else {})
            for i, message in enumerate(messages)
        ]

    arrays, metrics = train_round(named(name), plain_model(), reply=replies(np.nan))
    expected, _ = train_round(named(name), plain_model(), reply=replies(None))
    assert same_bits(arrays, expected)
    assert (metrics["accepted"], metrics["rejected"]) == (NODES, 0)
    assert metrics["dropped-metrics"] == 2
    told = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert told == [
        "of node 3: metric 'lo ss' is not finite: it is dropped, the rest of the reply counts"
    ]


def test_a_dropped_metric_is_told_once_a_run_and_counted_when_evaluating_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = named("gmd")
    for _ in range(2):
        _, replies = evaluation_replies({3: {"loss": np.nan}})
        metrics = strategy.aggregate_evaluate(1, replies)
        assert metrics is not None
        assert metrics["dropped-metrics"] == 1
    assert caplog.text.count("is dropped") == 1


def test_a_metric_with_the_servers_name_does_not_hush_up_one_that_is_not_finite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def replies(messages: list[Message]) -> list[Message]:
        return [
            honest_reply(
                message,
                random_update(plain_model(), i),
                metrics={"gap": 9.0} | ({"loss": np.nan} if i == 2 else {}),
            )
            for i, message in enumerate(messages)
        ]

    train_round(named("mean"), plain_model(), reply=replies)
    assert "the clients' metrics ['gap'] are dropped" in caplog.text
    assert "metric 'loss' is not finite: it is dropped" in caplog.text
