"""The adversary laboratory: what each attack sends, what it may know, and that it was played."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import regression_app, regression_model, train_message
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from warm_python import run_code

from fl_bgmd import attacks
from fl_bgmd.aggregators import geometric_median
from fl_bgmd.attacks import (
    ATTACKS,
    OMNISCIENT,
    AttackPlan,
    View,
    base_name,
    build_attacks,
    byzantine_clients,
    byzantine_roles,
)
from fl_bgmd.attacks.search import SEARCH_EVERY
from fl_bgmd.data import load
from fl_bgmd.mods import ByzantineMod
from fl_bgmd.options import NonNegative
from simulations.adversary import AdversarialGrid
from simulations.backends import run
from simulations.cli import main
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid
from simulations.study import PAPERS, read_study

UPDATE_ATTACKS = [name for name, attack in ATTACKS.items() if attack.place == "update"]
DATA_ATTACKS = [name for name, attack in ATTACKS.items() if attack.place == "data"]
D = 100_000


def make_view(d: int = 50, honest: int = 6, hostile: int = 4, seed: int = 0) -> View:
    rows = torch.randn(
        honest + hostile, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return View(
        update=rows[honest],
        generator=torch.Generator().manual_seed(seed),
        num_clients=honest + hostile,
        num_byzantine=hostile,
        past=(rows[0] * 2, rows[1] * 3),
        colluders=rows[honest:],
        honest=rows[:honest],
        colluder_ids=tuple(range(honest, honest + hostile)),
        honest_ids=tuple(range(honest)),
        memory={"noted": 3},
        last_step=rows[:honest].mean(0) / 2,
        pipeline=lambda lie, rounds=1: rounds * lie.expand(hostile, -1).mean(0),
    )


# ---------------------------------------------------------------------------- registry


def test_every_attack_of_the_papers_and_peers_is_there() -> None:
    assert set(ATTACKS) == {
        *("bit-flip", "gaussian", "replace-gaussian", "ascent", "sign-flip", "zero", "random"),
        *("nan", "inf", "huge", "free-rider", "delayed", "block-hijack", "alie", "ipm", "mimic"),
        *("min-max", "min-sum", "memory-poison", "memory-takeover", "memory-consistent", "fang"),
        *("fang-krum", "optimal-alie", "optimal-ipm", "optimal-min-max", "consistent", "rop"),
        *("backdoor", "label-shift", "random-labels", "image-noise", "impulse", "blur"),
        *("badnets", "model-replacement", "dba", "label-flip", "other-world", "two-groups"),
        "disguised",
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_is_complete(name: str) -> None:
    attack = ATTACKS[name]
    assert attack.name == name
    assert attack.source
    assert attack.summary.endswith((".", "'s"))
    assert all(option.help for option in attack.options.values())
    assert name in [str(bound) for bound in attack.swept()]
    for bound in attack.swept():
        [again] = build_attacks(str(bound))
        assert (again, str(again)) == (bound, str(bound))


def test_strengths_of_the_paper_and_of_the_authors_code() -> None:
    values = {name: list(ATTACKS[name].bound().values.values()) for name in ATTACKS}
    assert values["bit-flip"] == [100.0]
    assert values["gaussian"] == [10.0]
    assert values["backdoor"] == [8, 1.0]
    assert values["replace-gaussian"] == [200.0]
    assert values["alie"] == [None]
    assert values["fang"] == [None, SEARCH_EVERY]
    code = {name: attack.authors_code for name, attack in ATTACKS.items() if attack.authors_code}
    assert code == {"bit-flip": {"": 5.0}, "gaussian": {"cifar10": 100.0}, "backdoor": {"": 0}}
    again = read_study(PAPERS / "table2-fashion-mnist-authors-code.toml")
    assert {str(cell.config["attack"]) for cell in again.cells()} == {
        *("none", "bit-flip:5", "gaussian:10", "backdoor:0", "impulse")
    }


def test_a_spec_names_an_attack_with_its_options() -> None:
    text = "memory-poison:scale=3,strong=0.5+huge:1e+31+bit-flip:scale=100+fang:none+delayed:2"
    bounds = build_attacks(text)
    assert [bound.values for bound in bounds] == [
        {"scale": 3.0, "strong": 0.5},
        {"size": 1e31},
        {"scale": 100.0},
        {"beyond": None, "every": SEARCH_EVERY},
        {"rounds": 2},
    ]
    assert "+".join(map(str, bounds)) == (
        "memory-poison:scale=3,strong=0.5+huge:1e+31+bit-flip+fang+delayed:2"
    )
    assert base_name(text) == "memory-poison+huge+bit-flip+fang+delayed"
    assert build_attacks("none") == ()


def test_what_an_attack_is_given_follows_from_its_parameters() -> None:
    told = {name: (a.place, a.knows, a.players, a.target) for name, a in ATTACKS.items()}
    assert told["bit-flip"] == ("update", "own", 1, "")
    assert told["alie"] == ("update", "colluders", 2, "")
    assert told["ipm"] == told["mimic"] == ("update", "all", 1, "")
    assert told["fang"] == ("update", "rule", 1, "")
    assert told["backdoor"] == ("data", "own", 1, "target")
    assert [name for name, a in ATTACKS.items() if a.untrained] == ["free-rider"]
    assert [bound.num_past for bound in build_attacks("delayed:3+zero")] == [3, 0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("updates", "takes 'updates'; did you mean 'update'"),
        ("update, scale", "takes 'scale'; .*options, which have a default"),
        ("update, labels", "takes update, labels; allowed: those of an attack on the update, or"),
        ("generator", "takes generator; allowed: with update, colluders"),
        ("", "takes nothing; allowed: with update"),
        ("update, past", "takes update, past; allowed: past with an option 'rounds'"),
        ("update, honest, past, rounds: int = 3", "no more than its own update"),
        ("update, memory", "takes update, memory; allowed: memory with colluders"),
        ("update, last_step", "takes update, last_step; allowed: last_step with colluders"),
        ("update, scale: NonNegative = 1.0", "scale is -3.0; allowed: 0 or more"),
    ],
)
def test_parameters_that_make_no_attack_are_refused(parameters: str, message: str) -> None:
    names: dict[str, Any] = {"NonNegative": NonNegative, "__name__": "elsewhere"}
    exec(f"def own({parameters}): ...", names)
    with pytest.raises(ValueError, match=message):
        attacks.attack("a test", sweep=(-3.0,) if "NonNegative" in parameters else ())(names["own"])


def test_an_attack_that_is_called_directly_checks_its_options() -> None:
    with pytest.raises(ValueError, match=r"scale is -1\.0; allowed: 0 or more"):
        attacks.bit_flip(torch.ones(3), -1.0)
    with pytest.raises(ValueError, match=r"target is 3\.5; allowed: a whole number, 0 to 9"):
        attacks.backdoor(np.zeros(2, np.int64), target=3.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UPDATE_ATTACKS)
def test_an_attack_works_with_what_it_declares_to_know_and_changes_nothing(name: str) -> None:
    attack, view = ATTACKS[name], make_view()
    before = [t.clone() for t in (view.update, view.colluders, view.honest) if t is not None]
    result = attack.bound().lie(view)
    assert view.colluders is not None
    each_its_own = view.colluders.shape if "colluders" in attack.takes else None
    assert result.shape in (view.update.shape, each_its_own)
    assert result.dtype == view.update.dtype
    after = [t for t in (view.update, view.colluders, view.honest) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", UPDATE_ATTACKS)
def test_a_view_shows_no_more_than_was_declared(name: str) -> None:
    attack, view = ATTACKS[name], make_view()
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> Tensor:
        seen.update(given)
        return view.update

    replace(attack, function=spy).bound().lie(view)
    assert set(seen) == {*attack.takes, *attack.bound().values}
    if attack.knows == "own":
        assert set(attack.takes) <= {"update", "generator", "past"}
    if attack.knows not in OMNISCIENT:
        assert not set(attack.takes) & {"honest", "honest_ids", "pipeline"}
    if attack.knows == "own":
        assert not set(attack.takes) & {"memory", "last_step"}
    if attack.knows != "rule":
        assert "pipeline" not in attack.takes


@pytest.mark.parametrize("name", [n for n in UPDATE_ATTACKS if ATTACKS[n].knows not in OMNISCIENT])
def test_what_an_attack_does_not_know_cannot_change_what_it_sends(name: str) -> None:
    attack, view = ATTACKS[name], make_view()
    other = make_view(seed=1)
    sent = []
    for honest in (view.honest, other.honest):
        changed = View(
            update=view.update,
            generator=torch.Generator().manual_seed(3),
            num_clients=10,
            num_byzantine=4,
            past=view.past,
            colluders=view.colluders if attack.knows == "colluders" else other.colluders,
            honest=honest,
        )
        sent.append(attack.bound().lie(changed))
    assert torch.equal(sent[0].nan_to_num(), sent[1].nan_to_num())


# -------------------------------------------------------------------------- own updates


def test_simple_attacks_by_hand() -> None:
    update = torch.tensor([1.0, -2.0, 0.0])
    assert attacks.sign_flip(update).tolist() == [-1.0, 2.0, 0.0]
    assert attacks.ascent(update, 0.5).tolist() == [-0.5, 1.0, 0.0]
    assert attacks.zero(update).tolist() == [0.0, 0.0, 0.0]
    assert attacks.nan(update).isnan().all()
    assert attacks.inf(update).isinf().all()
    assert attacks.huge(update).tolist() == pytest.approx([-1e30, 1e30, -1e30])
    for small in (attacks.huge(update.half()), attacks.huge(update, 1e39)):
        assert small.abs().tolist() == [torch.finfo(small.dtype).max] * 3
    assert attacks.delayed(update, ()).tolist() == [1.0, -2.0, 0.0]
    assert attacks.delayed(update, (update * 5, update)).tolist() == [5.0, -10.0, 0.0]


def test_replaced_gaussian_has_its_deviation_and_nothing_of_the_update() -> None:
    noise = attacks.replace_gaussian(
        torch.full((D,), 7.0), 2.0, torch.Generator().manual_seed(0)
    ).double()
    assert abs(float(noise.mean())) < 5 * 2 / math.sqrt(D)
    assert abs(float(noise.var()) / 4 - 1) < 5 * math.sqrt(2 / D)


def test_random_has_the_length_asked_for_and_no_direction() -> None:
    update = torch.linspace(-1, 1, D)
    result = attacks.random(update, 3.0, torch.Generator().manual_seed(0))
    assert float(result.norm() / update.norm()) == pytest.approx(3.0, rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(result, update, dim=0))
    assert abs(cosine) < 5 / math.sqrt(D)


def test_hijacked_coordinates_are_a_tenth_and_always_the_same() -> None:
    update = torch.zeros(1000)
    first, second = attacks.block_hijack(update, 7.0), attacks.block_hijack(update + 1, 7.0)
    assert int((first == 7.0).sum()) == 100
    assert torch.equal(first == 7.0, second == 7.0)
    assert torch.equal(second[second != 7.0], torch.ones(900))


# -------------------------------------------------------------------------- collusion


@pytest.mark.parametrize(
    ("n", "f", "expected"),
    # n=50, f=24 is the example of the paper: s = 2, 24 of 26, z = 1.43.
    [(50, 24, 1.426), (10, 4, 0.4307), (10, 2, 0.0), (10, 1, 0.0), (10, 6, 0.0), (1, 1, 0.0)],
)
def test_z_of_alie(n: int, f: int, expected: float) -> None:
    assert attacks.alie_deviations(n, f) == pytest.approx(expected, abs=1e-3)


def test_alie_is_z_deviations_from_the_colluders_mean() -> None:
    rows = torch.randn(4, 20, dtype=torch.float64)
    expected = rows.numpy().mean(0) - 1.5 * rows.numpy().std(0)
    np.testing.assert_allclose(attacks.alie(rows, 10, 1.5).numpy(), expected, rtol=1e-12)
    z = attacks.alie_deviations(10, 4)
    assert torch.equal(attacks.alie(rows, 10), attacks.alie(rows, 10, z))
    assert torch.equal(attacks.alie(rows[:2], 10, num_byzantine=4), attacks.alie(rows[:2], 10, z))


def test_alie_is_an_attack_where_its_formula_has_no_z() -> None:
    rows = torch.randn(2, 20, dtype=torch.float64)
    assert torch.equal(attacks.alie(rows, 10), attacks.alie(rows, 10, 1.5))


def test_ipm_points_against_the_honest_mean() -> None:
    rows = torch.randn(6, 20, dtype=torch.float64)
    torch.testing.assert_close(attacks.ipm(rows, 0.5), -0.5 * rows.mean(0))


def test_mimic_chooses_the_client_furthest_out() -> None:
    rows = torch.randn(6, 30) * 0.1
    rows[3, 0] += 10.0
    assert attacks.mimic_victim(rows) == 3
    assert attacks.mimic_victim(torch.ones(3, 4)) == 0


def pairwise(rows: Tensor) -> Tensor:
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2


@given(n=st.integers(2, 9), d=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_min_max_and_min_sum_go_as_far_as_their_limits_and_no_further(
    n: int, d: int, seed: int
) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for attack, measure, limit in (
        (attacks.min_max, lambda s: s.max(), pairwise(rows).max()),
        (attacks.min_sum, lambda s: s.sum(), pairwise(rows).sum(1).max()),
    ):
        assert float(measure((attack(rows) - rows).square().sum(1))) == pytest.approx(
            float(limit), rel=1e-9
        )
        # Every coordinate moved against its own spread.
        moved = rows.mean(0) - attack(rows)
        assert (moved >= -1e-12).all()


def test_equal_honest_updates_leave_no_room() -> None:
    rows = torch.ones(4, 3)
    for attack in (attacks.min_max, attacks.min_sum):
        torch.testing.assert_close(attack(rows), rows[0])


def test_memory_poison_is_plausible_where_it_is_looked_at() -> None:
    rows = torch.randn(6, 100) * 0.01
    rows[:, :20] += 5.0
    poisoned = attacks.memory_poison(rows, 100.0)
    torch.testing.assert_close(poisoned[:20], rows.mean(0)[:20])
    torch.testing.assert_close(poisoned[20:], -100 * rows.mean(0)[20:])


def test_memory_takeover_is_the_median_where_the_block_is_and_a_push_elsewhere() -> None:
    rows = torch.randn(5, 10, dtype=torch.float64) * 0.01
    rows[:, :3] += torch.tensor([5.0, 5.0, 5.0, 5.0, 50.0])[:, None]
    running = torch.arange(10, dtype=torch.float64)
    lie = attacks.takeover_lie(rows, running, 3.0)
    median = geometric_median(rows[:, :3]).vector
    torch.testing.assert_close(lie[:3], median, rtol=0.0, atol=1e-2)
    assert float(rows.mean(0)[0] - lie[0]) > 8  # not the mean, which one client moved
    torch.testing.assert_close(lie[3:], -3 * running[3:])


def test_memory_consistent_has_the_honest_length_against_the_running_mean() -> None:
    rows = torch.zeros(3, 10)
    rows[:, :2] = torch.tensor([[3.0, 4.0], [6.0, 8.0], [9.0, 12.0]])
    running = torch.ones(10)
    lie = attacks.consistent_lie(rows, running, 0.5)
    assert lie[:2].tolist() == [6.0, 8.0]
    # The median norm is 10, the direction has 1 / sqrt(10) in each coordinate.
    torch.testing.assert_close(lie[2:], torch.full((8,), -0.5 * 10 / math.sqrt(10)))
    assert attacks.consistent_lie(rows, torch.zeros(10))[2:].tolist() == [0.0] * 8


def test_the_directed_deviation_is_beyond_the_extreme_against_the_mean() -> None:
    rows = torch.tensor([[1.0, -1.0, -4.0, 0.0], [3.0, 5.0, -2.0, 0.0]])
    assert attacks.directed_deviation(rows, 1.0).tolist() == [1.0, -1.0, -2.0, 0.0]
    assert attacks.directed_deviation(rows, 2.0).tolist() == [0.0, -2.0, 0.0, 0.0]
    assert attacks.directed_deviation(rows, 5.0).tolist() == [-3.0, -5.0, 6.0, 0.0]


# ---------------------------------------------------------------------- searched strengths

SEARCHED = {
    "memory-takeover": (0.5, 1.0, 3.0, 10.0, 30.0, 100.0),
    "memory-consistent": (0.25, 0.5, 1.0, 2.0, 5.0, 20.0),
    "fang": (1.0, 1.25, 2.0, 5.0),
    "fang-krum": (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0),
}


def lie_of(name: str, view: View, strength: float | None = None) -> Tensor:
    [bound] = build_attacks(name if strength is None else f"{name}:{strength}")
    return bound.lie(view)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("worst", [0, 2, -1])
def test_the_strength_that_harms_most_is_found_and_kept_for_twelve_rounds(
    name: str, worst: int
) -> None:
    """Under a rule that lets one strength through, and every other one undone."""
    honest = make_view().honest
    assert honest is not None
    wanted = SEARCHED[name][worst]
    allowed = lie_of(name, replace(make_view(), memory={}), wanted)
    tried: list[int] = []

    def pipeline(lie: Tensor, rounds: int = 1) -> Tensor:
        tried.append(rounds)
        return -rounds * honest.mean(0) if torch.equal(lie, allowed) else torch.zeros_like(lie)

    view = replace(make_view(), memory={}, pipeline=pipeline)
    for number in range(13):
        # The honest updates stay, so the running mean does up to its rounding.
        view.memory.pop("running-mean", None)
        assert torch.equal(lie_of(name, view), allowed), number
        searches = 1 + number // 12
        assert tried == [6] * len(SEARCHED[name]) * searches
    assert view.memory["strength"] == wanted


@pytest.mark.parametrize("name", SEARCHED)
def test_a_fixed_strength_asks_nobody(name: str) -> None:
    def pipeline(lie: Tensor, rounds: int = 1) -> Tensor:
        raise AssertionError

    view = replace(make_view(), memory={}, pipeline=pipeline)
    assert torch.equal(
        lie_of(name, view, 3.0), lie_of(name, replace(view, memory={}, pipeline=None), 3.0)
    )


def test_without_the_rule_nothing_is_searched() -> None:
    view = replace(make_view(), memory={}, pipeline=None)
    assert torch.equal(lie_of("fang", view), lie_of("fang", view, 2.0))
    for name in ("memory-takeover", "memory-consistent"):
        with pytest.raises(ValueError, match=r"strength is None .*allowed: a strength,"):
            lie_of(name, view)


def test_an_outcome_that_is_no_number_is_not_the_worst() -> None:
    def pipeline(lie: Tensor, rounds: int = 1) -> Tensor:
        tried.append(rounds)
        return lie * (1.0 if len(tried) == 2 else math.nan)

    tried: list[int] = []
    view = replace(make_view(), memory={}, pipeline=pipeline)
    lie_of("fang", view)
    assert view.memory["strength"] == SEARCHED["fang"][1]


def test_the_running_mean_follows_the_honest_means() -> None:
    view = replace(make_view(), memory={})
    honest = view.honest
    assert honest is not None
    lie_of("memory-takeover", view, 1.0)
    assert torch.equal(view.memory["running-mean"], honest.mean(0))
    lie_of("memory-takeover", replace(view, honest=3 * honest), 1.0)
    torch.testing.assert_close(view.memory["running-mean"], 1.2 * honest.mean(0))


# -------------------------------------------------------------------------------- data


def images(shape: tuple[int, ...] = (50, 28, 28)) -> np.ndarray:
    return np.full(shape, 128, dtype=np.uint8)


@pytest.mark.parametrize("name", DATA_ATTACKS)
@pytest.mark.parametrize("shape", [(7, 28, 28), (7, 32, 32, 3)])
def test_a_data_attack_keeps_shapes_and_leaves_its_input_alone(
    name: str, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(7, dtype=np.int64)
    raw.flags.writeable = labels.flags.writeable = False
    changed, wrong = ATTACKS[name].bound().corrupt(raw, labels, 10, rng)
    assert (changed.shape, changed.dtype) == (shape, np.uint8)
    assert (wrong.shape, wrong.dtype) == ((7,), np.int64)
    takes = {"images", "labels"} & set(ATTACKS[name].takes)
    assert ((changed != raw).any(), (wrong != labels).any()) == (
        "images" in takes,
        "labels" in takes,
    )


def test_label_attacks_by_hand() -> None:
    labels = np.array([0, 3, 9])
    assert attacks.backdoor(labels).tolist() == [8, 8, 8]
    assert attacks.label_shift(labels).tolist() == [9, 6, 0]
    drawn = attacks.random_labels(np.zeros(10_000, np.int64), 10, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert (abs(counts - 1000) < 5 * math.sqrt(900)).all()


def test_image_noise_is_of_ten_gray_levels_before_normalization() -> None:
    noisy = attacks.image_noise(images(), 10.0, np.random.default_rng(0)).astype(float) - 128
    assert abs(noisy.mean()) < 5 * 10 / math.sqrt(noisy.size)
    assert noisy.std() == pytest.approx(10.0, rel=0.02)
    white = attacks.image_noise(images() + 127, 10.0, np.random.default_rng(0))
    assert white.max() == 255
    assert white.min() < 255


@pytest.mark.parametrize("shape", [(50, 28, 28), (50, 32, 32, 3)])
def test_impulses_hit_nine_tenths_of_the_pixels(shape: tuple[int, ...]) -> None:
    hit = attacks.impulse(images(shape), 0.9, np.random.default_rng(0))
    pixels = hit.reshape(*shape[:3], -1)
    assert (pixels == pixels[..., :1]).all()
    count = math.prod(shape[:3])
    for value, share in ((0, 0.45), (255, 0.45), (128, 0.1)):
        found = (pixels[..., 0] == value).mean()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_blur_spreads_a_point_and_keeps_its_light() -> None:
    point = np.zeros((1, 28, 28), np.uint8)
    point[0, 14, 14] = 255
    blurred = attacks.blur(point, 1.0)[0].astype(float)
    assert blurred.max() == blurred[14, 14] < 60
    assert blurred.sum() == pytest.approx(255, abs=12)
    ys, xs = np.mgrid[:28, :28]
    variance = (blurred * (ys - 14) ** 2).sum() / blurred.sum()
    assert variance == pytest.approx(1.0, abs=0.15)
    assert (blurred * xs).sum() / blurred.sum() == pytest.approx(14)


# ------------------------------------------------------------------------------- roles


def test_mixed_attacks_are_dealt_out_in_turns() -> None:
    roles = byzantine_roles(("bit-flip", "alie"), 10, 0.5, 3, 1)
    assert set(roles) == byzantine_clients(10, 0.5, 3, 1)
    assert sorted(roles.values()) == ["alie"] * 2 + ["bit-flip"] * 3
    with pytest.raises(ValueError, match="attacks is empty"):
        byzantine_roles((), 10, 0.5, 3, 1)


def test_every_process_plans_the_same() -> None:
    code = (
        "from fl_bgmd.attacks import AttackPlan, build_attacks; "
        "p = AttackPlan(build_attacks('zero+ipm'), fraction=0.4, seed=5); "
        "roles = [sorted((c, str(b)) for c, b in p.roles(10, r).items()) for r in range(5)]; "
        "print(roles, p.client_seed(3, 4))"
    )
    here = AttackPlan(build_attacks("zero+ipm"), fraction=0.4, seed=5)
    expected = [sorted((c, str(b)) for c, b in here.roles(10, r).items()) for r in range(5)]
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{expected} {here.client_seed(3, 4)}"


def test_a_plan_refuses_names_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"attack is 'flip'; did you mean 'bit-flip'.* allowed: b"):
        build_attacks("flip")


@pytest.mark.parametrize(
    "former", [{"attack.scale": 5.0}, {"attack.preset": "paper"}, {"attack.scale": 0.0}]
)
def test_former_keys_name_what_took_their_place(former: dict[str, Any]) -> None:
    """Also in apps of others, whose run configuration nobody else checks."""
    message = f'{next(iter(former))} .*is no longer supported; .* attack = "bit-flip:5"'
    with pytest.raises(ValueError, match=message):
        AttackPlan.from_config({"attack": "bit-flip", **former})
    with pytest.raises(ConfigError, match=message):
        validate({"attack": "bit-flip", "byzantine-fraction": 0.4, **former})


# --------------------------------------------------------------------------- the grids


def echo_app(mods: list[Any] | None = None) -> ClientApp:
    """Return an app whose update is (partition + 1) * round; it reports its partition."""
    app = ClientApp(mods=mods or [])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        [sent] = message.content.array_records.values()
        moved = {
            key: value - (1.0 + partition) * number
            for key, value in sent.to_torch_state_dict().items()
        }
        metrics = MetricRecord({"num-examples": 1, "partition-id": partition})
        content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def play(plan: AttackPlan, rounds: int = 1, app: ClientApp | None = None) -> list[Any]:
    """Return the updates by partition in each round, and the grid."""
    config = {
        "attack": "+".join(map(str, plan.attacks)),
        "byzantine-fraction": plan.fraction,
        "seed": plan.seed,
    }
    grid = AdversarialGrid(InProcessGrid(app or echo_app([ByzantineMod()]), 10, config), plan, 10)
    model = regression_model()
    key = "weight"
    history = []
    for number in range(1, rounds + 1):
        messages = [
            train_message(model, node, {"server-round": number}, "train")
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages))
        assert all(set(reply.content) == {"arrays", "metrics"} for reply in replies)
        history.append(
            [
                float((model[key].numpy() - reply.content["arrays"][key].numpy()).flat[0])
                for reply in replies
            ]
        )
    return [history, grid]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ipm", lambda honest, colluders: -0.5 * np.mean(honest)),
        ("alie", lambda honest, colluders: np.mean(colluders) - 0.43073 * np.std(colluders)),
        ("min-sum", lambda honest, colluders: None),
        ("mimic", lambda honest, colluders: None),
    ],
)
def test_colluders_are_played_by_the_grid(
    name: str, expected: Callable[[Any, Any], float | None]
) -> None:
    plan = AttackPlan(build_attacks(name), fraction=0.4, seed=3)
    [[sent], grid] = play(plan)
    hostile = byzantine_clients(10, 0.4, 1, 3)
    honest = [p + 1.0 for p in range(10) if p not in hostile]
    assert [sent[p] for p in range(10) if p not in hostile] == pytest.approx(honest)
    [lie] = {round(sent[p], 5) for p in hostile}
    assert grid.played == {name: 4}
    value = expected(honest, [p + 1.0 for p in hostile])
    if value is not None:
        assert lie == pytest.approx(value, rel=1e-4)
    if name == "mimic":
        assert min(abs(lie - h) for h in honest) < 1e-5


def test_mimic_repeats_one_client_throughout() -> None:
    """Also in rounds in which the victim is hostile itself, and after a restart."""
    plan = AttackPlan(build_attacks("mimic"), fraction=0.4, seed=3)
    [history, grid] = play(plan, rounds=12)
    [victim] = {
        round(sent[p] / number) - 1
        for number, sent in enumerate(history, 1)
        for p in byzantine_clients(10, 0.4, number, 3)
    }
    assert any(victim in byzantine_clients(10, 0.4, number, 3) for number in range(1, 13))
    again = AdversarialGrid(InProcessGrid(echo_app([]), 10, {}), plan, 10)
    again.load_state_dict(json.loads(json.dumps(grid.state_dict())))
    assert again.state_dict() == grid.state_dict()
    assert again.state_dict()["memory"] == {"mimic": {"victim": victim}}


def test_alie_knows_how_many_are_hostile_when_others_play_another_attack() -> None:
    plan = AttackPlan(build_attacks("bit-flip+alie"), fraction=0.4, seed=3)
    [[sent], _] = play(plan)
    own = [p + 1.0 for p, bound in plan.roles(10, 1).items() if str(bound) == "alie"]
    expected = np.mean(own) - attacks.alie_deviations(10, 4) * np.std(own)
    lies = [sent[p] for p, bound in plan.roles(10, 1).items() if str(bound) == "alie"]
    assert lies == pytest.approx([expected] * 2, rel=1e-4)


def test_the_outcome_is_of_all_rows_with_the_lie_in_the_players_places() -> None:
    """By partitions, whatever the order in which replies arrive, and the same lie with it."""

    class Shuffled(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            return list(super().send_and_receive(messages, timeout=timeout))[::-1]

    plan = AttackPlan(build_attacks("memory-takeover+zero"), fraction=0.4, seed=3)
    roles = plan.roles(10, 1)
    config = {"attack": "memory-takeover+zero", "byzantine-fraction": 0.4, "seed": 3}
    found = []
    for kind in (InProcessGrid, Shuffled):
        asked: list[tuple[Tensor, list[int], list[float], int]] = []

        def preview(rows: Tensor, nodes: list[int], examples: list[float], rounds: int) -> Tensor:
            asked.append((rows, nodes, examples, rounds))  # noqa: B023 - used within the turn
            return rows.mean(0)

        inner = kind(echo_app([ByzantineMod()]), 10, config)
        grid = AdversarialGrid(inner, plan, 10, preview)
        messages = [
            train_message(regression_model(), node, {"server-round": 1}, "train")
            for node in grid.get_node_ids()
        ]
        replies = {
            int(reply.content["metrics"]["partition-id"]): reply
            for reply in grid.send_and_receive(messages)
        }
        assert len(asked) == len(SEARCHED["memory-takeover"])
        rows, nodes, examples, rounds = asked[-1]
        assert (examples, rounds) == ([1.0] * 10, 6)
        assert nodes == [replies[p].metadata.src_node_id for p in range(10)]
        for partition in range(10):
            values = rows[partition].numpy()
            if partition not in roles:
                np.testing.assert_allclose(values, partition + 1.0, rtol=1e-5)
            elif str(roles[partition]) == "zero":
                assert not values.any()
            else:
                assert values.min() < -100  # the last one tried, 100 times the mean
        found.append(
            (asked, {p: reply.content["arrays"]["weight"] for p, reply in replies.items()})
        )
    [(first, sent), (second, resent)] = found
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert all(np.array_equal(sent[p].numpy(), resent[p].numpy()) for p in range(10))


def test_what_a_search_has_found_outlives_a_restart(tmp_path: Path) -> None:
    plan = AttackPlan(build_attacks("memory-takeover"), fraction=0.4, selection="fixed", seed=3)
    asked: list[int] = []

    def preview(rows: Tensor, nodes: list[int], examples: list[float], rounds: int) -> Tensor:
        asked.append(rounds)
        return rows.mean(0)

    def lies(grid: AdversarialGrid, number: int) -> list[bytes]:
        messages = [
            train_message(regression_model(), node, {"server-round": number}, "train")
            for node in grid.get_node_ids()
        ]
        return [r.content["arrays"]["weight"].data for r in grid.send_and_receive(messages)]

    first, second = (
        AdversarialGrid(InProcessGrid(echo_app(), 10, {}), plan, 10, preview) for _ in range(2)
    )
    lies(first, 1)
    assert len(asked) == 6
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state"))
    assert lies(first, 2) == lies(second, 2)
    assert len(asked) == 6


def test_colluders_need_nobody_honest() -> None:
    [_, grid] = play(AttackPlan(build_attacks("alie"), fraction=1.0))
    assert grid.played == {"alie": 10}


def test_a_grid_refuses_clients_that_its_roles_are_not_drawn_for() -> None:
    plan = AttackPlan(build_attacks("ipm"), fraction=0.4)
    grid = AdversarialGrid(InProcessGrid(echo_app([]), 10, {}), plan, 8)
    messages = [
        train_message(regression_model(), node, {"server-round": 1}, "train")
        for node in grid.get_node_ids()
    ]
    with pytest.raises(ValueError, match="partition-id is 9 in a reply; allowed: 0 to 7"):
        grid.send_and_receive(messages)


def test_mixed_attacks_run_in_one_round() -> None:
    plan = AttackPlan(build_attacks("bit-flip+ipm+zero"), fraction=0.4, seed=1)
    [[sent], grid] = play(plan)
    roles = plan.roles(10, 1)
    assert grid.played == {"bit-flip": 2, "ipm": 1, "zero": 1}
    honest = np.mean([p + 1.0 for p in range(10) if p not in roles])
    for partition, bound in roles.items():
        truth = {"bit-flip": -100 * (partition + 1.0), "ipm": -0.5 * honest, "zero": 0.0}
        assert sent[partition] == pytest.approx(truth[str(bound)], rel=1e-5)


def test_the_same_attack_with_two_strengths_is_two_attacks() -> None:
    plan = AttackPlan(build_attacks("bit-flip:5+bit-flip+ipm:2+ipm"), fraction=0.4, seed=1)
    [[sent], grid] = play(plan)
    roles = plan.roles(10, 1)
    assert grid.played == {"bit-flip:5": 1, "bit-flip": 1, "ipm:2": 1, "ipm": 1}
    honest = np.mean([p + 1.0 for p in range(10) if p not in roles])
    for partition, bound in roles.items():
        own = partition + 1.0
        truth = {"bit-flip:5": -5 * own, "bit-flip": -100 * own}
        truth |= {"ipm:2": -2 * honest, "ipm": -0.5 * honest}
        assert sent[partition] == pytest.approx(truth[str(bound)], rel=1e-5)


def test_delayed_updates_are_those_of_earlier_rounds() -> None:
    plan = AttackPlan(build_attacks("delayed:2"), fraction=1.0, seed=0)
    [history, grid] = play(plan, rounds=4)
    # The update of client p in round r is (p + 1) r; two rounds are remembered.
    assert [row[0] for row in history] == pytest.approx([1.0, 1.0, 1.0, 2.0])
    assert [row[4] for row in history] == pytest.approx([5.0, 5.0, 5.0, 10.0])
    assert grid.played == {"delayed:2": 30}


def test_delayed_by_different_numbers_of_rounds() -> None:
    plan = AttackPlan(build_attacks("delayed:1+delayed:3"), fraction=1.0, seed=0)
    [history, _] = play(plan, rounds=5)
    for partition, bound in plan.roles(10, 5).items():
        sent_then = {"delayed:1": 4, "delayed:3": 2}[str(bound)]
        assert history[4][partition] == pytest.approx((partition + 1.0) * sent_then)


def test_a_free_rider_sends_back_what_it_got() -> None:
    [[sent], grid] = play(AttackPlan(build_attacks("free-rider"), fraction=0.3, seed=0))
    assert sorted(sent)[:3] == [0.0, 0.0, 0.0]
    assert grid.played == {"free-rider": 3}


def test_clients_that_do_not_name_themselves_cannot_be_played() -> None:
    plan = AttackPlan(build_attacks("ipm"), fraction=0.4, seed=3)
    with pytest.raises(ValueError, match="partition-id"):
        play(plan, app=regression_app())


# -------------------------------------------------------------------------- whole runs

SMALL = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "partition": "iid",
    "num-server-rounds": 3,
    "local-steps": 1,
    "batch-size": 16,
    "byzantine-fraction": 0.4,
    "evaluate-every": 3,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_played_in_a_run(name: str) -> None:
    result = run(validate(SMALL | {"attack": name}), backend="inprocess")
    assert result.status in ("finished", "diverged"), result.error
    expected = 12
    if name == "delayed":
        # In the first round nobody has anything stale to send.
        expected = 8
    assert result.played == {name: expected}


def test_an_attack_that_was_not_played_is_a_failure() -> None:
    result = run(
        validate(SMALL | {"attack": "delayed", "num-server-rounds": 1}), backend="inprocess"
    )
    assert result.status == "failed"
    assert "attack delayed was not played once" in result.error


def test_the_backdoor_is_measured() -> None:
    config = SMALL | {"attack": "backdoor", "strategy": "mean", "byzantine-fraction": 1.0}
    config |= {"num-server-rounds": 60, "learning-rate": 0.1, "evaluate-every": 60}
    result = run(validate(config), backend="inprocess")
    last = result.rounds[-1]
    assert last["backdoor-success"] > 0.99
    assert last["class-accuracies"][8] > 0.99
    labels = load("mnist").test_labels
    weights = np.bincount(labels) / len(labels)
    assert weights @ last["class-accuracies"] == pytest.approx(last["accuracy"], abs=1e-9)


# Attacks that leave plain averaging standing, and why: the mean survives what is a share of the
# honest update (zero, free-rider, delayed), within its spread (alie, ipm, mimic, min-sum, min-max,
# rop), screened (nan, inf), only a harder image (image-noise, impulse, blur), or wrong about few
# images (badnets, model-replacement, label-flip).
BREAKS_AVERAGING = {
    *("bit-flip", "gaussian", "replace-gaussian", "sign-flip", "ascent", "huge"),
    *("block-hijack", "memory-poison", "memory-takeover", "memory-consistent", "fang"),
    *("fang-krum", "optimal-alie", "optimal-ipm", "optimal-min-max", "consistent"),
    *("backdoor", "label-shift", "dba", "two-groups"),
}


@pytest.fixture(scope="module")
def averaging() -> Callable[[str], float]:
    """Return the final accuracy of plain averaging under an attack."""

    def run_it(name: str) -> float:
        config: dict[str, Any] = {
            **SMALL,
            "model": "mlp",
            "strategy": "mean",
            "num-server-rounds": 15,
            "evaluate-every": 15,
            "learning-rate": 0.1,
            "batch-size": 64,
            "attack": name,
        }
        if name == "none":
            config["byzantine-fraction"] = 0.0
        return run(validate(config), backend="inprocess").final_accuracy

    return lru_cache(run_it)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_averaging_under_each_attack(name: str, averaging: Callable[[str], float]) -> None:
    lost = averaging("none") - averaging(name)
    assert (lost > 0.1) == (name in BREAKS_AVERAGING), lost


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attack": "bit-flip+flip"}, "attack is 'flip'; did you mean .* allowed: bit-flip"),
        ({"attack": "zero+zero"}, "different attacks"),
        ({"attack": "zero+nan", "byzantine-fraction": 0.1}, "at most one for each hostile"),
        ({"attack": "bit-flip+bit-flip:100"}, "different attacks"),
        ({"attack": "zero:2"}, "attack is 'zero:2': zero has no option; allowed: 'zero' alone"),
        ({"attack": "backdoor:10"}, "target is '10'; allowed: a whole number, 0 to 9"),
        ({"attack": "delayed:0.5"}, "rounds is '0.5'; allowed: a whole number, 1 or more"),
        ({"attack": "impulse:90"}, "share is '90'; allowed: .*above 0 to 1"),
        ({"attack": "fang:0.5"}, "beyond is '0.5'; allowed: .*1 or more, and finite, or None"),
        ({"attack": "alie:0"}, "z is '0'; allowed: .*above 0, and finite, or None"),
        ({"attack": "bit-flip:sclae=2"}, "no option 'sclae'; did you mean 'scale'"),
        (
            {"attack": "bit-flip+alie", "byzantine-fraction": 0.3},
            "with alie played by 1; allowed: by 2 hostile",
        ),
        (
            {"attack": "alie", "byzantine-fraction": 0.1},
            "with alie played by 1; allowed: by 2 hostile",
        ),
    ],
)
def test_attacks_that_cannot_be_played_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"byzantine-fraction": 0.4, "attack": "bit-flip", **given})


# -------------------------------------------------------------------- listed and counted


def test_the_attacks_are_listed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attacks", "--dataset=cifar10", f"--picture={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("bit-flip", "alie", "impulse"))
    assert (tmp_path / "data-attacks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("attack", ["ipm", "bit-flip"])
@pytest.mark.parametrize("compressor", ["scaled-rand-k:0.5", "rand-k:0.5"])
def test_attacks_are_played_where_the_server_chose_the_coordinates(
    attack: str, compressor: str
) -> None:
    shared = {"compressor": compressor, "shared-coordinates": "on", "strategy": "gmd"}
    result = run(validate(SMALL | shared | {"attack": attack}), backend="inprocess")
    assert result.status == "finished", result.error
    assert result.played == {attack: 12}


def test_a_stale_update_is_at_least_one_round_old() -> None:
    assert AttackPlan(build_attacks("delayed:1")).num_past == 1
    with pytest.raises(ValueError, match="rounds is '0'; allowed: a whole number, 1 or more"):
        build_attacks("delayed:0")


def test_only_attacks_of_the_plan_are_counted() -> None:
    """A ConfigRecord of a client's own does not fill checkpoints and results with its names."""

    def boast(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        reply.content["byzantine"] = ConfigRecord({"attack": f"name-{context.node_id}"})
        return reply

    plan = AttackPlan(build_attacks("ipm"), fraction=0.2)
    [_, grid] = play(plan, 2, echo_app([boast]))
    assert grid.played == {"ipm": 4}
