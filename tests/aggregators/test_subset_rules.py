"""Minimum diameter averaging, and smallest maximum eigenvalue averaging."""

import math
from typing import Any

import numpy as np
import peer_oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import (
    build_rule,
    minimum_diameter_averaging,
    smallest_eigenvalue_averaging,
)

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.4, 0.49)
BOTH = (minimum_diameter_averaging, smallest_eigenvalue_averaging)


def assert_least(rule: Any, measure: Any, updates: torch.Tensor, fraction: float) -> None:
    """No set of as many rows is better, and the aggregate is the mean of the best."""
    rows = numpy64(updates)
    count = len(rows) - math.floor(fraction * len(rows) + 1e-9)
    result = rule(updates, byzantine_fraction=fraction)
    kept = result.kept.numpy()
    assert kept.sum() == count
    best = min(measure(rows[chosen]) for chosen in peer_oracles.subsets(len(rows), count))
    size = float((rows[kept] ** 2).sum(axis=1).max())
    assert measure(rows[kept]) <= best * (1 + 1e-9) + 1e-12 * size
    error = np.abs(numpy64(result.vector) - rows[kept].mean(axis=0))
    assert (error <= 1e-6 * np.abs(rows[kept]).max(axis=0)).all()
    assert result.weights.tolist() == pytest.approx((kept / count).tolist())


@given(update_matrices(max_n=9, max_d=8), st.sampled_from(FRACTIONS))
@few_examples
def test_the_least_diameter_against_all_sets(updates: torch.Tensor, fraction: float) -> None:
    assert_least(minimum_diameter_averaging, peer_oracles.squared_diameter, updates, fraction)


@given(
    update_matrices(max_n=8, max_d=8, kinds=("normal", "duplicated", "two_far_clusters")),
    st.sampled_from(FRACTIONS),
)
@few_examples
def test_the_smallest_eigenvalue_against_all_sets(updates: torch.Tensor, fraction: float) -> None:
    assert_least(smallest_eigenvalue_averaging, peer_oracles.top_eigenvalue, updates, fraction)


def test_the_least_diameter_by_hand() -> None:
    # Of three within 0, 1, 3, 4.5, 100: 1, 3, 4.5 (3.5) and 0, 1, 3 (3).
    rows = torch.tensor([[0.0], [1.0], [3.0], [4.5], [100.0]])
    result = minimum_diameter_averaging(rows, byzantine_fraction=0.4)
    assert result.kept.tolist() == [True, True, True, False, False]
    assert result.vector.tolist() == pytest.approx([4 / 3])


def test_of_several_sets_of_the_least_diameter_the_densest() -> None:
    # 0, 1, 6 and 6, 9, 12 are 6 wide; squared distances 1 + 25 + 36, and 9 + 9 + 36.
    rows = torch.tensor([[0.0], [1.0], [6.0], [9.0], [12.0]])
    assert minimum_diameter_averaging(rows, byzantine_fraction=0.4).vector.tolist() == [9.0]


def test_the_smallest_eigenvalue_by_hand() -> None:
    # In one dimension the covariance is the variance, least of 0, 1, 3.
    rows = torch.tensor([[0.0], [1.0], [3.0], [5.5], [100.0]])
    result = smallest_eigenvalue_averaging(rows, byzantine_fraction=0.4)
    assert result.kept.tolist() == [True, True, True, False, False]
    # Two rows along a line that the others spread little in: norms alone do not give them away.
    spread = torch.eye(6).repeat(2, 1) * torch.tensor([[1.0]] * 6 + [[-1.0]] * 6)
    together = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]] * 3) * 0.9
    found = smallest_eigenvalue_averaging(torch.cat((spread, together)), byzantine_fraction=0.2)
    assert found.kept.tolist() == [True] * 12 + [False] * 3


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("kind", ["huge", "one point", "mixed", "opposite"])
@pytest.mark.parametrize("n", [3, 5, 9, 12])
def test_far_rows_are_left_out(rule: Any, kind: str, n: int) -> None:
    hostile = (n - 1) // 2
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 9))
    rows[:hostile] = {
        "huge": 1e30 * rng.standard_normal((hostile, 9)),
        "one point": np.full((hostile, 9), 1e6),
        "mixed": 10.0 ** rng.uniform(3, 30, (hostile, 1)) * rng.standard_normal((hostile, 9)),
        "opposite": 1e3 * (-1.0) ** np.arange(hostile)[:, None] * np.ones(9),
    }[kind]
    kept = rule(torch.from_numpy(rows).float(), byzantine_fraction=hostile / n).kept
    assert not kept[:hostile].any()


def test_more_rows_than_can_be_searched_are_refused() -> None:
    rows = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="17 of 70 updates are to be left out; allowed: 16 at"):
        minimum_diameter_averaging(rows)
    choices = "5 of 30 updates are to be left out, 142,506 choices; allowed: 100,000 at most"
    with pytest.raises(ValueError, match=choices):
        smallest_eigenvalue_averaging(rows[:30], byzantine_fraction=0.17)
    assert "mda compares up to" in build_rule("mda").notes(70)["mda"]
    assert "smea compares" in build_rule("smea", byzantine_fraction=0.17).notes(30)["smea"]
    assert not build_rule("mda").notes(64) | build_rule("smea").notes(10)


def test_the_search_of_the_diameter_is_exact_beyond_what_can_be_listed() -> None:
    """16 of 40 have 62,852,101,650 choices; who is hostile is known here."""
    rows = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
    rows[:16] += 30 * torch.randn(16, 20, generator=torch.Generator().manual_seed(2))
    kept = minimum_diameter_averaging(rows, byzantine_fraction=0.4).kept
    assert kept.tolist() == [False] * 16 + [True] * 24


def test_the_worst_rows_for_the_search_of_the_diameter() -> None:
    """Sixteen pairs, of each of which either row may go."""
    rows = torch.zeros(33, 33)
    for pair in range(16):
        rows[2 * pair, pair], rows[2 * pair + 1, pair] = 1.0, -1.0
    result = minimum_diameter_averaging(rows, byzantine_fraction=0.485)
    assert int(result.kept.sum()) == 17
    assert all(result.kept[2 * i] != result.kept[2 * i + 1] for i in range(16))
