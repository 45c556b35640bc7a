"""A round as a step: into a state that resumes to the bit, or back to where it was."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    batch_norm_model,
    honest_reply,
    plain_model,
    random_update,
    replace_values,
    reply_with,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
)
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from strategy_rounds import (
    MEMORIES,
    NODES,
    ONE_OF_EACH,
    STATEFUL,
    STRATEGIES,
    flat,
    honest_replies,
    make,
    messages_of,
    named,
    node,
    rows_of,
    train_round,
)
from torch import Tensor

from fl_bgmd.aggregators import mean
from fl_bgmd.strategies import RobustStrategy
from simulations.grid import InProcessGrid


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


def test_aggregating_before_configuring_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before configure_train"):
        named("bgmd").aggregate_train(1, [])


# ---------------------------------------------------------------- hostile and finite replies


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


# ----------------------------------------------------------------------------------- buffers


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


# ------------------------------------------------------------------------------------- state


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
