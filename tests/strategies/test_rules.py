"""Each strategy does exactly what its rule does to the rows of the accepted replies.

The rules themselves are tested elsewhere.
"""

import numpy as np
import pytest
import torch
from flower_messages import (
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
)
from flwr.app import Message
from strategy_rounds import (
    FRACTION,
    MEMORIES,
    NODES,
    ONE_OF_EACH,
    SEED,
    STATEFUL,
    STRATEGIES,
    expected_of,
    flat,
    honest_replies,
    make,
    messages_of,
    moved,
    named,
    node,
    rows_of,
    train_round,
)
from torch import Tensor

from fl_bgmd.aggregators import (
    BlockMemory,
    block_geometric_median,
    bucketing,
    build_rule,
    centered_clipping,
    nearest_neighbor_mixing,
)
from fl_bgmd.strategies import BGMD, RobustStrategy
from simulations.grid import InProcessGrid


@pytest.mark.parametrize("learning_rate", [1.0, 0.25])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_moves_by_the_rule_of_the_rows(name: str, learning_rate: float) -> None:
    strategy = named(name, server_learning_rate=learning_rate)
    model = plain_model()
    messages = messages_of(strategy, model)
    replies = honest_replies(messages)
    arrays, metrics = strategy.aggregate_train(1, replies)
    expected = expected_of(name, rows_of(messages, replies), model)
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
    expected = expected_of(name, rows_of(messages, replies), model)
    np.testing.assert_array_equal(flat(result.arrays), moved(model, expected.vector))
    if name != "fltrust":  # the server's data, which are made up, ask for something else
        assert regression_error(result.arrays) < regression_error(model)
    assert result.train_metrics_clientapp[1]["accepted"] == NODES
    assert result.evaluate_metrics_clientapp[1]["loss"] > 0


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
    expected = expected_of(name, rows, model, generator)
    assert arrays is not None
    assert metrics is not None
    np.testing.assert_array_equal(flat(arrays), moved(model, expected.vector))
    if expected.weights is not None:
        assert len(metrics["client-weights"]) == NODES
        assert sum(metrics["client-weights"]) == pytest.approx(1)


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
        if name != "fltrust" or count == 0:  # which follows nobody against the server's data
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
