"""Rules and attacks of somebody else, by the path of their class."""

from pathlib import Path

import pytest
import torch

from fl_bgmd.attacks import ATTACKS, build_attacks
from fl_bgmd.registry import is_path
from fl_bgmd.strategies import FedBGMD, Round
from simulations.cli import main
from simulations.config import ConfigError, validate
from simulations.experiment import build_strategy

OWN = Path(__file__).resolve().parents[2] / "examples" / "own"


@pytest.fixture(autouse=True)
def in_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OWN))


def test_the_example_runs_as_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--strategies", "gmd", "my_lab:MeanAroundMedian+bucketing"]
    arguments += ["--attack=none,my_lab:pull_back", "--byzantine-fraction=0.4"]
    arguments += ["--dataset=mnist", "--model=tiny-cnn", "--partition=iid", "--local-steps=1"]
    arguments += ["--num-server-rounds=2", "--evaluate-every=2", "--backend=inprocess"]
    assert main([*arguments, "--jobs=2", f"--results-dir={tmp_path}"]) == 0
    [cells] = tmp_path.glob("*/cells.jsonl")
    # Two strategies, each clean once and under both strengths of the attack's own sweep.
    assert len(cells.read_text().splitlines()) == 2 * 3
    assert "my_lab:pull_back" in capsys.readouterr().out


def test_the_rule_is_what_it_says() -> None:
    strategy = build_strategy(
        validate({"strategy": "my_lab:MeanAroundMedian", "assumed-byzantine-fraction": 0.4})
    )
    rows = torch.tensor([[1.0], [2.0], [3.0], [100.0], [-100.0]])
    assert strategy.byzantine_fraction == 0.4
    current = Round(rows, None, [*range(5)], byzantine_fraction=0.4)
    assert strategy.aggregate(current).vector.tolist() == [2.0]


def test_attacks_of_ones_own_are_not_listed() -> None:
    assert ATTACKS["my_lab:pull_back"].name == "pull-back"
    assert "my_lab:pull_back" not in ATTACKS
    [bound] = build_attacks("my_lab:pull_back")
    assert (str(bound), bound.values) == ("my_lab:pull_back", {"scale": 1.0})
    with pytest.raises(ValueError, match=r"attack is 'pull-back'; .*package.module:NAME"):
        ATTACKS["pull-back"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"strategy": "my_lab:Nothing"},
            "my_lab:Nothing cannot be imported.*allowed: one of cmd, ",
        ),
        ({"strategy": "my_lab:pull_back"}, "allowed: a function under @rule"),
        ({"strategy": "my_lab:Tensor"}, "my_lab:Tensor is no subclass of RobustStrategy"),
        ({"strategy": "my_lab:MeanAroundMedian:x=1"}, "MeanAroundMedian has no option 'x'"),
        ({"strategy": "nowhere:Rule"}, "No module named 'nowhere'"),
        ({"strategy": "my_lab"}, "strategy is 'my_lab': rule is 'my_lab'; allowed: cmd, "),
        ({"attack": "my_lab:NonNegative"}, "allowed: a function under @attack"),
        ({"attack": "my_lab:pull_back:scale=-1"}, "scale is '-1'; allowed: .*0 or more"),
        ({"attack": "bit-flip+my_lab:Nothing"}, "cannot be imported"),
    ],
)
def test_what_cannot_be_used_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"byzantine-fraction": 0.4, "attack": "bit-flip", **given})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a:b", True), ("a.b:C", True), ("a", False), ("a:", False), (":b", False), ("a b:c", False)],
)
def test_paths_are_told_from_names(name: str, expected: bool) -> None:
    assert is_path(name) is expected


def test_a_subclass_takes_the_options_of_its_base() -> None:
    config = {"compressor": "qsgd:3"}
    strategy = build_strategy(
        validate(config | {"strategy": "fl_bgmd.strategies:FedBGMD:block-fraction=0.5"})
    )
    assert isinstance(strategy, FedBGMD)
    assert strategy.block_fraction == 0.5
    assert strategy.compressor is not None
    assert strategy.compressor.name == "qsgd:3"
