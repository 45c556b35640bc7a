"""Which nodes take part in a round: how many, drawn from what, and who is waited for."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flower_messages import plain_model
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from strategy_rounds import make, messages_of, named, node, silent_grid

from fl_bgmd.strategies import GMD
from simulations.grid import InProcessGrid


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
