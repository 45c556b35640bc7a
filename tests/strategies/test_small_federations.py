"""Few clients: one of three that lies is kept out, of two nobody is followed without a word."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import regression_app, regression_error, regression_model, to_numpy, to_record
from flwr.app import Context, Message
from flwr.serverapp.strategy import Result

from fl_bgmd.aggregators import spectral_filter
from fl_bgmd.shares import floor_share, hostile_count, largest_bucket
from fl_bgmd.strategies import (
    BGMD,
    CMD,
    GMD,
    CenteredClipping,
    EmptyRoundsError,
    Krum,
    Mean,
    MultiKrum,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    TrimmedMean,
)
from simulations.grid import InProcessGrid

ROBUST = (
    *(BGMD, GMD, CMD, TrimmedMean, NormThreshold),
    *(RobustFilter, Krum, MultiKrum, CenteredClipping),
)
Call = Callable[[Message, Context], Message]


def lie(message: Message, context: Context, call_next: Call) -> Message:
    """Partition 0 sends -100 times its update."""
    reply = call_next(message, context)
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
        sent, found = to_numpy(message.content["arrays"]), to_numpy(reply.content["arrays"])
        reply.content["arrays"] = to_record(
            {key: sent[key] - np.float32(100) * (found[key] - sent[key]) for key in sent}
        )
    return reply


def run(strategy: RobustStrategy, nodes: int, mods: Any = (), rounds: int = 20) -> Result:
    app = regression_app(mods, learning_rate=0.3)
    return strategy.start(InProcessGrid(app, nodes, {}), regression_model(), num_rounds=rounds)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# ------------------------------------------------------------------------------- the count


@pytest.mark.parametrize(
    ("fraction", "n", "count"),
    [
        *((0.25, 1, 0), (0.25, 2, 0), (0.25, 3, 1), (0.25, 7, 1), (0.25, 8, 2), (1e-9, 3, 1)),
        *((0.0, 3, 0), (0.0, 100, 0), (0.49, 2, 0), (0.49, 3, 1), (0.49, 4, 1), (0.29, 100, 29)),
    ],
)
def test_a_share_above_zero_is_somebody_from_three_on(fraction: float, n: int, count: int) -> None:
    assert hostile_count(fraction, n) == count


def test_the_hostile_are_a_minority_and_no_fewer_than_the_share() -> None:
    for n in range(3, 60):
        for fraction in np.linspace(0, 0.499, 40):
            hostile = hostile_count(float(fraction), n)
            assert floor_share(float(fraction), n) <= hostile < n / 2


def test_buckets_are_the_largest_that_leave_the_hostile_the_minority() -> None:
    assert [largest_bucket(2, 1, n) for n in (3, 4, 5, 6)] == [1, 1, 2, 2]
    assert (largest_bucket(3, 2, 10), largest_bucket(2, 2, 10), largest_bucket(9, 0, 4)) == (
        2,
        2,
        9,
    )


# --------------------------------------------------------------------------- three and more


@pytest.mark.parametrize("nodes", [3, 4, 5])
@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
@pytest.mark.parametrize("cls", ROBUST)
def test_one_of_few_who_sends_a_hundred_times_the_opposite_is_kept_out(
    cls: type[RobustStrategy], mixing: str, nodes: int
) -> None:
    result = run(cls(seed=1, mixing=mixing, fraction_evaluate=0.0), nodes, [lie])
    assert regression_error(result.arrays) < 0.25


@pytest.mark.parametrize("seed", range(20))
def test_the_filter_drops_the_outlier_of_three(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(50, generator=draw) + 0.5 * torch.randn(3, 50, generator=draw)
    rows[1] *= -100
    with pytest.warns(UserWarning, match="the guarantee of the robust filter"):
        result = spectral_filter(rows, byzantine_fraction=1 / 3)
    assert result.kept.tolist() == [True, False, True]


def test_the_filter_says_once_that_three_are_too_few_for_its_proof(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(RobustFilter(fraction_evaluate=0.0), 3, rounds=2)
    told = "a hostile share of 0.33 (1 of 3): the guarantee of the robust filter"
    assert sum(text.startswith(told) for text in warnings_of(caplog)) == 1


def test_smaller_buckets_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    run(GMD(mixing="bucketing:3", fraction_evaluate=0.0), 6, rounds=2)
    [told] = [text for text in warnings_of(caplog) if "bucket_size" in text]
    assert told.startswith("bucket_size is 3: of 6 replies 1 may be hostile")
    assert told.endswith("buckets of 2")


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (TrimmedMean(trim_fraction=0.1), "trim_fraction is 0.1: 0 of 4 values go at each end"),
        (NormThreshold(drop_fraction=0.0), "drop_fraction is 0.0: 0 of 4 updates are dropped"),
        (MultiKrum(num_selected=4), "num_selected is 4 of 4 updates, of which 1 may be hostile"),
    ],
)
def test_an_option_that_lets_the_hostile_in_is_said_once(
    strategy: RobustStrategy, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(strategy, 4, rounds=2)
    assert sum(text.startswith(told) for text in warnings_of(caplog)) == 1


# ------------------------------------------------------------------------------ two and one


@pytest.mark.parametrize("cls", ROBUST)
def test_two_nodes_move_nothing_and_the_run_says_what_to_do(
    cls: type[RobustStrategy], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "flwr"),
        pytest.raises(EmptyRoundsError, match="none of 5 rounds moved the model") as error,
    ):
        run(cls(fraction_evaluate=0.0), 2, [lie], rounds=5)
    message = str(error.value)
    for text in ("2 replies accepted", "3 nodes or more", "byzantine_fraction=0"):
        assert text in message
    assert "min_valid_replies=1" in message
    assert error.value.result.arrays == regression_model()
    texts = [record.getMessage() for record in caplog.records]
    [asked] = [i for i, text in enumerate(texts) if text.startswith("2 nodes are asked to train")]
    assert asked < next(i for i, text in enumerate(texts) if "accepted 2 replies" in text)


@pytest.mark.parametrize("cls", [BGMD, GMD])
def test_an_operator_may_take_the_risk_and_is_told(
    cls: type[RobustStrategy], caplog: pytest.LogCaptureFixture
) -> None:
    result = run(cls(seed=1, min_valid_replies=1, fraction_evaluate=0.0), 2)
    assert regression_error(result.arrays) < 0.25
    [told] = [text for text in warnings_of(caplog) if text.startswith("min_valid_replies is 1")]
    assert "in a round of fewer than 3 valid replies" in told


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    "strategy", [Mean(), BGMD(byzantine_fraction=0, seed=1), GMD(byzantine_fraction=0)]
)
def test_where_nobody_is_expected_to_lie_one_reply_is_enough(
    strategy: RobustStrategy, nodes: int
) -> None:
    strategy.min_train_nodes = strategy.min_evaluate_nodes = strategy.min_available_nodes = nodes
    assert strategy.min_valid_replies == 1
    assert regression_error(run(strategy, nodes).arrays) < 0.25


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (Mean(), "Mean tolerates no hostile client"),
        (CMD(byzantine_fraction=0), "byzantine_fraction is 0: no client is expected to lie"),
    ],
)
def test_what_protects_from_nobody_is_said_at_the_start(
    strategy: RobustStrategy, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        run(strategy, 3, rounds=2)
        assert sum(text.startswith(told) for text in warnings_of(caplog)) == 1


def test_a_robust_rule_among_enough_has_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    for cls in (BGMD, GMD, CMD, TrimmedMean, NormThreshold, Krum, MultiKrum, CenteredClipping):
        run(cls(), 5, rounds=2)  # Krum is proved for n > 2 f + 2
    assert not warnings_of(caplog)
