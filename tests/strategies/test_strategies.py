"""Strategies: from messages to a rule and back, whatever the clients send.

The rules themselves are tested elsewhere; here each strategy must do exactly what its rule does
to the rows of the accepted replies, and nothing else.
"""

import functools
import importlib
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    MALFORMED,
    USELESS_COUNTS,
    USELESS_METRICS,
    batch_norm_model,
    error_reply,
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    replace_values,
    reply_with,
    same_bits,
    sent_arrays,
    shrunk,
    to_numpy,
    to_record,
    train_message,
    update_row,
)
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import strategies as source_package
from fl_bgmd.aggregators import (
    Aggregate,
    BlockMemory,
    block_geometric_median,
    bucketing,
    build_rule,
    bulyan,
    centered_clipping,
    coordinate_median,
    divide_and_conquer,
    flame,
    fools_gold,
    gap_filter,
    geometric_median,
    krum,
    mean,
    multi_krum,
    nearest_neighbor_mixing,
    norm_clip,
    norm_threshold,
    sign_guard,
    spectral_filter,
    trimmed_mean,
)
from fl_bgmd.mods import ByzantineMod
from fl_bgmd.strategies import (
    BGMD,
    CMD,
    FLAME,
    GMD,
    Bulyan,
    CenteredClipping,
    DnC,
    FLTrust,
    FoolsGold,
    GapFilter,
    Krum,
    Mean,
    MultiKrum,
    NormClipping,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    Round,
    SignGuard,
    TrimmedMean,
)
from simulations.grid import InProcessGrid
from strategies.rows import example_cap

NODES = 10
FRACTION = 0.2
SEED = 11

Rule = Callable[[Tensor, torch.Generator], Aggregate]


STRATEGIES: dict[str, tuple[type[RobustStrategy], dict[str, Any], Rule]] = {
    "mean": (Mean, {}, lambda rows, _: mean(rows)),
    "bgmd": (
        BGMD,
        {"block_fraction": 0.4, "min_block_size": 1},
        lambda rows, generator: block_geometric_median(
            rows, block_fraction=0.4, min_block_size=1, generator=generator
        ),
    ),
    "bgmd-paper": (
        BGMD,
        {
            "selection": "top-k",
            "score": "squared-norm",
            "memory": "mean",
            **{"block_fraction": 0.5, "min_block_size": 1},
        },
        lambda rows, _: block_geometric_median(
            rows,
            selection="top-k",
            score="squared-norm",
            memory_rule="mean",
            block_fraction=0.5,
            min_block_size=1,
        ),
    ),
    "gmd": (GMD, {}, lambda rows, _: geometric_median(rows)),
    "gmd-weiszfeld": (
        GMD,
        {"solver": "weiszfeld", "tol": 1e-4},
        lambda rows, _: geometric_median(rows, solver="weiszfeld", tol=1e-4),
    ),
    "cmd": (CMD, {}, lambda rows, _: coordinate_median(rows)),
    "trimmed-mean": (TrimmedMean, {}, lambda rows, _: trimmed_mean(rows, trim_fraction=FRACTION)),
    "trimmed-mean-own": (
        TrimmedMean,
        {"trim_fraction": 0.4},
        lambda rows, _: trimmed_mean(rows, trim_fraction=0.4),
    ),
    "norm-threshold": (
        NormThreshold,
        {"order": 1.5},
        lambda rows, _: norm_threshold(rows, drop_fraction=FRACTION, order=1.5),
    ),
    "norm-threshold-own": (
        NormThreshold,
        {"drop_fraction": 0.5},
        lambda rows, _: norm_threshold(rows, drop_fraction=0.5),
    ),
    "robust-filter": (
        RobustFilter,
        {},
        lambda rows, _: spectral_filter(rows, byzantine_fraction=FRACTION),
    ),
    "robust-filter-sigma": (
        RobustFilter,
        {"sigma0": 0.3},
        lambda rows, _: spectral_filter(rows, byzantine_fraction=FRACTION, sigma0=0.3),
    ),
    "robust-filter-own": (
        RobustFilter,
        {"method": "saddle", "sigma0": 0.5},
        lambda rows, _: spectral_filter(
            rows, byzantine_fraction=FRACTION, sigma0=0.5, method="saddle"
        ),
    ),
    "krum": (Krum, {}, lambda rows, _: krum(rows, byzantine_fraction=FRACTION)),
    "multi-krum": (MultiKrum, {}, lambda rows, _: multi_krum(rows, byzantine_fraction=FRACTION)),
    "multi-krum-own": (
        MultiKrum,
        {"num_selected": 3},
        lambda rows, _: multi_krum(rows, byzantine_fraction=FRACTION, num_selected=3),
    ),
    "centered-clipping": (CenteredClipping, {}, lambda rows, _: centered_clipping(rows)),
    "centered-clipping-own": (
        CenteredClipping,
        {"radius": 0.5, "iterations": 2},
        lambda rows, _: centered_clipping(rows, radius=0.5, iterations=2),
    ),
    "bulyan": (Bulyan, {}, lambda rows, _: bulyan(rows, byzantine_fraction=FRACTION)),
    "norm-clip": (NormClipping, {}, lambda rows, _: norm_clip(rows)),
    "norm-clip-own": (NormClipping, {"radius": 0.5}, lambda rows, _: norm_clip(rows, radius=0.5)),
    "dnc": (
        DnC,
        {"coordinates": 5, "iterations": 3},
        lambda rows, generator: divide_and_conquer(
            rows,
            byzantine_fraction=FRACTION,
            generator=generator,
            coordinates=5,
            iterations=3,
        ),
    ),
    "gap-filter": (
        GapFilter,
        {"gap": 1.1, "far": 3.0},
        lambda rows, _: gap_filter(rows, byzantine_fraction=FRACTION, gap=1.1, far=3.0),
    ),
    "sign-guard": (
        SignGuard,
        {"coordinate_share": 0.5},
        lambda rows, generator: sign_guard(rows, generator=generator, coordinate_share=0.5),
    ),
    "fools-gold": (FoolsGold, {}, lambda rows, _: fools_gold(rows)),
    "flame": (
        FLAME,
        {"noise": 0.1},
        lambda rows, generator: flame(rows, generator=generator, noise=0.1),
    ),
}

ONE_OF_EACH_CLASS = [
    "mean",
    "bgmd",
    "gmd",
    "cmd",
    "trimmed-mean",
    "norm-threshold",
    "robust-filter",
    "krum",
    "multi-krum",
    "centered-clipping",
    *("bulyan", "norm-clip", "dnc", "gap-filter", "sign-guard", "fools-gold", "flame"),
]
ONE_OF_EACH = [name for name in STRATEGIES if not name.endswith("-own")]
MEMORIES = ("robust", "mean", "per-client", "none")
SMALL_BLOCKS = {"block_fraction": 0.3, "min_block_size": 1}
STATEFUL: dict[str, tuple[type[RobustStrategy], dict[str, Any]]] = {
    **{
        f"bgmd-{rule}": (BGMD, {"memory": rule, "block_fraction": 0.3, "min_block_size": 1})
        for rule in MEMORIES
    },
    "centered-clipping": (CenteredClipping, {}),
    "fools-gold": (FoolsGold, {}),
    "centering": (GMD, {"mixing": "centering+clipping:factor=0.5"}),
    "momentum": (GMD, {"server_momentum": 0.9}),
    "adam": (GMD, {"server_optimizer": "adam", "server_learning_rate": 0.1}),
    "momentum-and-memory": (
        BGMD,
        {"server_momentum": 0.5, "block_fraction": 0.3, "min_block_size": 1},
    ),
    "bucketing": (CMD, {"mixing": "bucketing"}),
}


def make(cls: type[RobustStrategy], **options: Any) -> RobustStrategy:
    given = {"byzantine_fraction": FRACTION, "seed": SEED, "device": "cpu", **options}
    return cls(**given)


def named(name: str, **options: Any) -> RobustStrategy:
    cls, own, _ = STRATEGIES[name]
    return make(cls, **{**own, **options})


def silent_grid(nodes: int = NODES) -> InProcessGrid:
    """Nodes to send to; the tests write their replies."""
    return InProcessGrid(ClientApp(), nodes, {})


def messages_of(
    strategy: RobustStrategy, arrays: ArrayRecord, server_round: int = 1, nodes: int = NODES
) -> list[Message]:
    config = ConfigRecord()
    return list(strategy.configure_train(server_round, arrays, config, silent_grid(nodes)))


def node(message: Message) -> int:
    """Return the node that a train message is for."""
    return message.metadata.dst_node_id


def honest_replies(
    messages: Iterable[Message], seed: int = 0, *, partitions: bool = True
) -> list[Message]:
    """One honest reply to each message, the update drawn for its node."""
    return [
        honest_reply(
            message,
            random_update(sent_arrays(message), [seed, node(message)]),
            num_examples=10 * node(message),
            partition=node(message) - 1 if partitions else None,
            metrics={"loss": 1.0 / node(message)},
        )
        for message in messages
    ]


def rows_of(messages: Iterable[Message], replies: Iterable[Message]) -> Tensor:
    by_node = {node(message): message for message in messages}
    rows = [update_row(by_node[reply.metadata.src_node_id], reply) for reply in replies]
    return torch.from_numpy(np.stack(rows))


def flat(arrays: ArrayRecord) -> NDArray[Any]:
    return np.concatenate([value.ravel() for value in to_numpy(arrays).values()])


def moved(arrays: ArrayRecord, update: Tensor, learning_rate: float = 1.0) -> NDArray[Any]:
    return flat(arrays) - learning_rate * update.numpy()


def train_round(
    strategy: RobustStrategy,
    arrays: ArrayRecord,
    server_round: int = 1,
    reply: Callable[[list[Message]], Iterable[Message]] = honest_replies,
    nodes: int = NODES,
) -> tuple[ArrayRecord, MetricRecord]:
    result, metrics = strategy.aggregate_train(
        server_round, reply(messages_of(strategy, arrays, server_round, nodes))
    )
    assert result is not None
    assert metrics is not None
    return result, metrics


def without_time(metrics: MetricRecord, *ignored: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.endswith("-seconds") and key not in ignored
    }


# ------------------------------------------------------------------------ the rule, exactly


@pytest.mark.parametrize("learning_rate", [1.0, 0.25])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_moves_by_the_rule_of_the_rows(name: str, learning_rate: float) -> None:
    strategy = named(name, server_learning_rate=learning_rate)
    model = plain_model()
    messages = messages_of(strategy, model)
    replies = honest_replies(messages)
    arrays, metrics = strategy.aggregate_train(1, replies)
    expected = STRATEGIES[name][2](rows_of(messages, replies), torch.Generator().manual_seed(SEED))
    assert arrays is not None
    assert metrics is not None
    np.testing.assert_array_equal(flat(arrays), moved(model, expected.vector, learning_rate))
    assert metrics["accepted"] == NODES
    assert metrics["rejected"] == 0
    assert metrics["missing"] == 0
    assert metrics["update-norm"] == pytest.approx(float(expected.vector.double().norm()))
    if expected.weights is not None:
        np.testing.assert_allclose(metrics["client-weights"], expected.weights)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_round_on_the_in_process_grid(name: str) -> None:
    """The same through ``start``: real ClientApp, real messages, evaluation at the end."""
    model = regression_model()
    grid = InProcessGrid(regression_app(), NODES, {})
    result = named(name).start(grid, model, num_rounds=1)
    by_hand = named(name)
    messages = messages_of(by_hand, model)
    replies = list(InProcessGrid(regression_app(), NODES, {}).send_and_receive(messages))
    expected = STRATEGIES[name][2](rows_of(messages, replies), torch.Generator().manual_seed(SEED))
    np.testing.assert_array_equal(flat(result.arrays), moved(model, expected.vector))
    assert regression_error(result.arrays) < regression_error(model)
    assert result.train_metrics_clientapp[1]["accepted"] == NODES
    assert result.evaluate_metrics_clientapp[1]["loss"] > 0


# ------------------------------------------------------------- with data of the server's own


@pytest.mark.parametrize("spec", ["", "monna", "fltrust+clipping"])
def test_a_rule_is_given_the_update_of_the_servers_own_data(spec: str) -> None:
    options = {"byzantine_fraction": 0.4, "root_update": shrunk, "seed": SEED, "device": "cpu"}
    strategy = RobustStrategy(spec, **options) if spec else FLTrust(**options)
    model, root = plain_model(), 0.5 * torch.from_numpy(flat(plain_model()))
    for server_round in (1, 2):  # of the model of its round
        messages = messages_of(strategy, model, server_round)
        replies = honest_replies(messages, server_round)
        rows = rows_of(messages, replies)
        expected = build_rule(spec or "fltrust", byzantine_fraction=0.4)(rows, root=root)
        arrays, _ = strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        np.testing.assert_array_equal(flat(arrays), moved(model, expected.vector))
        model, root = arrays, 0.5 * torch.from_numpy(flat(arrays))


def test_the_root_goes_where_rows_go_coordinates_and_ties() -> None:
    shared = FLTrust(
        root_update=shrunk,
        compressor="rand-k:0.5",
        shared_coordinates=True,
        seed=SEED,
        device="cpu",
    )
    model = plain_model()
    messages_of(shared, model)
    sent = shared._sent
    assert sent is not None
    assert sent.coordinates is not None
    row = sent.root_row({}, torch.device("cpu"))
    assert row is not None
    expected = 0.5 * flat(model)[sent.coordinates]
    np.testing.assert_array_equal(row.numpy(), expected)
    first = next(iter(to_numpy(model).values()))
    tied = to_record({"a.weight": first, "b.weight": first})
    strategy = FLTrust(root_update=shrunk, seed=SEED, device="cpu")
    messages_of(strategy, tied)
    assert strategy._session.sent is not None
    merged = strategy._session.sent.root_row({"b.weight": "a.weight"}, torch.device("cpu"))
    assert merged is not None
    np.testing.assert_array_equal(merged.numpy(), 0.5 * first.ravel())


def test_mixings_are_given_the_last_aggregate() -> None:
    strategy = RobustStrategy("mean+centering+arc", byzantine_fraction=0.4, seed=SEED, device="cpu")
    rule, model, last = (
        build_rule("mean+centering+arc", byzantine_fraction=0.4),
        plain_model(),
        None,
    )
    for server_round in (1, 2, 3):
        messages = messages_of(strategy, model, server_round)
        replies = honest_replies(messages, server_round)
        expected = rule(rows_of(messages, replies), last=last)
        nodes = [reply.metadata.src_node_id for reply in replies]
        seen = strategy.preview(rows_of(messages, replies), nodes, [1.0] * NODES, 2)
        again = rule(rows_of(messages, replies), last=expected.vector).vector
        torch.testing.assert_close(seen.float(), expected.vector + again)
        arrays, _ = strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        np.testing.assert_array_equal(flat(arrays), moved(model, expected.vector))
        model, last = arrays, expected.vector
    with pytest.raises(ValueError, match="what it remembers belongs to coordinates"):
        RobustStrategy("mean+centering", compressor="rand-k:0.5", shared_coordinates=True)


def test_a_subclass_sees_the_root() -> None:
    class Follows(RobustStrategy):
        def aggregate(self, current: Round) -> Aggregate:
            assert current.root is not None
            return Aggregate(current.root)

    strategy = Follows(root_update=shrunk, seed=SEED, device="cpu")
    arrays, _ = train_round(strategy, plain_model())
    np.testing.assert_array_equal(flat(arrays), 0.5 * flat(plain_model()))


def test_roots_that_are_refused() -> None:
    message = "root_update is None with FLTrust; allowed: a function from the model's arrays and"
    with pytest.raises(ValueError, match=message):
        FLTrust(seed=SEED)
    with pytest.raises(ValueError, match="root_update is None with fltrust\\+clipping; allowed"):
        RobustStrategy("fltrust+clipping")
    with pytest.raises(ValueError, match="root_update is given with GMD, which asks for no root"):
        GMD(root_update=shrunk)
    with pytest.raises(ValueError, match="root_update is 3; allowed: a function from the model"):
        FLTrust(root_update=3)
    strategy = FLTrust(root_update=lambda *_: to_record({"x": np.ones(2, np.float32)}), seed=SEED)
    with pytest.raises(ValueError, match=r"root_update returned arrays \['x'\]; allowed: those of"):
        messages_of(strategy, plain_model())


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
@pytest.mark.parametrize("name", ["mean", "gmd", "bgmd", "cmd", "krum"])
def test_mixing_comes_before_the_rule(name: str, mixing: str) -> None:
    strategy = named(name, mixing=mixing)
    model = plain_model()
    messages = messages_of(strategy, model)
    replies = honest_replies(messages)
    generator = torch.Generator().manual_seed(SEED)
    rows = rows_of(messages, replies)
    if mixing == "nearest-neighbor":
        rows = nearest_neighbor_mixing(rows, byzantine_fraction=FRACTION)
    elif mixing == "bucketing":
        rows = bucketing(rows, bucket_size=2, generator=generator)
    arrays, metrics = strategy.aggregate_train(1, replies)
    expected = STRATEGIES[name][2](rows, generator)
    assert arrays is not None
    assert metrics is not None
    np.testing.assert_array_equal(flat(arrays), moved(model, expected.vector))
    if expected.weights is not None:
        assert len(metrics["client-weights"]) == NODES
        assert sum(metrics["client-weights"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["mean", "gmd"])
def test_client_weights_are_those_of_the_clients_own_updates(name: str) -> None:
    """Also behind a mixing: their sum of the rows is the update."""
    for mixing in ("none", "nearest-neighbor", "bucketing"):
        strategy = named(name, mixing=mixing)
        messages = messages_of(strategy, plain_model())
        replies = honest_replies(messages)
        arrays, metrics = strategy.aggregate_train(1, replies)
        assert arrays is not None
        assert metrics is not None
        weights = torch.tensor(metrics["client-weights"], dtype=torch.float64)
        update = weights @ rows_of(messages, replies).double()
        expected = moved(plain_model(), update)
        np.testing.assert_allclose(flat(arrays), expected, rtol=1e-5, atol=1e-6)


def test_server_momentum_by_hand() -> None:
    strategy = named("mean", server_momentum=0.9, server_learning_rate=0.5)
    arrays, expected, velocity = plain_model(), flat(plain_model()), None
    for server_round in (1, 2, 3):
        messages = messages_of(strategy, arrays, server_round)
        replies = honest_replies(messages, server_round)
        update = mean(rows_of(messages, replies)).vector
        velocity = update if velocity is None else 0.9 * velocity + update
        expected = expected - 0.5 * velocity.numpy()
        result, _ = strategy.aggregate_train(server_round, replies)
        assert result is not None
        arrays = result
        np.testing.assert_allclose(flat(arrays), expected, rtol=1e-6)


def test_the_centre_of_clipping_is_the_previous_aggregate() -> None:
    strategy, arrays, center = named("centered-clipping-own"), plain_model(), None
    for server_round in (1, 2):
        messages = messages_of(strategy, arrays, server_round)
        replies = honest_replies(messages, server_round)
        center = centered_clipping(
            rows_of(messages, replies), radius=0.5, iterations=2, center=center
        ).vector
        before = arrays
        result, _ = strategy.aggregate_train(server_round, replies)
        assert result is not None
        arrays = result
        np.testing.assert_array_equal(flat(arrays), moved(before, center))


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_memory_of_the_block_rule_is_carried_on(memory: str) -> None:
    strategy = make(BGMD, memory=memory, block_fraction=0.3, min_block_size=1)
    generator, arrays, carried = torch.Generator().manual_seed(SEED), plain_model(), None
    for server_round in (1, 2, 3):
        messages = messages_of(strategy, arrays, server_round)
        replies = honest_replies(messages, server_round)
        expected = block_geometric_median(
            rows_of(messages, replies),
            carried,
            memory_rule=memory,
            block_fraction=0.3,
            min_block_size=1,
            generator=generator,
        )
        carried, before = expected.memory, arrays
        result, metrics = strategy.aggregate_train(server_round, replies)
        assert result is not None
        assert metrics is not None
        arrays = result
        np.testing.assert_array_equal(flat(arrays), moved(before, expected.vector))
        assert metrics["residual-ratio"] == expected.residual_ratio
        assert ("memory-norm" in metrics) == (memory != "none")


def test_per_client_memory_follows_the_node() -> None:
    """A client that stays away keeps its memory; one that is new has none."""
    strategy = make(BGMD, memory="per-client", block_fraction=0.3, min_block_size=1)
    generator, arrays = torch.Generator().manual_seed(SEED), plain_model()
    carried: dict[int, Tensor] = {}
    for server_round, present in ((1, {1, 2, 3, 4}), (2, {3, 4, 5}), (3, {1, 3, 5, 9})):
        messages = [m for m in messages_of(strategy, arrays, server_round) if node(m) in present]
        replies = honest_replies(messages, server_round)
        nodes = sorted(present)
        memory = None
        if carried:
            rows = [carried.get(i, torch.zeros(16)) for i in nodes]
            memory = BlockMemory(torch.stack(rows))
        expected = block_geometric_median(
            rows_of(messages, replies),
            memory,
            memory_rule="per-client",
            block_fraction=0.3,
            min_block_size=1,
            generator=generator,
        )
        assert expected.memory is not None
        carried |= dict(zip(nodes, expected.memory.vector, strict=True))
        before = arrays
        result, _ = strategy.aggregate_train(server_round, replies)
        assert result is not None
        arrays = result
        np.testing.assert_array_equal(flat(arrays), moved(before, expected.vector))


# -------------------------------------------------------------------------- arrival order


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


# ---------------------------------------------------------------------- malformed replies

BAD_NODE = 4


@functools.cache
def usual_replies() -> tuple[Message, ...]:
    """Honest replies to a round on the plain model, made once."""
    return tuple(honest_replies(messages_of(named("mean"), plain_model())))


def with_one_bad(kind: str) -> Callable[[list[Message]], list[Message]]:
    def reply(messages: list[Message]) -> list[Message]:
        replies = list(usual_replies())
        position = [node(message) for message in messages].index(BAD_NODE)
        replies[position] = MALFORMED[kind].build(messages[position])
        return replies

    return reply


def honest_without_bad(messages: list[Message]) -> list[Message]:
    return [reply for reply in usual_replies() if reply.metadata.src_node_id != BAD_NODE]


@functools.cache
def result_without_bad(name: str) -> tuple[ArrayRecord, MetricRecord]:
    return train_round(named(name), plain_model(), reply=honest_without_bad)


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
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


def test_too_few_valid_replies_keep_the_model_and_the_run_goes_on() -> None:
    strategy = named("gmd", min_valid_replies=5)
    arrays, metrics = train_round(strategy, plain_model(), 1, lambda m: honest_replies(m[:4]))
    assert same_bits(arrays, plain_model())
    assert (metrics["accepted"], metrics["missing"]) == (4, NODES - 4)
    arrays, metrics = train_round(strategy, arrays, 2, lambda m: honest_replies(m[:5]))
    assert not same_bits(arrays, plain_model())
    assert metrics["accepted"] == 5


def test_a_round_that_is_skipped_leaves_no_trace_in_the_state() -> None:
    straight, skipping = (named("bgmd", server_momentum=0.5, min_valid_replies=5) for _ in range(2))
    expected, _ = train_round(straight, plain_model(), 1)
    train_round(skipping, plain_model(), 1, lambda messages: honest_replies(messages[:4]))
    arrays, _ = train_round(skipping, plain_model(), 1)
    assert same_bits(arrays, expected)


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
@pytest.mark.parametrize("name", [*STRATEGIES, *STATEFUL])
def test_any_number_of_replies_will_do(name: str, mixing: str) -> None:
    """Clients die and come back: every strategy must live with what is left in a round."""
    if name in ("bgmd-per-client", "fools-gold") and mixing == "bucketing":
        pytest.skip("refused by the constructor")
    cls, own = (STRATEGIES | STATEFUL)[name][:2]
    options = {**own, "mixing": mixing, "min_valid_replies": 1}
    strategy, arrays = make(cls, **options), plain_model()
    for server_round, count in enumerate((10, 1, 2, 3, 0, 4, 1, 10), start=1):
        before = arrays
        arrays, metrics = train_round(
            strategy,
            arrays,
            server_round,
            lambda m, seed=server_round, count=count: honest_replies(m[:count], seed),
        )
        assert metrics["accepted"] == count
        assert np.isfinite(flat(arrays)).all()
        assert same_bits(arrays, before) == (count == 0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_identical_replies_are_followed_or_kept(name: str) -> None:
    """No spread at all: no rule may divide by it."""
    update = random_update(plain_model(), 8)
    for size in (0.0, 1.0):
        arrays, _ = train_round(
            named(name, block_fraction=1.0) if name == "bgmd" else named(name),
            plain_model(),
            reply=lambda ms, size=size: [
                honest_reply(m, {k: size * v for k, v in update.items()}) for m in ms
            ],
        )
        assert np.isfinite(flat(arrays)).all()
        if size == 0.0:
            assert same_bits(arrays, plain_model())


# --------------------------------------------------------------- hostile and finite replies


def huge_replies(
    messages: list[Message], server_round: int, value: float, hostile: int = 4
) -> list[Message]:
    """Honest replies but for ``hostile`` nodes, which send the largest values that pass."""
    replies = honest_replies(messages, server_round)
    for position in range(hostile):
        message = messages[(position + server_round) % len(messages)]
        sign = 1 if (position + server_round) % 3 else -1
        arrays = {
            key: np.full(array.shape, sign * value, dtype=array.dtype)
            for key, array in sent_arrays(message).items()
        }
        metrics = {"num-examples": 10**18, "loss": sign * value}
        replies[(position + server_round) % len(messages)] = reply_with(message, arrays, metrics)
    return replies


@pytest.mark.parametrize(
    ("dtype", "value", "momentum"),
    [("float32", 1.5e38, 0.0), ("float32", 1.5e38, 0.9), ("float64", 8e307, 0.9)],
)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, *(f"bgmd-{rule}" for rule in MEMORIES)])
def test_huge_finite_replies_never_end_the_run(
    name: str, dtype: str, value: float, momentum: float
) -> None:
    """Ten rounds, four of ten hostile: no exception, no warning, a finite model."""
    cls, own = (STRATEGIES | STATEFUL)[name][:2]
    strategy, arrays = make(cls, **{**own, "server_momentum": momentum}), plain_model(dtype=dtype)
    for server_round in range(1, 11):
        arrays, metrics = train_round(
            strategy, arrays, server_round, lambda m, r=server_round: huge_replies(m, r, value)
        )
        assert metrics["accepted"] + metrics["rejected"] == NODES
        assert np.isfinite(flat(arrays)).all()


@pytest.mark.parametrize("name", ["bgmd-robust", "bgmd-none", "gmd", "cmd"])
def test_robust_rules_stay_near_the_honest_model_under_huge_replies(name: str) -> None:
    cls, own = (STRATEGIES | STATEFUL)[name][:2]
    strategy, arrays = make(cls, **own, server_learning_rate=0.01), plain_model()
    for server_round in range(1, 21):
        arrays, _ = train_round(
            strategy, arrays, server_round, lambda m, r=server_round: huge_replies(m, r, 1.5e38)
        )
    assert np.abs(flat(arrays) - flat(plain_model())).max() < 20


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "bgmd-per-client", "bgmd-mean"])
def test_training_resumes_after_a_round_that_diverged(name: str, momentum: float) -> None:
    """A round whose model is not finite is kept out of the state, too."""
    cls, own = (STRATEGIES | STATEFUL)[name][:2]
    options = {**own, "server_momentum": momentum, "server_learning_rate": 8.0}
    strategy, arrays = make(cls, **options), plain_model()
    arrays, metrics = train_round(
        strategy, arrays, 1, lambda m: huge_replies(m, 1, 1.5e38, hostile=NODES)
    )
    assert np.isfinite(flat(arrays)).all()
    if not metrics.get("diverged"):
        pytest.skip("this rule does not follow them")
    assert same_bits(arrays, plain_model())
    arrays, metrics = train_round(strategy, arrays, 2)
    assert "diverged" not in metrics
    assert not same_bits(arrays, plain_model())


def test_a_float16_model_stays_finite_whatever_one_client_sends() -> None:
    """A value that float32 holds may carry a float16 model out of its range."""

    def reply(messages: list[Message]) -> list[Message]:
        bad = replace_values(messages[0], np.full((4, 3), 1e30, dtype=np.float32))
        return [bad, *honest_replies(messages[1:])]

    strategy, arrays = named("mean"), plain_model(dtype="float16")
    arrays, _ = train_round(strategy, arrays, 1, reply)
    assert np.isfinite(flat(arrays)).all()
    arrays, metrics = train_round(strategy, arrays, 2)
    assert metrics["accepted"] == NODES
    assert not same_bits(arrays, plain_model(dtype="float16"))


def test_a_float16_model_that_leaves_its_range_is_kept() -> None:
    """Every reply is within float16, twice their update is not."""

    def reply(messages: list[Message]) -> list[Message]:
        far = np.full((4, 3), 6e4, dtype=np.float16)
        return [replace_values(message, far) for message in messages]

    strategy, model = named("mean", server_learning_rate=2.0), plain_model(dtype="float16")
    arrays, metrics = train_round(strategy, model, 1, reply)
    assert metrics["accepted"] == NODES
    assert metrics["diverged"] == 1
    assert same_bits(arrays, model)


def test_a_model_of_mixed_dtypes_stays_finite() -> None:
    model = to_record({"weight": np.ones((4, 3), np.float32), "wide": np.ones(2, np.float64)})

    def reply(messages: list[Message]) -> list[Message]:
        bad = replace_values(messages[0], np.full((4, 3), 1e300))
        return [bad, *honest_replies(messages[1:])]

    arrays, _ = train_round(named("mean"), model, reply=reply)
    assert np.isfinite(flat(arrays)).all()
    assert arrays["weight"].dtype == "float32"


def test_a_model_that_is_not_finite_is_refused() -> None:
    for key, value in (("weight", np.nan), ("weight", np.inf), ("bn.running_var", np.nan)):
        arrays = to_numpy(batch_norm_model())
        arrays[key].flat[0] = value
        with pytest.raises(ValueError, match="NaN or an infinity"):
            messages_of(named("mean"), to_record(arrays))


# -------------------------------------------------------------------------------- buffers


def test_buffers_are_medians_and_integers_are_rounded() -> None:
    model = batch_norm_model()
    counts = [7, 9, 8, 1000, 10, 9, 7, 8, 9, 10]

    def reply(messages: list[Message]) -> list[Message]:
        replies = []
        for message, count in zip(messages, counts, strict=True):
            arrays = to_numpy(sent_arrays(message))
            arrays["bn.running_mean"] += np.float32(node(message))
            arrays["bn.running_var"] *= np.float32(node(message))
            arrays["bn.num_batches_tracked"] = np.array(count)
            arrays["mask"] = np.array([node(message) > 3, node(message) > 8])
            replies.append(reply_with(message, arrays))
        replies[3] = replace_values(messages[3], np.full(4, -1e30, np.float32), "bn.running_mean")
        return replies

    strategy = named("bgmd")
    messages = messages_of(strategy, model)
    replies = reply(messages)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    received = [to_numpy(sent_arrays(r)) for r in replies]
    for key in ("bn.running_mean", "bn.running_var"):
        middle = np.median([a[key].astype(np.float64) for a in received], axis=0)
        np.testing.assert_array_equal(arrays[key].numpy(), middle.astype(np.float32))
    tracked = arrays["bn.num_batches_tracked"].numpy()
    # Reply 3 is the honest 7; the middle of 7 7 7 8 8 9 9 9 10 10 is 8.5, to the even integer.
    assert (tracked.tolist(), tracked.dtype, tracked.shape) == (8, np.dtype(np.int64), ())
    assert arrays["mask"].numpy().tolist() == [True, False]
    assert arrays["mask"].dtype == "bool"
    for key, array in arrays.items():
        assert (array.dtype, array.shape) == (model[key].dtype, model[key].shape), key


def test_a_torch_model_with_batch_norm_trains_for_several_rounds() -> None:
    """``num_batches_tracked`` has no dimension; it must come back without one."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        return reply_with(message, ArrayRecord(module.state_dict()))

    result = named("bgmd", fraction_evaluate=0.0).start(
        InProcessGrid(app, 4, {}), ArrayRecord(module.state_dict()), num_rounds=3
    )
    accepted = [result.train_metrics_clientapp[i]["accepted"] for i in (1, 2, 3)]
    assert accepted == [4, 4, 4]
    assert result.arrays["1.num_batches_tracked"].shape == ()
    assert int(result.arrays["1.num_batches_tracked"].numpy()) == 3


# ------------------------------------------------------------------------------ weighting


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


def test_what_is_drawn_is_secret_without_a_seed() -> None:
    def drawn(**seed: Any) -> tuple[list[Any], Any]:
        strategy = BGMD(block_fraction=0.1, min_block_size=1, **seed)
        arrays, config = ArrayRecord([np.zeros(400, np.float32)]), ConfigRecord()
        strategy.open_round(1, arrays, config)
        replies = [
            honest_reply(train_message(arrays, node), random_update(arrays, [1, node]))
            for node in range(1, 6)
        ]
        moved, _ = strategy.aggregate_train(1, replies)
        assert moved is not None
        return np.flatnonzero(flat(moved)).tolist(), config["round-seed"]

    assert drawn(seed=1) == drawn(seed=1)
    blocks, seeds = zip(*(drawn() for _ in range(4)), strict=True)
    # Two of them may be equal by chance: there are some hundred.
    assert len({tuple(block) for block in blocks}) > 1
    assert len(set(seeds)) == 4


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


# ------------------------------------------------------------------------------- metrics


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


# --------------------------------------------------------------------- FedAvg's arguments


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


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
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


def test_the_keys_of_the_records_can_be_chosen() -> None:
    strategy = named(
        "mean",
        arrayrecord_key="model",
        configrecord_key="settings",
        weighted_by_key="samples",
        weighting="examples",
    )
    messages = messages_of(strategy, plain_model())
    assert set(messages[0].content) == {"model", "settings"}
    assert messages[0].content["settings"]["server-round"] == 1
    replies = [
        honest_reply(m, random_update(plain_model(), node(m)), metrics={"samples": node(m)})
        for m in messages
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    weights = torch.tensor([1.0, 2, 3, 4, 5, 5, 5, 5, 5, 5]).double()
    expected = mean(rows_of(messages, replies), weights=weights)
    np.testing.assert_array_equal(flat(arrays), moved(plain_model(), expected.vector))
    assert metrics["num-examples"] == 10


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        (10, {"fraction_train": 1.0}, 10),
        (10, {"fraction_train": 0.5}, 5),
        (10, {"fraction_train": 0.29}, 2),
        (100, {"fraction_train": 0.29}, 29),
        (10, {"fraction_train": 0.1}, 2),
        (10, {"fraction_train": 0.1, "min_train_nodes": 6}, 6),
        (10, {"fraction_train": 0.1, "min_train_nodes": 1}, 1),
        (10, {"fraction_train": 0.0}, 0),
    ],
)
def test_as_many_nodes_train_as_were_asked_for(
    nodes: int, options: dict[str, Any], expected: int
) -> None:
    assert len(messages_of(named("gmd", **options), plain_model(), nodes=nodes)) == expected


def test_evaluation_samples_its_own_nodes() -> None:
    strategy = named("gmd", fraction_evaluate=0.4)
    messages = strategy.configure_evaluate(3, plain_model(), ConfigRecord(), silent_grid())
    found = list(messages)
    assert len(found) == 4
    assert found[0].content["config"]["server-round"] == 3
    assert found[0].metadata.message_type == "evaluate"
    none = named("gmd", fraction_evaluate=0.0)
    assert list(none.configure_evaluate(1, plain_model(), ConfigRecord(), silent_grid())) == []


def test_without_training_nothing_is_aggregated() -> None:
    strategy = named("gmd", fraction_train=0.0)
    assert messages_of(strategy, plain_model()) == []
    assert strategy.aggregate_train(1, []) == (None, None)


def test_the_sample_of_nodes_depends_on_seed_and_round_alone() -> None:
    def sampled(seed: int, server_round: int) -> list[int]:
        random.seed()
        strategy = make(GMD, fraction_train=0.3, seed=seed)
        return [node(m) for m in messages_of(strategy, plain_model(), server_round, nodes=40)]

    assert sampled(0, 1) == sampled(0, 1)
    assert len({tuple(sampled(0, i)) for i in range(1, 9)}) == 8
    assert sampled(0, 1) != sampled(1, 1)
    drawn = [i for server_round in range(1, 200) for i in sampled(3, server_round)]
    counts = np.bincount(drawn, minlength=41)[1:]
    # Binomial(199, 0.3): 60 +- 6.5.
    assert counts.min() > 30
    assert counts.max() < 90


def test_messages_carry_the_round_and_its_seed() -> None:
    seeds = set()
    for server_round in (1, 2):
        for message in messages_of(named("gmd"), plain_model(), server_round):
            config = message.content["config"]
            assert config["server-round"] == server_round
            assert same_bits(message.content["arrays"], plain_model())
            seeds.add(config["round-seed"])
    assert len(seeds) == 2


class LateGrid(InProcessGrid):
    """A grid whose nodes connect one after the other."""

    def get_node_ids(self) -> Iterable[int]:
        self.asked = getattr(self, "asked", 0) + 1
        return list(super().get_node_ids())[: 2 + self.asked]


def test_sampling_waits_for_the_nodes() -> None:
    strategy = named("gmd", min_available_nodes=4)
    grid = LateGrid(ClientApp(), 4, {})
    assert len(list(strategy.configure_train(1, plain_model(), ConfigRecord(), grid))) == 4
    assert grid.asked == 2


def test_arguments_are_by_keyword_and_known() -> None:
    for cls in {entry[0] for entry in STRATEGIES.values()}:
        with pytest.raises(TypeError):
            cls(0.5)
        with pytest.raises(TypeError, match="no_such_option"):
            cls(no_such_option=1)


def test_the_base_class_takes_a_rule_and_the_others_have_one() -> None:
    with pytest.raises(TypeError, match=r"rule is '' for RobustStrategy; allowed: a spec such as"):
        RobustStrategy()
    with pytest.raises(TypeError, match=r"rule is 'gmd' for BGMD; allowed: none"):
        BGMD("gmd")
    assert str(RobustStrategy("gmd:tol=1e-3", mixing="bucketing:3").rule) == (
        "gmd:tol=0.001+bucketing:bucket-size=3"
    )


# ------------------------------------------------------------------------- invalid values


@pytest.mark.parametrize(
    ("cls", "argument", "value", "allowed"),
    [
        (Mean, "server_learning_rate", 0.0, "above 0"),
        (Mean, "server_learning_rate", -1.0, "above 0"),
        (Mean, "server_learning_rate", math.nan, "above 0"),
        (Mean, "server_learning_rate", math.inf, "above 0"),
        (Mean, "server_momentum", 1.0, "0 to below 1"),
        (Mean, "server_momentum", -0.1, "0 to below 1"),
        (Mean, "server_momentum", math.nan, "0 to below 1"),
        (GMD, "mixing", "nnm", "nearest-neighbor, bucketing"),
        (GMD, "byzantine_fraction", 0.5, "0 to below 0.5"),
        (GMD, "byzantine_fraction", -0.1, "0 to below 0.5"),
        (GMD, "byzantine_fraction", math.nan, "0 to below 0.5"),
        (GMD, "weighting", "size", "uniform, examples"),
        (GMD, "min_valid_replies", 0, "a whole number, 1 or more"),
        (GMD, "seed", -1, "None, or 0 to below 2^63"),
        (GMD, "seed", 2**63, "None, or 0 to below 2^63"),
        (GMD, "device", "tpu", "auto, cpu, cuda"),
        (GMD, "device", "meta", "auto, cpu, cuda"),
        (GMD, "tol", 0.0, "above 0"),
        (GMD, "tol", math.nan, "above 0"),
        (GMD, "solver", "secant", "gram, newton, weiszfeld"),
        (BGMD, "block_fraction", 0.0, "above 0 to 1"),
        (BGMD, "block_fraction", 1.1, "above 0 to 1"),
        (BGMD, "min_block_size", 0, "a whole number, 1 or more"),
        (BGMD, "block_fraction", math.nan, "above 0 to 1"),
        (BGMD, "selection", "first", "sample, top-k, uniform"),
        (BGMD, "score", "variance", "clipped, squared-norm, norm"),
        (BGMD, "memory", "median", "robust, mean, per-client, none"),
        (BGMD, "tol", -1.0, "above 0"),
        (TrimmedMean, "trim_fraction", 0.5, "0 to below 0.5"),
        (TrimmedMean, "trim_fraction", -0.1, "0 to below 0.5"),
        (NormThreshold, "drop_fraction", 1.0, "0 to below 1"),
        (NormThreshold, "drop_fraction", -0.1, "0 to below 1"),
        (NormThreshold, "order", 0.5, "1 or more"),
        (RobustFilter, "sigma0", 0.0, "above 0"),
        (RobustFilter, "method", "median", "mean"),
        (MultiKrum, "num_selected", 0, "a whole number, 1 or more"),
        (CenteredClipping, "radius", 0.0, "above 0"),
        (CenteredClipping, "iterations", 0, "a whole number, 1 or more"),
    ],
)
def test_invalid_values_are_refused_with_name_value_and_what_is_allowed(
    cls: type[RobustStrategy], argument: str, value: Any, allowed: str
) -> None:
    expected = f"^{re.escape(argument)} is {re.escape(repr(value))}; allowed: {re.escape(allowed)}"
    with pytest.raises(ValueError, match=expected):
        cls(**{argument: value})


def test_per_client_memory_and_bucketing_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="mixing is 'bucketing' with bgmd:memory=per-client; all"):
        BGMD(memory="per-client", mixing="bucketing")
    with pytest.raises(ValueError, match="bucket-size is '0'; allowed: a whole number, 1 or more"):
        GMD(mixing="bucketing:0")


def test_aggregating_before_configuring_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before configure_train"):
        named("bgmd").aggregate_train(1, [])


# --------------------------------------------------------------------------------- state


def converging_replies(messages: list[Message], server_round: int) -> list[Message]:
    """Go a tenth of the way to each client's own optimum, and add noise."""
    replies = []
    for message in messages:
        model = to_numpy(sent_arrays(message))
        target = random_update(sent_arrays(message), node(message))
        noise = random_update(sent_arrays(message), [server_round, node(message)], 0.05)
        update = {key: 0.1 * (model[key] - target[key]) + noise[key] for key in model}
        replies.append(honest_reply(message, update, partition=node(message) - 1))
    return replies


def run_rounds(strategy: RobustStrategy, arrays: ArrayRecord, rounds: Iterable[int]) -> ArrayRecord:
    for server_round in rounds:
        arrays, _ = train_round(
            strategy, arrays, server_round, lambda m, r=server_round: converging_replies(m, r)
        )
    return arrays


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_is_bit_identical(name: str) -> None:
    cls, own = STATEFUL[name]
    options = {**own, "fraction_train": 0.6}
    straight = run_rounds(make(cls, **options), plain_model(), range(1, 7))

    first = make(cls, **options)
    half = run_rounds(first, plain_model(), range(1, 4))
    state = first.state_dict()
    # What the first one does from here on must not reach the state that was saved.
    assert same_bits(run_rounds(first, half, range(4, 7)), straight)
    second = make(cls, **options)
    second.load_state_dict(state)
    assert same_bits(run_rounds(second, half, range(4, 7)), straight)
    assert state["round"] == 3


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_matters(name: str) -> None:
    """Control: without the state the resumed run ends elsewhere."""
    if name == "bgmd-none":
        pytest.skip("its generator is all it has")
    cls, own = STATEFUL[name]
    straight = run_rounds(make(cls, **own), plain_model(), range(1, 7))
    half = run_rounds(make(cls, **own), plain_model(), range(1, 4))
    assert not same_bits(run_rounds(make(cls, **own), half, range(4, 7)), straight)


def test_the_state_holds_tensors_and_numbers_only() -> None:
    for cls, own in STATEFUL.values():
        strategy = make(cls, **own)
        run_rounds(strategy, plain_model(), [1, 2])
        for key, value in strategy.state_dict().items():
            if key == "reputation":
                assert value == {"against": {}, "until": {}}
            elif key == "ties":
                assert value == {}
            elif key == "stale":
                assert not any(value.values())
            elif isinstance(value, dict):
                assert key in ("memory", "optimizer")
                assert all(
                    v is None or isinstance(v, float | Tensor | tuple) for v in value.values()
                )
            else:
                assert value is None or isinstance(value, int | str | Tensor), key


# ------------------------------------------------------------------------------ robustness


def attacked_run(strategy: RobustStrategy, fraction: float, num_rounds: int = 60) -> float:
    mod = ByzantineMod(attack="bit-flip:100", fraction=fraction, selection="per-round", seed=1)
    grid = InProcessGrid(regression_app([mod]), NODES, {})
    result = strategy.start(grid, regression_model(), num_rounds=num_rounds)
    return regression_error(result.arrays)


def test_the_papers_memory_lets_the_attack_in_and_the_robust_one_does_not() -> None:
    """40 % redrawn each round, bit flipped and inflated by 100, a real ClientApp."""
    options = SMALL_BLOCKS | {"fraction_evaluate": 0.0, "byzantine_fraction": 0.4}
    start = regression_error(regression_model())
    unattacked = attacked_run(make(BGMD, memory="robust", **options), 0.0)
    robust = attacked_run(make(BGMD, memory="robust", **options), 0.4)
    paper = attacked_run(make(BGMD, memory="mean", **options), 0.4)
    assert unattacked < 0.1 * start
    assert robust < 0.3 * start
    assert paper > 3 * robust
    assert paper > start


@pytest.mark.parametrize("name", ["gmd", "cmd", "robust-filter", "multi-krum"])
def test_robust_strategies_learn_under_attack(name: str) -> None:
    error = attacked_run(named(name, fraction_evaluate=0.0), 0.2)
    assert error < 0.2 * regression_error(regression_model())


def test_the_mean_does_not() -> None:
    assert attacked_run(named("mean", fraction_evaluate=0.0), 0.2) > 1e3


def test_the_filter_warns_beyond_its_guarantee_without_ending_the_run(
    recwarn: pytest.WarningsRecorder,
) -> None:
    strategy, arrays = make(RobustFilter, byzantine_fraction=0.4), plain_model()
    for server_round in (1, 2, 3):
        arrays, _ = train_round(strategy, arrays, server_round)
    messages = [str(warning.message) for warning in recwarn]
    # Once would do; as many times as there are rounds is noise.
    assert len([text for text in messages if "guarantee" in text]) <= 1


# ---------------------------------------------------------------------------------- names


def test_both_names_lead_to_the_same_objects() -> None:
    public = importlib.import_module("fl_bgmd.strategies")
    assert set(public.__all__) == set(source_package.__all__)
    for name in public.__all__:
        assert getattr(public, name) is getattr(source_package, name)


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_the_summary_names_what_matters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flwr"):
        named(name, mixing="nearest-neighbor").summary()
    for text in ("mixing: nearest-neighbor", "byzantine_fraction: 0.2", "device in use: cpu"):
        assert text in caplog.text


def test_each_rejection_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flwr"):
        train_round(named("bgmd"), plain_model(), reply=with_one_bad("flattened"))
    [record] = caplog.records
    assert f"node {BAD_NODE} (shape)" in record.getMessage()
    assert "'weight'" in record.getMessage()


# ------------------------------------------------------------------ what no client may decide


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


@pytest.mark.parametrize("name", ["trimmed-mean", "multi-krum", "robust-filter", "norm-threshold"])
def test_after_bucketing_rules_expect_the_hostile_rows_among_fewer(name: str) -> None:
    """Two of sixteen rows are hostile; they may spoil two of eight buckets."""

    def two_lie(messages: list[Message]) -> list[Message]:
        replies = honest_replies(messages)
        for message, reply in zip(messages[:2], replies[:2], strict=True):
            sent = to_numpy(sent_arrays(message))
            lies = {key: value - np.float32(1e6) for key, value in sent.items()}
            reply.content["arrays"] = to_record(lies)
        return replies

    for seed in range(4):
        bucketed = named(name, mixing="bucketing", seed=seed, byzantine_fraction=0.125)
        _, metrics = train_round(bucketed, plain_model(), reply=two_lie, nodes=16)
        assert metrics["update-norm"] < 10, seed


def test_a_strategy_is_of_one_model() -> None:
    strategy = named("bgmd")
    train_round(strategy, plain_model())
    with pytest.raises(ValueError, match="arrays are of another model"):
        train_round(strategy, batch_norm_model(), 2)


def test_examples_of_two_clients_are_capped_at_the_fewer() -> None:
    def two(messages: list[Message]) -> list[Message]:
        replies = honest_replies(messages[:2])
        replies[1].content["metrics"]["num-examples"] = 1e300
        return replies

    _, metrics = train_round(named("mean", weighting="examples"), plain_model(), reply=two)
    assert metrics["client-weights"] == [0.5, 0.5]
