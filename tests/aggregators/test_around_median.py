"""The mean around the median, and Bulyan."""

import math

import numpy as np
import peer_oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import build_rule, bulyan, coordinate_median, mean, mean_around_median

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.4, 0.49)


@given(update_matrices(), st.sampled_from(FRACTIONS))
@few_examples
def test_the_mean_around_the_median_against_brute_force(
    updates: torch.Tensor, fraction: float
) -> None:
    rows = numpy64(updates)
    kept = len(rows) - math.floor(fraction * len(rows) + 1e-9)
    expected = peer_oracles.mean_around_median(rows, kept)
    found = numpy64(mean_around_median(updates, byzantine_fraction=fraction).vector)
    assert (np.abs(found - expected) <= 1e-6 * np.abs(rows).max(axis=0)).all()


@given(update_matrices(min_n=2, kinds=("normal",)), st.sampled_from(FRACTIONS))
@few_examples
def test_bulyan_against_brute_force(updates: torch.Tensor, fraction: float) -> None:
    rows = numpy64(updates)
    hostile = math.floor(fraction * len(rows) + 1e-9)
    expected, chosen = peer_oracles.bulyan(rows, hostile)
    result = bulyan(updates, byzantine_fraction=fraction)
    kept = result.kept.nonzero().flatten().tolist()
    assert kept == chosen
    error = np.abs(numpy64(result.vector) - expected)
    assert (error <= 1e-6 * np.abs(rows[chosen]).max(axis=0)).all()


def test_the_mean_around_the_median_by_hand() -> None:
    # The median is 3; of 0, 1, 3, 4, 100 the three nearest are 1, 3 and 4.
    rows = torch.tensor([[0.0], [100.0], [3.0], [1.0], [4.0]])
    assert mean_around_median(rows, byzantine_fraction=0.4).vector.tolist() == pytest.approx(
        [8 / 3]
    )
    # The median of 0, 1, 3, 100 is 2: 1 and 3 are nearest, then 0.
    even = torch.tensor([[3.0], [0.0], [100.0], [1.0]])
    found = mean_around_median(even, byzantine_fraction=0.25).vector
    assert found.tolist() == pytest.approx([4 / 3])
    # 1 and 5 are as far from 3: the lower one.
    tied = torch.tensor([[1.0], [5.0], [3.0]])
    assert mean_around_median(tied, byzantine_fraction=0.34).vector.tolist() == [2.0]


def test_bulyan_by_hand() -> None:
    # f = 1 of 7. Krum takes out five; 20 and 100 are left. Of 0, 1, 2, 3, 10 the median is 2,
    # and the three nearest values are 1, 2 and 3.
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [20.0], [100.0]])
    result = bulyan(rows, byzantine_fraction=1 / 7)
    assert result.kept.tolist() == [True] * 5 + [False] * 2
    assert result.vector.tolist() == [2.0]
    assert result.weights is None


def test_without_hostile_rows_both_are_the_mean() -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for rule in (mean_around_median, bulyan):
        torch.testing.assert_close(rule(rows, byzantine_fraction=0).vector, mean(rows).vector)


def test_with_the_most_hostile_rows_bulyan_is_the_median_of_its_selection() -> None:
    rows = torch.randn(8, 9, generator=torch.Generator().manual_seed(1))
    result = bulyan(rows, byzantine_fraction=0.25)
    expected = coordinate_median(rows[result.kept]).vector
    torch.testing.assert_close(result.vector, expected)


@pytest.mark.parametrize("n", [7, 11, 15])
def test_bulyan_stays_among_the_honest_values(n: int) -> None:
    """El Mhamdi et al.: each coordinate is near honest values, also where one alone is attacked."""
    hostile = (n - 3) // 4
    honest = torch.randn(n - hostile, 30, generator=torch.Generator().manual_seed(n))
    spiked = honest[:hostile].clone()
    spiked[:, 0] = 3.0 * honest.norm(dim=1).mean() / math.sqrt(30)
    for bad in (torch.full((hostile, 30), 1e30), spiked):
        rows = torch.cat((bad, honest))
        vector = bulyan(rows, byzantine_fraction=hostile / n).vector
        assert (vector <= honest.max(dim=0).values).all()
        assert (vector >= honest.min(dim=0).values).all()


def test_a_majority_breaks_the_mean_around_the_median() -> None:
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    rows[:4] = 1e9
    assert mean_around_median(rows, byzantine_fraction=0.45).vector.abs().max() < 10
    rows[4] = 1e9
    assert (mean_around_median(rows, byzantine_fraction=0.45).vector > 1e8).all()


def test_what_bulyan_cannot_promise() -> None:
    rule = build_rule("bulyan", byzantine_fraction=0.25)
    assert rule.notes(10)["bulyan"].startswith("2 of 10 clients may be hostile; bulyan is proved")
    assert not build_rule("bulyan", byzantine_fraction=0.2).notes(20)  # 4 * 4 + 3
    assert build_rule("bulyan", byzantine_fraction=0.2).notes(10)
