"""The covariance bound-agnostic filter, and divide and conquer."""

import math

import numpy as np
import peer_oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import (
    build_rule,
    covariance_agnostic_filter,
    divide_and_conquer,
    gap_filter,
    mean,
)

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.4, 0.49)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- CAF ----------------------------------------------------------------------------------------


@given(update_matrices(min_n=2, kinds=("normal", "collinear")), st.sampled_from(FRACTIONS))
@few_examples
def test_caf_against_singular_values(updates: torch.Tensor, fraction: float) -> None:
    rows = numpy64(updates)
    hostile = math.floor(fraction * len(rows) + 1e-9)
    result = covariance_agnostic_filter(updates, byzantine_fraction=fraction)
    expected = peer_oracles.covariance_agnostic_filter(rows, hostile)
    assert np.abs(numpy64(result.vector) - expected).max() <= 1e-4 * np.abs(rows).max()
    assert result.weights is not None
    formed = result.weights.numpy() @ rows
    np.testing.assert_allclose(formed, numpy64(result.vector), atol=1e-6 * np.abs(rows).max())


def test_caf_by_hand() -> None:
    # f = 1 of 4 on a line: the mean of 0, 1, 2, 9 is 3, the squares 9, 4, 1, 36, so the weights
    # are 3/4, 8/9, 35/36, 0: above n - 2 f = 2. Their mean is (8/9 + 70/36) / (94/36) = 102/94,
    # with less variance; the weights that come next sum to less than 2.
    rows = torch.tensor([[0.0], [1.0], [2.0], [9.0]], dtype=torch.float64)
    result = covariance_agnostic_filter(rows, byzantine_fraction=0.25)
    assert result.vector.tolist() == pytest.approx([102 / 94])
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx([27 / 94, 32 / 94, 35 / 94, 0.0])


def test_caf_without_hostile_rows_is_the_mean() -> None:
    """ByzFL returns nothing here: its loop, which alone makes a mean, has not begun."""
    rows = normal(6, 9)
    found = covariance_agnostic_filter(rows, byzantine_fraction=0).vector
    torch.testing.assert_close(found, mean(rows).vector)
    assert torch.equal(covariance_agnostic_filter(torch.ones(5, 3)).vector, torch.ones(3))


@pytest.mark.parametrize("kind", ["huge", "one point", "mixed", "together"])
@pytest.mark.parametrize("n", [5, 10, 15])
def test_caf_holds_against_a_minority(n: int, kind: str) -> None:
    hostile = (n - 1) // 2
    rng = np.random.default_rng(n)
    honest = rng.standard_normal((n, 40))
    bad = {
        "huge": 1e30 * rng.standard_normal((hostile, 40)),
        "one point": np.full((hostile, 40), 1e6),
        "mixed": 10.0 ** rng.uniform(1, 30, (hostile, 1)) * rng.standard_normal((hostile, 40)),
        "together": np.full((hostile, 40), 3.0),
    }[kind]
    rows = torch.from_numpy(np.concatenate((bad, honest[hostile:])))
    found = numpy64(covariance_agnostic_filter(rows, byzantine_fraction=hostile / n).vector)
    spread = np.linalg.norm(honest, axis=1).max()
    assert np.linalg.norm(found - honest[hostile:].mean(axis=0)) < 2 * spread


def test_caf_of_many_rows_is_that_of_few() -> None:
    """Above 1,000 rows eigenvectors come from passes over them."""
    rows = normal(1_100, 12)
    rows[:200] += 2.0
    hostile = math.floor(0.2 * 1_100)
    expected = peer_oracles.covariance_agnostic_filter(numpy64(rows), hostile)
    found = numpy64(covariance_agnostic_filter(rows, byzantine_fraction=0.2).vector)
    assert np.linalg.norm(found - expected) < 0.05
    assert np.linalg.norm(found) < np.linalg.norm(numpy64(mean(rows).vector)) / 3


# --- DnC ----------------------------------------------------------------------------------------


@given(update_matrices(min_n=3, kinds=("normal",)), st.sampled_from(FRACTIONS))
@few_examples
def test_dnc_against_singular_values(updates: torch.Tensor, fraction: float) -> None:
    rows = numpy64(updates)
    dropped = math.floor(fraction * len(rows) + 1e-9)
    result = divide_and_conquer(updates, byzantine_fraction=fraction)
    assert int(result.kept.sum()) == len(rows) - dropped
    expected = peer_oracles.divide_and_conquer(rows, dropped)
    np.testing.assert_allclose(numpy64(result.vector), expected, atol=1e-5)


def test_dnc_by_hand() -> None:
    # The mean of 0, 1, 2, 9 is 3: 9 is furthest, then 0.
    rows = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    assert divide_and_conquer(rows, byzantine_fraction=0.25).vector.tolist() == [1.0]
    two = divide_and_conquer(rows, byzantine_fraction=0.25, filter_share=2.0)
    assert two.vector.tolist() == [1.5]
    assert two.kept.tolist() == [False, True, True, False]


def test_dnc_draws_coordinates() -> None:
    """What is out only where nobody has looked stays; more iterations look elsewhere."""
    rows = normal(10, 400)
    rows[0, :4] = 60.0
    runs = [
        divide_and_conquer(
            rows,
            byzantine_fraction=0.1,
            coordinates=20,
            iterations=iterations,
            generator=torch.Generator().manual_seed(seed),
        )
        for iterations in (1, 40)
        for seed in range(20)
    ]
    caught = [not bool(run.kept[0]) for run in runs]
    assert 0 < sum(caught[:20]) < 20
    assert sum(caught[20:]) > sum(caught[:20])


def test_where_each_row_was_left_out_once_those_are_kept_that_were_the_fewest_times() -> None:
    rows = normal(5, 30)
    result = divide_and_conquer(
        rows,
        byzantine_fraction=0.4,
        coordinates=1,
        iterations=50,
        generator=torch.Generator().manual_seed(0),
    )
    assert 1 <= int(result.kept.sum()) < 5


def test_dnc_finds_rows_that_pull_together() -> None:
    rows = normal(20, 2_000)
    rows[:4] = rows[4:].mean(dim=0) + 0.8
    kept = divide_and_conquer(rows, byzantine_fraction=0.2).kept
    assert kept.tolist() == [False] * 4 + [True] * 16


def test_long_rows_hide_others_from_dnc_unless_they_are_clipped() -> None:
    rows = normal(12, 50)
    rows[0, 0], rows[1, 1] = 1e20, 1e8
    assert divide_and_conquer(rows, byzantine_fraction=0.17).vector.abs().max() > 1e5
    assert build_rule("dnc+clipping", byzantine_fraction=0.17)(rows).vector.abs().max() < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0; allowed: a whole number, 1 or more"),
        ({"coordinates": 0}, "coordinates is 0; allowed: a whole number, 1 or more"),
        ({"filter_share": 0.0}, "filter_share is 0.0; allowed: above 0"),
    ],
)
def test_refused_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide_and_conquer(normal(5, 3), **options)  # type: ignore[arg-type]


def test_a_row_that_is_not_finite_is_named_where_dnc_does_not_look() -> None:
    rows = normal(5, 5_000)
    rows[3, 4_999] = math.inf
    with pytest.raises(ValueError, match="row 3 holds a NaN or an infinity"):
        divide_and_conquer(rows, coordinates=2, generator=torch.Generator().manual_seed(0))


# --- gap filter ---------------------------------------------------------------------------------


@given(
    update_matrices(min_n=3, kinds=("normal",)),
    st.sampled_from(FRACTIONS),
    st.sampled_from((1.0, 1.3, 3.0)),
    st.sampled_from((2.0, 8.0, 20.0)),
    st.sampled_from((0.0, 1.0, 3.0)),
    st.integers(0, 2**32 - 1),
)
@few_examples
def test_gap_filter_against_singular_values(
    updates: torch.Tensor, fraction: float, gap: float, far: float, decades: float, seed: int
) -> None:
    """Lengths spread over ``decades`` powers of ten: some beyond ``far`` and its square."""
    spread = np.random.default_rng(seed).uniform(0, decades, (len(updates), 1))
    updates = updates * torch.from_numpy(10.0**spread).to(updates.dtype)
    rows = numpy64(updates)
    hostile = math.floor(fraction * len(rows) + 1e-9)
    result = gap_filter(updates, byzantine_fraction=fraction, gap=gap, far=far)
    expected = peer_oracles.gap_filter(rows, hostile, gap, far)
    median = np.sort(np.linalg.norm(rows, axis=1))[(len(rows) - 1) // 2]
    assert np.linalg.norm(numpy64(result.vector) - expected) <= 1e-3 * median
    assert result.weights is not None
    assert float(result.weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("longest", "options", "shares"),
    [
        # 7 is clipped to 1 and has a say; 65, beyond 8^2 = 64, is the one liar there may be.
        (65.0, {"byzantine_fraction": 0.125}, [1, 1, 1, 1, 1, 0, 0, 0]),
        # One more may be: of 1, 1, 1, -1, 1 with mean 0.6 the fourth has the largest square.
        (65.0, {"byzantine_fraction": 0.25}, [1, 1, 1, 0, 1, 0, 0, 0]),
        # 63 is out and not counted.
        (63.0, {"byzantine_fraction": 0.125}, [1, 1, 1, 0, 1, 0, 0, 0]),
        # Here 9 has a say as well, and nobody is beyond 10^2.
        (65.0, {"byzantine_fraction": 0.125, "far": 10.0}, [1, 1, 1, 0, 1, 1, 0, 0]),
        # And here 7 has none, and all beyond 6^2 = 36 are counted.
        (65.0, {"byzantine_fraction": 0.25, "far": 6.0}, [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_gap_filter_by_hand(longest: float, options: dict[str, float], shares: list[int]) -> None:
    """Rows on a line, the median norm is 1: the top eigenvalue is the only one, and stands out."""
    rows = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [7.0], [9.0], [63.0], [longest]])
    weights = gap_filter(rows, **options).weights  # type: ignore[arg-type]
    assert weights is not None
    assert weights.tolist() == pytest.approx([share / sum(shares) for share in shares])


@pytest.mark.parametrize(("first", "second", "share"), [(14, 11, 1 / 50), (16, 12, 0.0)])
def test_gap_filter_by_hand_with_a_next_direction(first: int, second: int, share: float) -> None:
    """Pairs of opposite rows on two axes: eigenvalues as 14 to 11, or as 16 to 12, above 1.3."""
    rows = torch.zeros(2 * (first + second), 2)
    rows[: 2 * first, 0] = torch.tensor([1.0, -1.0]).repeat(first)
    rows[2 * first :, 1] = torch.tensor([1.0, -1.0]).repeat(second)
    weights = gap_filter(rows).weights
    assert weights is not None
    np.testing.assert_allclose(weights[: 2 * first], share, atol=1e-9)
    np.testing.assert_allclose(weights[2 * first :], share or 1 / (2 * second), atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.1])  # exactly as far out, and up to rounding
def test_gap_filter_keeps_rows_that_are_all_equally_far_out(scale: float) -> None:
    rows = scale * torch.tensor([[1.0, 3.0], [-1.0, -3.0]]).repeat(2, 1)
    result = gap_filter(rows)
    assert result.weights is not None
    assert result.weights.tolist() == [0.25] * 4
    assert result.vector.tolist() == [0.0, 0.0]


def test_gap_filter_drops_rows_that_pull_together_and_no_others() -> None:
    honest = normal(10, 500) + 0.3
    lie = -honest.mean(0) / honest.mean(0).norm() * honest.norm(dim=1).median()
    result = gap_filter(torch.cat([lie.expand(4, -1), honest]), byzantine_fraction=0.29)
    assert result.weights is not None
    assert float(result.weights[:4].sum()) < 0.01
    assert float(result.weights[4:].min()) > 0.05
    # A lie that is too small to stand out costs nobody honest a say.
    small = gap_filter(torch.cat([0.01 * lie.expand(4, -1), honest]), byzantine_fraction=0.29)
    assert small.weights is not None
    assert float(small.weights.min()) > 0.04


def test_gap_filter_leaves_out_what_is_far_longer_than_the_median() -> None:
    honest = normal(6, 100)
    rows = torch.cat([-100 * honest[:4], honest])
    result = gap_filter(rows, byzantine_fraction=0.4)
    assert result.weights is not None
    assert not result.weights[:4].any()
    assert not gap_filter(torch.zeros(5, 3)).vector.any()


def test_gap_filter_looks_for_liars_also_where_honest_rows_are_left_out_for_their_length() -> None:
    """Four clients whose data are learned last, and four liars among the others."""
    honest = normal(10, 500) + 0.3
    mean = honest.mean(0)
    lie = -mean / mean.norm() * honest.norm(dim=1).median()
    rows = torch.cat([lie.expand(4, -1), honest])
    rows[10:] *= 16.0
    weights = gap_filter(rows, byzantine_fraction=0.29).weights
    assert weights is not None
    assert not weights[10:].any()
    assert float(weights[:4].sum()) < 0.01


def test_gap_filter_of_many_rows_is_that_of_their_gram_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.cat([normal(40, 60) + 0.2, torch.full((12, 60), -0.6)])
    few = gap_filter(rows, byzantine_fraction=0.25)
    monkeypatch.setattr("fl_bgmd.aggregators.rows.DENSE_ROWS", 10)
    many = gap_filter(rows, byzantine_fraction=0.25)
    torch.testing.assert_close(many.vector, few.vector, rtol=1e-2, atol=1e-3)
