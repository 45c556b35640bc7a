"""A rule and a mixing of one's own are one function each, and are found wherever they are named."""

import importlib
import inspect
import json
import pydoc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_bgmd.strategies.legacy import older
from flower_messages import regression_app, regression_model, same_bits, to_numpy
from flwr.app import ArrayRecord
from test_legacy import N, serve
from test_legacy import options as older_options

from fl_bgmd.aggregators import MIXINGS, RULES, build_rule
from fl_bgmd.aggregators.rule import build_mixings
from fl_bgmd.checkpoints import CheckpointError
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import RobustStrategy
from simulations.cli import main
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid

MODULE = '''
from typing import Any

import numpy as np
from torch import Tensor

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.aggregators.means import Dense, Mixing
from fl_bgmd.aggregators.rule import mixing, rule
from fl_bgmd.options import Count, Fraction
from fl_bgmd.strategies import RobustStrategy


@rule("halfway", robust=False)
def halfway(updates: Tensor, *, memory: Any = None, share: Fraction = 0.5) -> Aggregate:
    """Go a share of the way to the mean.

    Parameters
    ----------
    updates : Tensor
        (n, d).
    memory : object
        How many rounds there have been.
    share : float
        How far to go; see above.
    """
    return Aggregate(share * updates.mean(0), weights=None, memory=(memory or 0) + 1)


@mixing("pull-in")
def pull_in(updates: Tensor, *, steps: Count = 1) -> Mixing:
    """Move every row toward the mean, ``steps`` times halfway.

    Parameters
    ----------
    updates : Tensor
        (n, d).
    steps : int
        How many times.
    """
    n, kept = len(updates), 0.5**steps
    return Dense(kept * np.eye(n) + (1 - kept) / n)


class Halfway(RobustStrategy):
    spec = "tmp_mod:halfway"


def undeclared(updates: Tensor) -> Tensor:
    return updates.mean(0)
'''
ROWS = torch.tensor([[2.0, 0.0], [4.0, 6.0], [6.0, 3.0]])


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tmp_mod.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("tmp_mod", None)
    yield
    sys.modules.pop("tmp_mod", None)
    RULES._things.pop("halfway", None)
    MIXINGS._things.pop("pull-in", None)


def imported() -> Any:
    return importlib.import_module("tmp_mod")


def run(strategy: RobustStrategy, rounds: int = 2, **settings: Any) -> ArrayRecord:
    """Return the model after a run of clients in this process."""
    grid = InProcessGrid(regression_app(), N, {})
    return strategy.start(grid, regression_model(), num_rounds=rounds, **settings).arrays


def test_by_path_and_once_it_is_imported_by_name() -> None:
    with pytest.raises(OptionError, match=r"rule is 'halfway'; allowed: .*package.module"):
        build_rule("halfway")
    by_path = build_rule("tmp_mod:halfway:share=0.3+tmp_mod:pull_in:2")
    by_name = build_rule("halfway:0.3+pull-in:steps=2")
    assert str(by_name) == str(by_path) == "halfway:share=0.3+pull-in:steps=2"
    for rule in (by_path, by_name, build_rule("halfway", share=0.3, mixing="pull-in:2")):
        torch.testing.assert_close(rule(ROWS).vector, 0.3 * ROWS.mean(0))
        assert rule(ROWS, 4).memory == 5
    [pull_in] = build_mixings("pull-in:2")
    near = pull_in(updates=ROWS).apply(ROWS)
    torch.testing.assert_close(near, ROWS.mean(0) + (ROWS - ROWS.mean(0)) / 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tmp_mod:halfway:shre=0.3", "halfway has no option 'shre'; did you mean 'share'"),
        ("tmp_mod:halfway:share=1.5", "share is '1.5'; allowed: .*above 0 to 1"),
        ("gmd+tmp_mod:pull_in:0", "steps is '0'; allowed: a whole number, 1 or more"),
        ("tmp_mod:undeclared", "it is a function; allowed: a function under @rule"),
        ("gmd+tmp_mod:halfway", "it is a function; allowed: a function under @mixing"),
    ],
)
def test_wrong_options_are_refused_everywhere(spec: str, message: str) -> None:
    for use in (build_rule, RobustStrategy):
        with pytest.raises(OptionError, match=message):
            use(spec)
    with pytest.raises(ConfigError, match=message):
        validate({"strategy": spec})


def test_as_a_flower_strategy() -> None:
    start = to_numpy(regression_model())["weight"]
    way = {
        share: to_numpy(run(RobustStrategy(f"tmp_mod:halfway:share={share}"), 1))["weight"] - start
        for share in (1.0, 0.25)
    }
    np.testing.assert_allclose(way[0.25], way[1.0] / 4, rtol=1e-4, atol=1e-6)
    strategy = RobustStrategy("halfway:share=0.25+pull-in", seed=1)
    mixed = to_numpy(run(strategy, 1))["weight"] - start
    np.testing.assert_allclose(mixed, way[1.0] / 4, rtol=1e-4, atol=1e-6)
    assert strategy.share == 0.25
    assert strategy.state_dict()["memory"] == 1


@pytest.mark.parametrize("spec", ["halfway", "tmp_mod:halfway"])
def test_as_a_class_with_help(spec: str) -> None:
    imported()

    named = type("Named", (RobustStrategy,), {"spec": spec})
    own = imported().Halfway
    for cls in (own, named):
        assert cls(share=0.3).share == 0.3
        assert same_bits(
            run(cls(share=0.3, seed=1)), run(RobustStrategy("halfway:share=0.3", seed=1))
        )
        with pytest.raises(OptionError, match="has no option 'shre'; did you mean 'share'"):
            cls(shre=0.3)
        assert inspect.signature(cls).parameters["share"].default == 0.5
    text = pydoc.plain(pydoc.render_doc(own))
    assert "Go a share of the way to the mean." in text
    assert "share : float, default 0.5" in text
    assert "How far to go." in text


SMALL = [
    *("--backend=inprocess", "--dataset=mnist", "--model=tiny-cnn", "--num-server-rounds=2"),
    *("--local-steps=1", "--batch-size=8", "--num-clients=5", "--partition=iid"),
    "--evaluate-every=2",
]


def test_from_the_run_configuration_and_the_command_line(tmp_path: Path) -> None:
    spec = "tmp_mod:halfway:share=0.3+tmp_mod:pull_in:2"
    assert validate({"strategy": spec})["strategy"] == spec
    arguments = ["run", *SMALL, f"--strategy={spec}", f"--results-dir={tmp_path / 'out'}"]
    assert main(arguments) == 0
    [record] = (tmp_path / "out").glob("*/*/*/*/run.json")
    assert json.loads(record.read_text())["config"]["strategy"] == spec


def test_in_the_older_api() -> None:
    twin = older(imported().Halfway)
    assert (twin.__name__, twin.__module__) == ("Halfway", "tmp_mod")
    assert inspect.signature(twin).parameters["share"].default == 0.5
    with pytest.raises(OptionError, match="Halfway has no option 'shre'; did you mean 'share'"):
        twin(shre=0.3)
    history, _ = serve(twin(**older_options(), share=0.3, mixing="pull-in"), [], rounds=20)
    losses = [loss for _, loss in history.losses_distributed]
    assert losses[-1] < losses[0] / 2


def test_another_share_is_refused_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    half = imported().Halfway
    whole = run(half(share=0.3, seed=1), 4)
    run(half(share=0.3, seed=1, checkpoints=folder), 2)
    for other in (half(share=0.4, seed=1, checkpoints=folder), half(seed=1, checkpoints=folder)):
        with pytest.raises(CheckpointError, match="share"):
            run(other, 4)
    assert same_bits(run(half(share=0.3, seed=1, checkpoints=folder), 4), whole)
