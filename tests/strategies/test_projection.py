"""The projection on C and W: the model stays in a ball, whatever the clients send."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_bgmd.strategies.legacy import GMD as LegacyGMD
from flower_messages import same_bits
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.checkpoints import CheckpointError
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import BGMD, GMD, Mean, RobustStrategy, Round
from simulations.config import ConfigError, strategy_for, validate
from simulations.grid import InProcessGrid

START = torch.tensor([3.0, -4.0, 0.0])
TARGET = torch.tensor([-5.0, 2.0, 6.0])


def clients() -> ClientApp:
    """Every one goes half of the way to :data:`TARGET`, and counts its rounds in a buffer."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content["arrays"].to_torch_state_dict()
        arrays = {"w": sent["w"] + (TARGET - sent["w"]) / 2, "seen": sent["seen"] + 1000}
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


def run(strategy: RobustStrategy, num_rounds: int = 6) -> Result:
    arrays = ArrayRecord({"w": START.clone(), "seen": torch.tensor(0)})
    return strategy.start(
        grid=InProcessGrid(clients(), 4, {}), initial_arrays=arrays, num_rounds=num_rounds
    )


def weights(result: Result) -> torch.Tensor:
    return result.arrays.to_torch_state_dict()["w"]


def options(**more: Any) -> dict[str, Any]:
    return {"fraction_evaluate": 0.0, "seed": 1, "byzantine_fraction": 0.0, **more}


@pytest.mark.parametrize("cls", [Mean, GMD, BGMD])
@pytest.mark.parametrize("center", ["initial", "origin"])
def test_the_model_goes_as_far_as_the_ball(cls: type[RobustStrategy], center: str) -> None:
    result = run(cls(**options(projection_radius=2.0, projection_center=center)), 20)
    middle = START if center == "initial" else torch.zeros(3)
    assert float((weights(result) - middle).norm()) == pytest.approx(2.0, rel=1e-6)
    # It is where a path that is projected in every step ends.
    x = START.clone()
    for _ in range(20):
        x = x + (TARGET - x) / 2 - middle
        x = middle + x * min(1.0, 2.0 / float(x.norm()))
    torch.testing.assert_close(weights(result), x, rtol=1e-4, atol=1e-4)
    # Buffers are no parameters.
    assert int(result.arrays.to_torch_state_dict()["seen"]) == 20_000


def test_inside_of_the_ball_nothing_changes() -> None:
    plain = run(GMD(**options())).arrays
    assert same_bits(run(GMD(**options(projection_radius=100.0))).arrays, plain)
    assert not same_bits(run(GMD(**options(projection_radius=1.0))).arrays, plain)


def test_a_step_that_is_too_long_runs_away_without_a_ball() -> None:
    far = run(Mean(**options(server_learning_rate=6.0)), 30)
    near = run(Mean(**options(server_learning_rate=6.0, projection_radius=15.0)), 30)
    assert float((weights(far) - TARGET).norm()) > 1e6
    assert float((weights(near) - START).norm()) <= 15.001


def test_a_resumed_run_knows_where_it_began(tmp_path: Path) -> None:
    given = options(projection_radius=3.0)
    whole = run(BGMD(**given)).arrays
    run(BGMD(**given, checkpoints=tmp_path), 3)
    assert same_bits(run(BGMD(**given, checkpoints=tmp_path)).arrays, whole)
    with pytest.raises(CheckpointError, match=r"strategy.projection_radius was 3.0 and is 4.0"):
        run(BGMD(**options(projection_radius=4.0, checkpoints=tmp_path)))


def test_a_second_run_begins_anew() -> None:
    strategy = GMD(**options(projection_radius=3.0))
    first = run(strategy).arrays
    assert same_bits(run(strategy).arrays, first)


class Sometimes(Mean):
    """Its first aggregate is not finite."""

    rounds = 0

    def aggregate(self, current: Round) -> Aggregate:
        self.rounds += 1
        result = super().aggregate(current)
        return Aggregate(result.vector * (np.inf if self.rounds == 1 else 1.0))


def test_what_is_not_finite_is_refused_and_not_projected() -> None:
    result = run(Sometimes(**options(projection_radius=3.0)), 4)
    assert result.train_metrics_clientapp[1]["diverged"] == 1
    expected = weights(run(Mean(**options(projection_radius=3.0)), 3))
    torch.testing.assert_close(weights(result), expected)


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_what_is_no_radius_is_refused(radius: float) -> None:
    with pytest.raises(OptionError, match="projection_radius is "):
        GMD(projection_radius=radius)


def test_it_is_a_key_of_a_run_and_an_option_of_the_older_api() -> None:
    given = {"projection-radius": 2.5, "projection-center": "origin"}
    strategy = strategy_for(validate(given), fraction_evaluate=1.0)
    assert (strategy.projection_radius, strategy.projection_center) == (2.5, "origin")
    assert LegacyGMD(projection_radius=2.5).rule.projection_radius == 2.5
    with pytest.raises(ConfigError, match="projection-center is 'start'"):
        validate({"projection-center": "start"})
