"""An attack of one's own is one function, and is found wherever attacks are named."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_bgmd.strategies.legacy import GMD
from flower_messages import regression_app, regression_model, to_numpy, train_message
from flwr.app import Context, Message
from test_legacy import N, error_of, options, serve

from fl_bgmd.attacks import ATTACKS, AttackPlan, build_attacks, byzantine_clients
from fl_bgmd.mods import ByzantineMod
from simulations.adversary import AdversarialGrid
from simulations.cli import main
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid

MODULE = '''
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from torch import Tensor

from fl_bgmd.attacks import attack
from fl_bgmd.options import NonNegative


@attack("a test", sweep=(2.0, 3.0))
def my_attack(update: Tensor, factor: NonNegative = 2.0, turned: bool = True) -> Tensor:
    """Return a multiple of the update.

    Parameters
    ----------
    update : Tensor
        (d,).
    factor : float
        How many times as long it is; see above.
    turned : bool
        Whether it points the other way.
    """
    return (-factor if turned else factor) * update


@attack("a test", players=3)
def crowd(honest: Tensor, memory: dict) -> Tensor:
    """Return the mean of the honest updates, times the number of the round."""
    memory["round"] = memory.get("round", 0) + 1
    return memory["round"] * honest.mean(0)


@attack("a test")
def ranked(colluders: Tensor) -> Tensor:
    """Return each colluder's update, times its rank."""
    return colluders * Tensor(range(1, len(colluders) + 1)).to(colluders)[:, None]


@attack("a test", name="both", target="label")
def both_at_once(images, labels, label: Annotated[int, Ge(0), Le(9)] = 3, *, rng):
    """Return darker images under one label."""
    return images // 2, np.full_like(labels, label)


def no_attack(update: Tensor) -> Tensor:
    """Return the update."""
    return update
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tmp_mod.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tmp_mod", raising=False)
    yield
    sys.modules.pop("tmp_mod", None)


def test_it_is_declared_by_its_signature() -> None:
    attack = ATTACKS["tmp_mod:my_attack"]
    assert (attack.name, attack.place, attack.knows) == ("my-attack", "update", "own")
    assert [(o.key, o.default, o.allowed, o.help) for o in attack.options.values()] == [
        ("factor", 2.0, "0 or more, and finite", "How many times as long it is"),
        ("turned", True, "True or False", "Whether it points the other way"),
    ]
    assert "my-attack" not in ATTACKS
    assert "tmp_mod:my_attack" not in list(ATTACKS)
    [bound] = build_attacks("tmp_mod:my_attack:factor=3,turned=off")
    assert bound.values == {"factor": 3.0, "turned": False}
    [again] = build_attacks(str(bound))
    assert again == bound
    assert [str(each) for each in attack.swept("tmp_mod:my_attack")] == [
        *("tmp_mod:my_attack", "tmp_mod:my_attack:3")
    ]
    assert ATTACKS["tmp_mod:both_at_once"].name == "both"
    assert ATTACKS["tmp_mod:both_at_once"].place == "data"
    assert ATTACKS["tmp_mod:crowd"].knows == "all"


def deliver(mods: list[Any], config: dict[str, Any] | None = None) -> list[np.ndarray]:
    """Return each client's update of the bias and weights in a round."""
    grid = InProcessGrid(regression_app(mods), N, config or {})
    model = regression_model()
    messages = [train_message(model, node, {"server-round": 1}) for node in grid.get_node_ids()]
    sent = to_numpy(model)
    return [
        np.concatenate(
            [
                (sent[key] - value).ravel()
                for key, value in to_numpy(reply.content["arrays"]).items()  # type: ignore[arg-type]
            ]
        )
        for reply in grid.send_and_receive(messages)
    ]


def test_it_is_played_from_python_and_by_the_run_configuration() -> None:
    honest = deliver([])
    hostile = byzantine_clients(N, 0.4, 1, 3)
    mod = ByzantineMod(attack="tmp_mod:my_attack:factor=3", fraction=0.4, seed=3)
    config = {"attack": "tmp_mod:my_attack:3", "byzantine-fraction": 0.4, "seed": 3}
    for received in (deliver([mod]), deliver([ByzantineMod()], config)):
        for partition, (true, lie) in enumerate(zip(honest, received, strict=True)):
            expected = -3 * true if partition in hostile else true
            np.testing.assert_allclose(lie, expected, rtol=1e-5)


def test_it_is_checked_with_the_run_configuration() -> None:
    hostile: dict[str, Any] = {"byzantine-fraction": 0.2}
    assert validate({"attack": "tmp_mod:my_attack:factor=3", **hostile})
    for attack, message in (
        ("tmp_mod:my_attack:fator=3", "no option 'fator'; did you mean 'factor'"),
        ("tmp_mod:my_attack:factor=-3", "factor is '-3'; allowed: .*0 or more"),
        ("tmp_mod:my_attack:turned=x", "turned is 'x'; allowed: True or False"),
        ("tmp_mod:no_attack", "it is a function; allowed: a function under @attack"),
        ("tmp_mod:crowd", "tmp_mod:crowd played by 2; allowed: by 3 hostile clients or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate({"attack": attack, **hostile})
    with pytest.raises(ValueError, match="allowed in a client mod: bit-flip"):
        ByzantineMod(attack="tmp_mod:crowd")


SMALL = [
    *("--backend=inprocess", "--dataset=mnist", "--model=tiny-cnn", "--num-server-rounds=2"),
    *("--local-steps=1", "--batch-size=8", "--num-clients=5", "--byzantine-fraction=0.4"),
    *("--partition=iid", "--evaluate-every=2"),
]


@pytest.mark.parametrize(
    ("attack", "knows_a_target"),
    [("tmp_mod:my_attack:factor=3", False), ("tmp_mod:both_at_once:5", True)],
)
def test_it_is_played_from_the_command_line(
    attack: str, knows_a_target: bool, tmp_path: Path
) -> None:
    assert main(["run", *SMALL, f"--attack={attack}", f"--results-dir={tmp_path / 'out'}"]) == 0
    [record] = (tmp_path / "out").glob("*/*/*/*/run.json")
    played = {str(build_attacks(attack)[0]): 4}
    assert json.loads(record.read_text())["played"] == played
    last = json.loads((record.parent / "rounds.jsonl").read_text().splitlines()[-1])
    assert ("backdoor-success" in last) == knows_a_target


def test_a_comparison_sweeps_it(tmp_path: Path) -> None:
    arguments = ["compare", *SMALL, "--strategies", "gmd", "--attack=none,tmp_mod:my_attack"]
    assert main([*arguments, f"--results-dir={tmp_path / 'out'}"]) == 0
    [cells] = (tmp_path / "out").glob("*/cells.jsonl")
    assert [json.loads(line)["column"] for line in cells.read_text().splitlines()] == [
        *("none", "tmp_mod:my_attack", "tmp_mod:my_attack:3")
    ]
    [heads] = [t for t in (cells.parent / "table.md").read_text().splitlines() if "worst" in t]
    names = ["", "none", "worst class", "tmp_mod:my_attack", "worst", "mean", "s / round"]
    assert [text.strip() for text in heads[1:-1].split("|")] == names


def test_it_finds_its_memory_in_the_next_round() -> None:
    plan = AttackPlan(build_attacks("tmp_mod:crowd"), fraction=0.4, selection="fixed", seed=3)
    grid = AdversarialGrid(InProcessGrid(regression_app([_naming]), N, {}), plan, N)
    model, hostile = regression_model(), byzantine_clients(N, 0.4, 1, 3, "fixed")
    for number in (1, 2):
        messages = [
            train_message(model, node, {"server-round": number}) for node in grid.get_node_ids()
        ]
        weights = torch.stack(
            [
                torch.from_numpy(
                    to_numpy(model)["weight"] - to_numpy(reply.content["arrays"])["weight"]  # type: ignore[arg-type]
                )
                for reply in grid.send_and_receive(messages)
            ]
        )
        honest = weights[[p for p in range(N) if p not in hostile]].mean(0)
        for partition in hostile:
            torch.testing.assert_close(weights[partition], number * honest, rtol=1e-4, atol=1e-5)
    assert grid.state_dict()["memory"] == {"tmp_mod:crowd": {"round": 2}}


def test_each_colluder_may_send_a_lie_of_its_own() -> None:
    """Rows of what an attack returns are the players', in the order of their partitions."""
    plan = AttackPlan(build_attacks("tmp_mod:ranked"), fraction=0.4, selection="fixed", seed=3)
    grid = AdversarialGrid(InProcessGrid(regression_app([_naming]), N, {}), plan, N)
    model, honest = regression_model(), deliver([])
    messages = [train_message(model, node, {"server-round": 1}) for node in grid.get_node_ids()]
    hostile = sorted(byzantine_clients(N, 0.4, 1, 3, "fixed"))
    for partition, reply in enumerate(grid.send_and_receive(messages)):
        back = to_numpy(reply.content["arrays"])  # type: ignore[arg-type]
        sent = np.concatenate([(to_numpy(model)[key] - back[key]).ravel() for key in back])
        rank = 1 + hostile.index(partition) if partition in hostile else 1
        np.testing.assert_allclose(sent, rank * honest[partition], rtol=1e-4, atol=1e-6)
    assert grid.played == {"tmp_mod:ranked": len(hostile)}


def _naming(message: Message, context: Context, call_next: Any) -> Message:
    """Say whose reply it is."""
    reply: Message = call_next(message, context)
    reply.content["metrics"]["partition-id"] = int(context.node_config["partition-id"])  # type: ignore[index]
    return reply


def test_it_is_played_in_the_older_api() -> None:
    played: list[str] = []

    def watch(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if reply.has_content() and "byzantine" in reply.content:
            played.append(str(reply.content["byzantine"]["attack"]))  # type: ignore[index]
        return reply

    mod = ByzantineMod(attack="tmp_mod:my_attack:factor=3", fraction=0.2, seed=3)
    _, parameters = serve(GMD(**options()), [watch, mod], rounds=20)
    assert played == ["tmp_mod:my_attack:3"] * 40
    assert error_of(parameters) < 0.5
