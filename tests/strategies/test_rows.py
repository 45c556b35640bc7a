"""What the rows weigh: examples, capped where a minority would come near half of the weight."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    USELESS_COUNTS,
    honest_reply,
    plain_model,
    random_update,
    reply_with,
    same_bits,
    sent_arrays,
)
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_rounds import (
    NODES,
    ONE_OF_EACH,
    SEED,
    flat,
    honest_replies,
    messages_of,
    moved,
    named,
    node,
    rows_of,
    train_round,
)

from fl_bgmd.aggregators import Aggregate, geometric_median, mean
from strategies.rows import example_cap


def weighted_replies(messages: list[Message], examples: Mapping[int, float]) -> list[Message]:
    return [
        honest_reply(
            message,
            random_update(sent_arrays(message), node(message)),
            num_examples=examples.get(node(message), 10),
        )
        for message in messages
    ]


@pytest.mark.parametrize(("name", "rule"), [("mean", mean), ("gmd", geometric_median)])
def test_weights_are_examples_capped_at_their_median(
    name: str, rule: Callable[..., Aggregate]
) -> None:
    examples = {1: 1, 2: 2, 3: 3, 4: 10**18, 5: 0}
    strategy = named(name, weighting="examples")
    messages = messages_of(strategy, plain_model())
    replies = weighted_replies(messages, examples)
    arrays, metrics = strategy.aggregate_train(1, replies)
    capped = torch.tensor([1.0, 2.0, 3.0, 10.0, 0.0, *[10.0] * 5], dtype=torch.float64)
    expected = rule(rows_of(messages, replies), weights=capped)
    assert arrays is not None
    assert metrics is not None
    np.testing.assert_array_equal(flat(arrays), moved(plain_model(), expected.vector))
    assert max(metrics["client-weights"]) < 0.5


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 5.0, 20.0, 600.0, 1e18]), min_size=1, max_size=15),
    st.floats(0, 0.499),
)
def test_no_minority_comes_near_half_of_the_weight(examples: list[float], share: float) -> None:
    n = len(examples)
    hostile = int(share * n)
    cap = example_cap(np.asarray(examples), hostile)
    assert cap <= sorted(examples)[(n - 1) // 2]
    capped = np.sort(np.minimum(examples, cap))
    most = (hostile / n + 0.5) / 2
    assert capped[n - hostile :].sum() <= most * capped.sum() * (1 + 1e-9)


def test_the_cap_is_no_lower_than_it_must_be() -> None:
    # Four of ten may have (0.4 + 0.5) / 2 of the weight: 4 c = 0.45 (15 + 7 c).
    examples = np.array([5.0, 5, 5, 600, 600, 600, 1e18, 1e18, 1e18, 1e18])
    assert example_cap(examples, 4) == pytest.approx(0.45 * 15 / 0.85)
    assert example_cap(examples, 2) == 600.0


def test_examples_of_two_clients_are_capped_at_the_fewer() -> None:
    def two(messages: list[Message]) -> list[Message]:
        replies = honest_replies(messages[:2])
        replies[1].content["metrics"]["num-examples"] = 1e300
        return replies

    _, metrics = train_round(named("mean", weighting="examples"), plain_model(), reply=two)
    assert metrics["client-weights"] == [0.5, 0.5]


def test_examples_do_not_weight_unless_asked() -> None:
    arrays, _ = train_round(
        named("mean"), plain_model(), reply=lambda m: weighted_replies(m, {1: 10**18})
    )
    expected, _ = train_round(
        named("mean"), plain_model(), reply=lambda m: weighted_replies(m, {1: 1})
    )
    assert same_bits(arrays, expected)


def test_all_without_examples_weigh_alike() -> None:
    zero = dict.fromkeys(range(1, NODES + 1), 0)
    arrays, _ = train_round(
        named("mean", weighting="examples"),
        plain_model(),
        reply=lambda m: weighted_replies(m, zero),
    )
    expected, _ = train_round(
        named("mean"), plain_model(), reply=lambda m: weighted_replies(m, zero)
    )
    assert same_bits(arrays, expected)


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
@pytest.mark.parametrize(
    "examples", [{}, *({"num-examples": value} for value in USELESS_COUNTS.values())]
)
def test_weighting_needs_the_number_of_examples(mixing: str, examples: dict[str, Any]) -> None:
    def reply(messages: list[Message]) -> list[Message]:
        bad = reply_with(messages[0], sent_arrays(messages[0]), examples)
        return [bad, *honest_replies(messages[1:])]

    for weighting, accepted in (("uniform", NODES), ("examples", NODES - 1)):
        strategy = named("mean", weighting=weighting, mixing=mixing)
        _, metrics = train_round(strategy, plain_model(), reply=reply)
        assert metrics["accepted"] == accepted
        assert metrics.get("rejected-num-examples", 0) == NODES - accepted


def test_mixing_mixes_the_weights_too() -> None:
    examples = {1: 1, 2: 2, 3: 3}
    strategy = named("mean", weighting="examples", mixing="bucketing")
    messages = messages_of(strategy, plain_model())
    replies = weighted_replies(messages, examples)
    arrays, _ = strategy.aggregate_train(1, replies)
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(SEED))
    weights = torch.tensor([float(examples.get(i, 10)) for i in range(1, NODES + 1)]).double()
    rows = rows_of(messages, replies).double()
    buckets = order.split(2)
    means = torch.stack([rows[b].mean(dim=0) for b in buckets])
    shares = torch.stack([weights[b].mean() for b in buckets])
    expected = (shares / shares.sum()) @ means
    assert arrays is not None
    found = moved(plain_model(), expected)
    np.testing.assert_allclose(flat(arrays), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ONE_OF_EACH if not n.startswith(("mean", "gmd"))])
def test_rules_without_weights_refuse_them(name: str) -> None:
    with pytest.raises(ValueError, match=r"weighting is 'examples' with .*; allowed: uniform"):
        named(name, weighting="examples")
