"""Strategies as a whole: their names, what they draw, and that they learn under attack."""

import importlib
import logging
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    train_message,
)
from flwr.app import ArrayRecord, ConfigRecord
from strategy_rounds import NODES, flat, make, named, train_round

import strategies as source_package
from fl_bgmd.aggregators import RULES
from fl_bgmd.mods import ByzantineMod
from fl_bgmd.strategies import BGMD, RobustFilter, RobustStrategy
from simulations.grid import InProcessGrid


def test_both_names_lead_to_the_same_objects() -> None:
    public = importlib.import_module("fl_bgmd.strategies")
    assert set(public.__all__) == set(source_package.__all__)
    for name in public.__all__:
        assert getattr(public, name) is getattr(source_package, name)


@pytest.mark.parametrize("name", RULES)
def test_the_summary_names_what_matters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flwr"):
        named(name, mixing="nearest-neighbor").summary()
    for text in ("mixing: nearest-neighbor", "byzantine_fraction: 0.2", "device in use: cpu"):
        assert text in caplog.text


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


# -------------------------------------------------------------------------------- robustness

SMALL_BLOCKS = {"block_fraction": 0.3, "min_block_size": 1}


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
