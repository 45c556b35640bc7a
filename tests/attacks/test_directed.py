"""The directed deviation against Krum, and liars in two groups."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from views import deployed, honest_rows, lie_of, view_of

from fl_bgmd.aggregators import fools_gold, krum
from fl_bgmd.aggregators.directions import top_of_few
from fl_bgmd.aggregators.rows import gram_matrix
from fl_bgmd.attacks import ATTACKS, disguised, fang_krum, krum_deviation, two_groups


def picked(honest: torch.Tensor, size: float, f: int) -> bool:
    """Whether Krum picks one of f equal lies."""
    lie = -size * honest.mean(0).sign()
    rows = torch.cat([lie.expand(f, -1), honest])
    return torch.equal(krum(rows, byzantine_fraction=f / len(rows)).vector, lie)


@settings(max_examples=40, deadline=None)
@given(h=st.integers(5, 12), f=st.integers(2, 4), d=st.integers(3, 40), seed=st.integers(0, 999))
def test_krum_picks_a_lie_of_the_size_and_none_of_twice_it_unless_it_is_the_bound(
    h: int, f: int, d: int, seed: int
) -> None:
    honest = honest_rows(h, d, seed)
    size = krum_deviation(honest, f)
    if size < 1e-5:
        return
    assert picked(honest, size, f)
    apart = torch.cdist(honest, honest).square().sort(1).values[:, 1 : 1 + h - 2].sum(1)
    bound = math.sqrt(float(apart.min()) / (max(1, h - f - 1) * d))
    bound += float(honest.norm(dim=1).max()) / math.sqrt(d)
    steps = math.log2(bound / size)
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert steps < 0.5 or not picked(honest, 2 * size, f)


def test_the_size_by_hand() -> None:
    """Honest rows of 1, 2, 3, 4 in one coordinate, two lies: n = 6, two neighbors count.

    The bound: row 2's distances to its two nearest are 1 and 1, so sqrt(2 / 1) + 4. A lie at -x has
    its twin and row 1: (1 + x)^2. Row 2 has 2, so x < sqrt(2) - 1, reached after four halvings.
    """
    honest = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    bound = math.sqrt(2) + 4
    assert krum_deviation(honest, 2) == pytest.approx(bound / 16)
    assert bound / 16 < math.sqrt(2) - 1 < bound / 8


def test_rows_too_close_for_any_lie_leave_the_least_that_is_tried() -> None:
    honest = torch.ones(8, 4)
    assert 0 < krum_deviation(honest, 2) < 1e-5


def test_what_it_does_to_krum_and_to_averaging() -> None:
    """Krum is turned round by a lie that averaging survives."""
    honest = honest_rows()
    honest = honest - 0.7 * honest.mean(0)  # clients that differ more than they agree
    lie = lie_of("fang-krum", view_of(honest))
    assert torch.equal(deployed("krum", honest)(lie), lie)
    assert float(lie @ honest.mean(0)) < 0
    assert float(deployed("mean", honest)(lie) @ honest.mean(0)) > 0


def test_a_length_is_in_median_honest_norms() -> None:
    honest = honest_rows()
    lie = fang_krum(honest, 4, {}, None, 0.5)
    assert float(lie.norm()) == pytest.approx(0.5 * float(honest.norm(dim=1).median()))
    assert torch.equal(lie.sign(), -honest.mean(0).sign())
    view = view_of(honest, pipeline=deployed("mean", honest))
    assert torch.equal(lie_of("fang-krum", view), fang_krum(honest, 4, {}, None, 20.0))


def test_it_is_declared_with_the_rule_and_refuses_negative_lengths() -> None:
    assert ATTACKS["fang-krum"].knows == "rule"
    with pytest.raises(ValueError, match=r"length is -1\.0; allowed: .*0 or more"):
        fang_krum(honest_rows(), 4, {}, None, -1.0)


def test_two_groups_pull_against_the_mean_and_differ_across_it() -> None:
    honest = honest_rows(10, 500)
    mean = honest.mean(0)
    lies = two_groups(honest, honest[:4], {}, None, 0.8, width=0.5)
    assert lies.shape == (4, 500)
    assert torch.equal(lies[0], lies[2])
    assert torch.equal(lies[1], lies[3])
    norm = honest.norm(dim=1).median()
    common, apart = lies.mean(0), (lies[0] - lies[1]) / 2
    torch.testing.assert_close(common, -0.8 * norm * mean / mean.norm())
    torch.testing.assert_close(apart.norm(), 0.4 * norm)
    assert abs(float(apart @ mean)) < 1e-9 * float(apart.norm() * mean.norm())


def test_two_groups_hide_that_one_direction_stands_out() -> None:
    honest = honest_rows(10, 500) - honest_rows(10, 500).mean(0) / 2

    def gap(width: float) -> float:
        lies = two_groups(honest, honest[:4], {}, None, 0.9, width)
        return top_of_few(gram_matrix(torch.cat([lies, honest])), np.ones(14))[1]

    assert gap(0.0) > 3
    assert min(gap(width) for width in (0.5, 0.7, 0.85, 1.0)) < 2


def test_two_groups_find_the_strength_that_harms_most() -> None:
    honest = honest_rows()
    pipeline = deployed("gap-filter", honest)
    memory: dict[str, object] = {}
    searched = two_groups(honest, honest[:4], memory, pipeline)
    moved = float(pipeline(searched) @ honest.mean(0))
    assert moved <= float(pipeline(two_groups(honest, honest[:4], {}, None)) @ honest.mean(0))
    assert torch.equal(searched, two_groups(honest, honest[:4], memory, pipeline, every=12))


def test_disguised_lies_pull_together_and_look_apart() -> None:
    honest = honest_rows(10, 500)
    mean, norm = honest.mean(0), honest.norm(dim=1).median()
    lies = disguised(honest, honest[:4], {}, None, 1.0, width=5.0)
    against = lies @ mean / mean.norm()
    assert float(against.mean()) == pytest.approx(-float(norm), rel=0.5)
    cosines = torch.corrcoef(lies)[~torch.eye(4, dtype=torch.bool)]
    alike = torch.corrcoef(disguised(honest, honest[:4], {}, None, 1.0, width=0.1))
    assert float(cosines.max()) < 0.0 < 0.9 < float(alike.min())


def test_disguised_colluders_get_past_a_rule_that_looks_for_clients_who_are_alike() -> None:
    honest = honest_rows(10, 500) - honest_rows(10, 500).mean(0) / 2
    lies = disguised(honest, honest[:4], {}, deployed("fools-gold", honest))
    equal = -honest.mean(0).expand(4, -1)

    def share(sent: torch.Tensor) -> float:
        weights = fools_gold(torch.cat([sent, honest])).weights
        assert weights is not None
        return float(weights[:4].sum() / weights.sum())

    assert share(equal) < 0.01
    assert share(lies) > 0.25
