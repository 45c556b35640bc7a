"""What goes out to the clients of a round, and the update of the server's own data."""

import numpy as np
import pytest
import torch
from flower_messages import (
    batch_norm_model,
    honest_reply,
    plain_model,
    random_update,
    same_bits,
    shrunk,
    to_numpy,
    to_record,
)
from strategy_rounds import (
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

from fl_bgmd.aggregators import Aggregate, build_rule, mean
from fl_bgmd.strategies import GMD, FLTrust, RobustStrategy, Round


def test_messages_carry_the_round_and_its_seed() -> None:
    seeds = set()
    for server_round in (1, 2):
        for message in messages_of(named("gmd"), plain_model(), server_round):
            config = message.content["config"]
            assert config["server-round"] == server_round
            assert same_bits(message.content["arrays"], plain_model())
            seeds.add(config["round-seed"])
    assert len(seeds) == 2


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


def test_a_model_that_is_not_finite_is_refused() -> None:
    for key, value in (("weight", np.nan), ("weight", np.inf), ("bn.running_var", np.nan)):
        arrays = to_numpy(batch_norm_model())
        arrays[key].flat[0] = value
        with pytest.raises(ValueError, match="NaN or an infinity"):
            messages_of(named("mean"), to_record(arrays))


def test_a_strategy_is_of_one_model() -> None:
    strategy = named("bgmd")
    train_round(strategy, plain_model())
    with pytest.raises(ValueError, match="arrays are of another model"):
        train_round(strategy, batch_norm_model(), 2)


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
    sent = shared._session.sent
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
