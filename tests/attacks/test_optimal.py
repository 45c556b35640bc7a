"""Attacks whose strength is searched on the deployed pipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from views import deployed, honest_rows, lie_of, view_of

from fl_bgmd.attacks import ATTACKS, ipm, min_max, min_sum
from fl_bgmd.options import OptionError

FIXED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "optimal-alie": lambda honest, z: honest.mean(0) - z * honest.std(0, correction=0),
    "optimal-ipm": ipm,
    "optimal-min-max": lambda honest, s: min_max(honest, s[1], perturbation=s[0]),
}
"""What an attack sends at a strength."""

STRENGTHS: dict[str, list[Any]] = {
    "optimal-alie": [s * z for s in (1, -1) for z in (0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0)],
    "optimal-ipm": [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0],
    "optimal-min-max": [
        (p, s) for p in ("std", "unit", "sign") for s in (0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0)
    ],
}
RULES = ("mean", "gmd", "trimmed-mean", "krum", "gmd+nearest-neighbor", "cmd+clipping")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FIXED)
def test_no_strength_tried_costs_the_rule_more_progress(name: str, rule: str) -> None:
    honest = honest_rows()
    pipeline = deployed(rule, honest)
    view = view_of(honest, pipeline=pipeline)
    lie = lie_of(name, view)
    progress = {
        s: float(pipeline(FIXED[name](honest, s)) @ honest.mean(0)) for s in STRENGTHS[name]
    }
    assert float(pipeline(lie) @ honest.mean(0)) == pytest.approx(min(progress.values()))
    torch.testing.assert_close(lie, FIXED[name](honest, view.memory["strength"]))


def test_averaging_follows_the_longest_lie_and_krum_does_not() -> None:
    honest = honest_rows()
    found = {}
    for rule in ("mean", "krum"):
        view = view_of(honest, pipeline=deployed(rule, honest))
        lie_of("optimal-ipm", view)
        found[rule] = view.memory["strength"]
    assert found["mean"] == 20.0
    assert found["krum"] < 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_deviations_are_added_where_taking_them_away_helps_the_server(sign: int) -> None:
    honest = sign * (1.0 + 0.1 * honest_rows().abs())  # every coordinate's mean has this sign
    view = view_of(honest, pipeline=deployed("mean", honest))
    lie_of("optimal-alie", view)
    assert view.memory["strength"] == sign * 10.0


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("every", [1, 3])
def test_the_search_is_in_every_nth_round(name: str, every: int) -> None:
    honest, tried = honest_rows(), []
    inner = deployed("gmd", honest)

    def pipeline(lies: Tensor, rounds: int = 1) -> Tensor:
        tried.append(rounds)
        return inner(lies, rounds)

    view = view_of(honest, pipeline=pipeline)
    for number in range(7):
        lie_of(f"{name}:{every}", view)
        assert len(tried) == len(STRENGTHS[name]) * (1 + number // every)
    assert set(tried) == {6}


@pytest.mark.parametrize("name", FIXED)
def test_it_knows_the_rule_and_is_refused_where_nobody_tells_it(name: str) -> None:
    assert ATTACKS[name].knows == "rule"
    with pytest.raises(ValueError, match=r"was not told the server's rule; allowed: .*preview="):
        lie_of(name, view_of(honest_rows()))
    with pytest.raises(OptionError, match=r"every is '0'; allowed: a whole number, 1 or more"):
        lie_of(f"{name}:every=0", view_of(honest_rows()))


@pytest.mark.parametrize("attack", [min_max, min_sum])
def test_perturbations_of_min_max_and_min_sum_are_those_of_the_paper(attack: Any) -> None:
    honest = honest_rows()
    mean = honest.mean(0)
    for perturbation, expected in (
        ("std", -honest.std(0, correction=0)),
        ("unit", -mean),
        ("sign", -mean.sign()),
    ):
        moved = attack(honest, perturbation=perturbation) - mean
        assert float(torch.cosine_similarity(moved, expected, dim=0)) == pytest.approx(1.0)
        distances = (mean + moved - honest).square().sum(1)
        apart = torch.cdist(honest, honest).square()
        limits = {
            min_max: (distances.max(), apart.max()),
            min_sum: (distances.sum(), apart.sum(1).max()),
        }
        assert float(limits[attack][0]) == pytest.approx(float(limits[attack][1]))
    with pytest.raises(OptionError, match=r"perturbation is 'inverse'; allowed: std, unit, sign"):
        attack(honest, perturbation="inverse")
