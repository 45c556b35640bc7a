"""The server's optimizer is torch's: the same steps, resumed to the bit, and not taken in vain."""

import copy
from collections.abc import Callable
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
from torch.optim import SGD, Adagrad, Adam, Optimizer

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.checkpoints import CheckpointError
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import GMD, Mean, RobustStrategy, Round
from simulations.config import ConfigError, strategy_for, validate
from simulations.grid import InProcessGrid

TARGETS = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0], [2.0, 2.0, 2.0]])
"""Each client pulls to its own; the mean of the pulls is the server's pseudo-gradient."""


def clients() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_torch_state_dict()["w"]
        target = TARGETS[int(context.node_config["partition-id"])]
        arrays = ArrayRecord({"w": weights - (weights - target)})
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


def run(strategy: RobustStrategy, num_rounds: int = 8) -> Result:
    return strategy.start(
        grid=InProcessGrid(clients(), len(TARGETS), {}),
        initial_arrays=ArrayRecord({"w": torch.ones(3)}),
        num_rounds=num_rounds,
    )


def options(spec: str, **more: Any) -> dict[str, Any]:
    own = {"server_optimizer": spec, "fraction_evaluate": 0.0, "seed": 1, "byzantine_fraction": 0.0}
    return {**own, "server_learning_rate": 0.1, **more}


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        ("sgd", lambda weights: SGD(weights, 0.1)),
        ("adam", lambda weights: Adam(weights, 0.1)),
        (
            "adam:beta1=0.8,beta2=0.99,eps=1e-3",
            lambda weights: Adam(weights, 0.1, betas=(0.8, 0.99), eps=1e-3),
        ),
        ("torch.optim:Adagrad", lambda weights: Adagrad(weights, 0.1)),
    ],
)
def test_the_server_takes_the_steps_of_torch(
    spec: str, reference: Callable[[list[torch.Tensor]], Optimizer]
) -> None:
    found = run(Mean(**options(spec))).arrays.to_torch_state_dict()["w"]
    weights = torch.ones(3, requires_grad=True)
    optimizer = reference([weights])
    for _ in range(8):
        weights.grad = (weights.detach() - TARGETS).mean(dim=0)
        optimizer.step()
    torch.testing.assert_close(found, weights.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["adam", "torch.optim:Adagrad"])
def test_a_resumed_run_is_the_same_to_the_bit(spec: str, tmp_path: Path) -> None:
    whole = run(GMD(**options(spec))).arrays
    run(GMD(**options(spec, checkpoints=tmp_path)), 4)
    assert same_bits(run(GMD(**options(spec, checkpoints=tmp_path)), 8).arrays, whole)
    # Control: the moments matter, four rounds from the same model without them end elsewhere.
    half = run(GMD(**options(spec)), 4).arrays
    fresh = GMD(**options(spec)).start(
        grid=InProcessGrid(clients(), len(TARGETS), {}), initial_arrays=half, num_rounds=4
    )
    assert not same_bits(fresh.arrays, whole)


def test_another_optimizer_is_refused_on_resume(tmp_path: Path) -> None:
    run(GMD(**options("adam", checkpoints=tmp_path)), 2)
    with pytest.raises(CheckpointError, match=r"strategy.server_optimizer was 'adam' and is 'sgd'"):
        run(GMD(**options("sgd", checkpoints=tmp_path)), 4)


class Sometimes(Mean):
    """Its second aggregate is not finite."""

    rounds = 0

    def aggregate(self, current: Round) -> Aggregate:
        self.rounds += 1
        result = super().aggregate(current)
        return Aggregate(result.vector * (np.inf if self.rounds == 2 else 1.0))


def test_a_round_that_comes_to_nothing_leaves_the_moments_as_they_were() -> None:
    strategy, states = Sometimes(**options("adam")), []

    def keep(number: int, result: Result) -> bool:
        states.append(copy.deepcopy(strategy.state_dict()["optimizer"]))
        return False

    arrays = ArrayRecord({"w": torch.ones(3)})
    grid = InProcessGrid(clients(), len(TARGETS), {})
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3, should_stop=keep)
    assert result.train_metrics_clientapp[2]["diverged"] == 1
    assert [int(state["step"]) for state in states] == [1, 1, 2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["exp_avg"], states[2]["exp_avg"])
    # The failed round is as if it had not been.
    assert same_bits(result.arrays, run(Mean(**options("adam")), 2).arrays)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lamb", r"server_optimizer is 'lamb'; allowed: sgd, adam, or package.module:NAME"),
        ("adan", r"server_optimizer is 'adan'; did you mean 'adam'\?"),
        ("adam:beta1=1", r"beta1 is '1'; allowed: a number, 0 to below 1"),
        ("adam:betas=0.9", r"adam has no option 'betas'; did you mean 'beta2'"),
        ("sgd:0.9", r"sgd has no option; allowed: 'sgd' alone"),
        ("math:floor", r"math:floor builds no optimizer of torch's"),
        ("math:pi", r"it is a float; allowed: what builds an optimizer of torch's"),
    ],
)
def test_what_is_no_optimizer_is_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GMD(server_optimizer=spec)
    with pytest.raises(ConfigError, match="server-optimizer is "):
        validate({"server-optimizer": spec})


def test_a_momentum_is_for_optimizers_that_take_one() -> None:
    with pytest.raises(OptionError, match=r"server_momentum is 0.9 with server_optimizer 'adam'"):
        GMD(server_optimizer="adam", server_momentum=0.9)
    assert GMD(server_optimizer="torch.optim:RMSprop", server_momentum=0.9).server_momentum == 0.9


def test_it_is_a_key_of_a_run_and_an_option_of_the_older_api() -> None:
    strategy = strategy_for(validate({"server-optimizer": "adam:eps=1e-3"}), fraction_evaluate=1.0)
    assert strategy.server_optimizer == "adam:eps=1e-3"
    assert LegacyGMD(server_optimizer="adam").rule.server_optimizer == "adam"
