"""Attacks that look at the server's last step: PoisonedFL's one direction, and ROP."""

import math
from pathlib import Path

import pytest
import torch
from flower_messages import regression_app, regression_model, to_numpy, train_message
from test_own_attack import _naming as naming
from torch import Tensor
from views import deployed, honest_rows, lie_of, view_of

from fl_bgmd.attacks import ATTACKS, AttackPlan, build_attacks, rop, signs_of
from fl_bgmd.options import OptionError
from simulations.adversary import AdversarialGrid
from simulations.grid import InProcessGrid

N = 10

# --------------------------------------------------------------------------- consistent


def rounds_of(spec: str, rule: str, rounds: int, honest: Tensor) -> tuple[list[Tensor], dict]:  # type: ignore[type-arg]
    """Play rounds under a rule with the same honest rows; return the lies and the memory."""
    pipeline, lies, last = deployed(rule, honest), [], None
    memory: dict[str, object] = {}
    for number in range(rounds):
        generator = torch.Generator().manual_seed(number)
        view = view_of(honest, memory=memory, last_step=last, generator=generator)
        lies.append(lie_of(spec, view))
        last = pipeline(lies[-1])
    return lies, memory


def test_all_lies_but_the_first_have_the_signs_of_one_direction() -> None:
    honest = honest_rows()
    lies, memory = rounds_of("consistent", "gmd", 12, honest)
    torch.testing.assert_close(lies[0], honest[-4:].mean(0))
    signs = signs_of(memory["seed"], honest.shape[1])
    assert all(torch.equal(lie.sign(), signs.to(lie)) for lie in lies[1:])
    assert 15 < int((signs > 0).sum()) < 45


def test_a_lie_is_as_many_times_as_long_as_the_last_step_as_its_factor_says() -> None:
    honest = honest_rows()
    step = torch.linspace(-1, 2, 60, dtype=torch.float64)
    memory: dict[str, object] = {}
    first = lie_of("consistent:3", view_of(honest, memory=memory, last_step=step))
    torch.testing.assert_close(first.abs(), 3 * step.abs())
    second = lie_of("consistent:3", view_of(honest, memory=memory, last_step=step / 2))
    others = (step / 2 - first / first.norm() * step.norm() / 2).abs()
    torch.testing.assert_close(second.abs(), 3 * others / others.norm() * step.norm() / 2)


def test_the_factor_shrinks_only_where_the_server_does_not_follow() -> None:
    honest = honest_rows(d=400)
    _, followed = rounds_of("consistent:8,every=5", "mean", 16, 0.01 * honest)
    assert followed["factor"] == 8.0
    _, resisted = rounds_of("consistent:8,every=5", "krum", 16, honest)
    assert resisted["factor"] == pytest.approx(8 * 0.7**3)
    _, least = rounds_of("consistent:0.7,every=1,shrink=0.8", "krum", 8, honest)
    assert least["factor"] == pytest.approx(0.7 * 0.8)  # 0.448 would be below 0.5


def test_averaging_goes_the_attackers_way() -> None:
    honest = honest_rows(d=400)
    lies, memory = rounds_of("consistent", "mean", 10, honest)
    signs = signs_of(memory["seed"], 400).to(honest)
    moved = sum(deployed("mean", honest)(lie) for lie in lies)
    assert float((moved * signs > 0).double().mean()) > 0.95
    # The signs of the honest mean are no direction of theirs.
    assert float((honest.mean(0) * signs > 0).double().mean()) < 0.6


@pytest.mark.parametrize("step", [torch.zeros(60), torch.zeros(60).double()])
def test_a_server_that_stood_still_is_pushed_nowhere(step: Tensor) -> None:
    assert not lie_of("consistent", view_of(honest_rows(), last_step=step)).any()


# --------------------------------------------------------------------------------- rop


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 150.0])
def test_the_perturbation_has_its_angle_to_the_reference_and_its_length(angle: float) -> None:
    honest, last = honest_rows(), honest_rows(seed=1)[0]
    mean = honest.mean(0)
    lie = rop(honest, last, 2.0, angle, 0.9, 0.7)
    moved = lie - (0.7 * last + 0.3 * mean)
    spread = math.sqrt(float((honest - mean).square().sum(1).mean()))
    assert float(moved.norm()) == pytest.approx(2 * spread)
    reference = 0.9 * last + 0.1 * mean
    cosine = float(torch.cosine_similarity(moved, reference, dim=0))
    assert cosine == pytest.approx(math.cos(math.radians(angle)), abs=1e-9)


def test_rop_by_hand_and_in_the_first_round() -> None:
    honest = torch.tensor([[2.0, 1.0], [2.0, -1.0]])
    # The mean is (2, 0), across it is (0, 1), the spread is 1.
    assert rop(honest, None).tolist() == pytest.approx([2.0, 1.0])
    # Across (0, 3) is (1, 0).
    lie = rop(honest, torch.tensor([0.0, 3.0]), 5.0, history=1.0)
    assert lie.tolist() == pytest.approx([5.0, 3.0])


@pytest.mark.parametrize("rule", ["mean", "gmd", "cmd", "centered-clipping"])
def test_rules_are_moved_across_the_way_they_go(rule: str) -> None:
    honest = honest_rows(d=400)
    pipeline, last = deployed(rule, honest), honest.mean(0)
    quiet, lie = rop(honest, last, 0.0), rop(honest, last, 1.0)
    torch.testing.assert_close(quiet, last)
    moved = pipeline(lie) - pipeline(quiet)
    assert float(torch.cosine_similarity(moved, lie - quiet, dim=0)) > 0.5


def test_what_they_know_and_what_is_refused() -> None:
    assert (ATTACKS["consistent"].knows, ATTACKS["rop"].knows) == ("colluders", "all")
    for spec, message in (
        ("consistent:-1", "factor is '-1'; allowed: .*0 or more"),
        ("consistent:every=0", "every is '0'; allowed: a whole number, 1 or more"),
        ("consistent:shrink=2", "shrink is '2'; allowed: .*above 0 to 1"),
        ("rop:angle=181", "angle is '181'; allowed: .*0 to 180"),
        ("rop:history=1.5", "history is '1.5'; allowed: .*0 to 1"),
        ("rop:relocation=-1", "relocation is '-1'; allowed: .*0 to 1"),
    ):
        with pytest.raises(OptionError, match=message):
            build_attacks(spec)


# ---------------------------------------------------------------------------- the grid


def serve(grid: AdversarialGrid, rounds: range, model: dict[str, Tensor]) -> list[Tensor]:
    """Play rounds with a server that takes a tenth of the mean; return the lies' weights."""
    hostile = min(AttackPlan(build_attacks("rop"), 0.4, "fixed", 3).roles(N, 1))
    lies = []
    for number in rounds:
        record = regression_model()
        for key, value in model.items():
            record[key] = type(record[key])(value.numpy())
        messages = [
            train_message(record, node, {"server-round": number}) for node in grid.get_node_ids()
        ]
        replies = [to_numpy(r.content["arrays"]) for r in grid.send_and_receive(messages)]  # type: ignore[arg-type]
        lies.append(model["weight"] - torch.from_numpy(replies[hostile]["weight"]))
        for key in model:
            trained = torch.stack([torch.from_numpy(reply[key]) for reply in replies]).mean(0)
            model[key] = model[key] + 0.1 * (trained - model[key])
    return lies


def start() -> dict[str, Tensor]:
    return {k: torch.from_numpy(v.copy()) for k, v in to_numpy(regression_model()).items()}


@pytest.mark.parametrize("spec", ["consistent", "rop"])
def test_the_grid_remembers_where_the_server_was_and_a_restart_does_too(
    spec: str, tmp_path: Path
) -> None:
    plan = AttackPlan(build_attacks(spec), fraction=0.4, selection="fixed", seed=3)

    def fresh() -> AdversarialGrid:
        return AdversarialGrid(InProcessGrid(regression_app([naming]), N, {}), plan, N)

    grid, model = fresh(), start()
    whole = serve(grid, range(1, 5), model)
    first, again = fresh(), start()
    parts = serve(first, range(1, 3), again)
    torch.save(first.state_dict(), tmp_path / "state")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state"))
    parts += serve(second, range(3, 5), again)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    # A grid that forgot the last step sends something else in its first round.
    forgot = fresh()
    state = torch.load(tmp_path / "state")
    forgot.load_state_dict({**state, "model": None})
    assert not torch.equal(serve(forgot, range(3, 4), start())[0], whole[2])


def test_a_plan_without_such_an_attack_keeps_no_model() -> None:
    plan = AttackPlan(build_attacks("ipm"), fraction=0.4, selection="fixed", seed=3)
    grid = AdversarialGrid(InProcessGrid(regression_app([naming]), N, {}), plan, N)
    serve(grid, range(1, 3), start())
    assert grid.state_dict()["model"] is None
