"""Rows in shards on Ray: the same model, also where a worker dies in the middle of a round."""

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flower_messages import regression_app, regression_model, to_numpy
from flwr.serverapp.strategy import Result
from test_flwr_run import free_port
from test_ray_cluster import cluster  # noqa: F401

from fl_bgmd import ray_shards
from fl_bgmd.aggregators.rows import gram_matrix
from fl_bgmd.options import OptionError
from fl_bgmd.ray_cluster import join
from fl_bgmd.ray_shards import RayCrew
from fl_bgmd.shards import ShardsError
from fl_bgmd.strategies import BGMD, GMD, RobustStrategy, Round
from simulations.grid import InProcessGrid

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

NODES = 7
SPECS = ["gmd", "cmd+clipping+nearest-neighbor"]
"""BGMD's run, with its memory, is the one whose worker is killed."""


def run(strategy: RobustStrategy, rounds: int = 3) -> Result:
    grid = InProcessGrid(regression_app([]), NODES, {})
    return strategy.start(grid, regression_model(), num_rounds=rounds)


def options(**more: Any) -> dict[str, Any]:
    return {"min_train_nodes": NODES, "min_available_nodes": NODES, "seed": 5, **more}


def assert_same_models(found: Result, expected: Result) -> None:
    ours, theirs = to_numpy(found.arrays), to_numpy(expected.arrays)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def no_ray_after() -> Iterator[None]:
    """Leave no Ray behind."""
    yield
    ray.shutdown()


@pytest.fixture
def own_ray(no_ray_after: None) -> None:
    """Keep one Ray for the tests of a machine: strategies use that which is there."""
    if not ray.is_initialized():
        join("", num_cpus=2)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.usefixtures("own_ray")
def test_a_run_on_ray_gives_the_same_model(spec: str) -> None:
    there = run(RobustStrategy(spec, **options(shards="ray")))
    assert_same_models(there, run(RobustStrategy(spec, **options())))
    assert ray.is_initialized()  # it was not the strategy's own


@pytest.mark.usefixtures("own_ray")
def test_rows_arrive_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_shards, "_PIECE", 1000)
    crew = RayCrew()
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            rows = torch.randn(5, 321).to(dtype)
            with crew.holding(rows) as held:
                assert torch.equal(held[3], rows[3])
                np.testing.assert_allclose(gram_matrix(held), gram_matrix(rows), rtol=1e-12)
    finally:
        crew.close()


class Attacked(BGMD):
    """Kills a worker in the second round, once the rows are there."""

    killed = 0

    def aggregate(self, current: Round) -> Any:
        crew = self._session.crew
        if isinstance(crew, RayCrew) and self._session.state.round == 2:
            os.kill(crew.pids()[-1], signal.SIGKILL)
            self.killed += 1
        return super().aggregate(current)


@pytest.mark.usefixtures("own_ray")
def test_a_worker_that_is_killed_costs_no_round(caplog: pytest.LogCaptureFixture) -> None:
    strategy = Attacked(**options(shards="ray"))
    with caplog.at_level(logging.WARNING, "flwr.fl_bgmd"):
        there = run(strategy)
    assert strategy.killed == 1
    assert "another one takes its columns" in caplog.text
    assert strategy.failure == ""
    assert_same_models(there, run(BGMD(**options())))


@pytest.mark.parametrize("spec", ["dnc", "bgmd:memory=per-client", "gmd:solver=newton"])
def test_a_rule_that_reads_rows_otherwise_is_refused_before_the_run(spec: str) -> None:
    with pytest.raises(
        OptionError, match=r"shards is 'ray' with .*; allowed: none, or one of .*gmd"
    ):
        RobustStrategy(spec, shards="ray")


def test_a_rule_of_ones_own_is_refused_before_the_run() -> None:
    class Own(RobustStrategy):
        def aggregate(self, current: Round) -> Any:
            return super().aggregate(current)

    with pytest.raises(OptionError, match="shards is 'ray' with Own; allowed: none, or one of"):
        Own(shards="ray")


def test_an_address_without_shards_is_refused() -> None:
    with pytest.raises(OptionError, match=r"shards_address is 'a:1' with shards 'none'"):
        GMD(shards_address="a:1")


def test_an_address_where_nobody_answers_is_an_error() -> None:
    ray.shutdown()
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(ShardsError, match=rf"shards_address is '{nowhere}'"):
        run(GMD(**options(shards="ray", shards_address=nowhere)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GMD, Attacked])
def test_two_machines_share_the_columns(
    kind: type[RobustStrategy],
    cluster: str,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray.shutdown()
    with caplog.at_level(logging.INFO, "flwr.fl_bgmd"):
        there = run(kind(**options(shards="ray", shards_address=cluster)))
    assert "in shards on 2 machines" in caplog.text
    assert ("takes its columns" in caplog.text) == (kind is Attacked)
    plain = BGMD if kind is Attacked else kind
    assert_same_models(there, run(plain(**options())))
    assert not ray.is_initialized()
