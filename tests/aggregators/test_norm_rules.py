"""Norm thresholding, norm clipping and projection."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import norm_clip, norm_threshold, project

ORDERS = (1, 1.5, 2, 3, math.inf)


def row_norms(updates: torch.Tensor, order: float = 2) -> np.ndarray:
    return np.array([oracles.norm(row, order) for row in numpy64(updates)])


# --- norm_threshold -----------------------------------------------------------------------------


@given(update_matrices(), st.sampled_from(ORDERS), st.sampled_from((0.0, 0.1, 0.25, 0.4, 0.5, 0.9)))
@few_examples
def test_keeps_the_rows_of_least_norm(
    updates: torch.Tensor, order: float, drop_fraction: float
) -> None:
    n = len(updates)
    result = norm_threshold(updates, drop_fraction=drop_fraction, order=order)
    kept = result.kept.numpy()
    assert kept.dtype == bool
    assert kept.sum() == max(1, n - math.ceil(round(drop_fraction * n, 6)))
    norms = row_norms(updates, order)
    if not kept.all():
        assert norms[kept].max() <= norms[~kept].min() * (1 + 1e-12)
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx((kept / kept.sum()).tolist())
    expected = numpy64(updates)[kept].mean(axis=0)
    size = np.abs(numpy64(updates)[kept]).max(axis=0)
    assert (np.abs(numpy64(result.vector) - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize(
    ("n", "drop_fraction", "dropped"),
    [
        (30, 0.1, 3),  # 0.1 * 30 is 3.0000000000000004
        (10, 0.3, 3),
        (10, 0.31, 4),
        (10, 0.01, 1),
        (10, 0.0, 0),
        (10, 0.99, 9),  # one row is always left
        (1, 0.5, 0),
        (100, 0.07, 7),  # 7.000000000000001
        (100, 0.29, 29),  # 28.999999999999996
    ],
)
def test_drops_exactly_ceil_beta_n(n: int, drop_fraction: float, dropped: int) -> None:
    updates = torch.arange(1.0, n + 1)[:, None].flip(0)
    result = norm_threshold(updates, drop_fraction=drop_fraction)
    assert result.kept.tolist() == [False] * dropped + [True] * (n - dropped)


def test_the_order_decides() -> None:
    """(3, 3, 3): 9, 5.2 and 3. (0, 6, 0): 6 in every norm. (1, 1, 4): 6, 4.2 and 4."""
    updates = torch.tensor([[3.0, 3.0, 3.0], [0.0, 6.0, 0.0], [1.0, 1.0, 4.0]])
    for order, dropped in ((1, 0), (2, 1), (math.inf, 1)):
        kept = norm_threshold(updates, drop_fraction=1 / 3, order=order).kept
        assert kept.tolist() == [i != dropped for i in range(3)]
    kept = norm_threshold(updates, drop_fraction=0.5, order=math.inf).kept
    assert kept.tolist() == [True, False, False]
    kept = norm_threshold(updates, drop_fraction=0.5, order=2).kept
    assert kept.tolist() == [False, False, True]


def test_ties_keep_the_earlier_row() -> None:
    updates = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert norm_threshold(updates, drop_fraction=0.5).kept.tolist() == [True, True, False, False]
    assert norm_threshold(updates, drop_fraction=0.5).vector.tolist() == [0.0]
    sizes = torch.tensor([3.0, 1.0, 2.0]).repeat(40)
    kept = norm_threshold(sizes[:, None], drop_fraction=0.5).kept
    # All 40 of size 1 and the first 20 of size 2.
    assert kept.tolist() == [False, True, True] * 20 + [False, True, False] * 20


def test_option_1_believes_the_norms_that_clients_report() -> None:
    updates = torch.tensor([[1.0, 0.0], [100.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    reported = torch.tensor([2.0, 0.5, 9.0, 4.0])
    result = norm_threshold(updates, drop_fraction=0.25, norms=reported)
    assert result.kept.tolist() == [True, True, False, True]
    assert result.vector.tolist() == pytest.approx([106 / 3, 0.0])
    computed = norm_threshold(updates, drop_fraction=0.25)
    assert computed.kept.tolist() == [True, False, True, True]
    assert computed.vector.tolist() == [3.0, 0.0]
    infinite = norm_threshold(
        updates, drop_fraction=0.25, norms=torch.tensor([1.0, math.inf, 1.0, 1.0])
    )
    assert infinite.kept.tolist() == [True, False, True, True]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_float64_rows_of_any_magnitude(scale: float, order: float) -> None:
    rows = np.random.default_rng(0).standard_normal((9, 5)) * np.arange(9, 0, -1)[:, None]
    expected = norm_threshold(torch.from_numpy(rows), order=order)
    result = norm_threshold(torch.from_numpy(rows * scale), order=order)
    assert torch.equal(result.kept, expected.kept)
    np.testing.assert_allclose(numpy64(result.vector) / scale, numpy64(expected.vector), rtol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_float64_rows_at_both_ends_of_the_range(order: float) -> None:
    """The norms of small rows must not vanish beside one of 1e300: 2, 1, 3 are told apart."""
    sizes = torch.tensor([[1e30], [1e300], [3.0], [2.0], [1.0]], dtype=torch.float64)
    updates = sizes.repeat(1, 4)
    kept = norm_threshold(updates, drop_fraction=0.6, order=order).kept
    assert kept.tolist() == [False, False, False, True, True]


@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 2**32 - 1))
@few_examples
def test_threshold_symmetries(n: int, d: int, seed: int) -> None:
    """Permutation, scale and rotation (for order 2)."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((n, d)) * rng.uniform(1, 2, (n, 1)))
    vector = norm_threshold(rows).vector
    order = torch.from_numpy(rng.permutation(n))
    torch.testing.assert_close(norm_threshold(rows[order]).vector, vector)
    torch.testing.assert_close(norm_threshold(-1e9 * rows).vector, -1e9 * vector)
    turn = oracles.rotation(d, seed)
    torch.testing.assert_close(norm_threshold(rows @ turn).vector, vector @ turn)


def test_breakdown_of_the_threshold() -> None:
    """As many rows as are dropped may be anything large; one more breaks it."""
    updates = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 6))).float()
    updates[6:] = 1e38
    honest = norm_threshold(updates, drop_fraction=0.4)
    torch.testing.assert_close(honest.vector, updates[:6].mean(dim=0))
    broken = norm_threshold(updates, drop_fraction=0.3)
    assert (broken.vector > 1e36).all()
    # Rows of ordinary norm are averaged in, whatever their direction: what the docs say.
    updates[6:] = 0.1
    assert norm_threshold(updates, drop_fraction=0.4).kept[6:].all()


# --- norm_clip ----------------------------------------------------------------------------------


@given(update_matrices(), st.sampled_from((None, 0.5, 1e-5, 1e5)))
@few_examples
def test_clip_against_a_loop(updates: torch.Tensor, radius: float | None) -> None:
    rows = numpy64(updates)
    norms = row_norms(updates)
    limit = float(np.median(norms)) if radius is None else radius
    factors = np.array([min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms])
    result = norm_clip(updates, radius=radius)
    assert result.weights is not None
    np.testing.assert_allclose(result.weights.numpy(), factors / len(rows), rtol=1e-9)
    expected = factors @ rows / len(rows)
    size = factors @ np.abs(rows) / len(rows)
    assert (np.abs(numpy64(result.vector) - expected) <= 1e-6 * size + 1e-300).all()


def test_clip_of_a_row_longer_than_a_number_can_say() -> None:
    rows = torch.full((1, 7), 1.7e308, dtype=torch.float64)
    assert norm_clip(rows).vector.isfinite().all()


def test_clip_by_hand() -> None:
    updates = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0], [-60.0, 80.0]])
    result = norm_clip(updates, radius=1.0)
    assert result.vector.tolist() == pytest.approx([(0.6 - 0.6) / 4, (0.8 + 0.5 + 0.8) / 4])
    # Norms 5, 0.5, 0, 100: the median is 2.75.
    result = norm_clip(updates)
    expected = [0.0, (2.75 * 0.8 + 0.5 + 2.75 * 0.8) / 4]
    assert result.vector.tolist() == pytest.approx(expected, abs=1e-6)


def test_clip_of_mostly_zero_rows() -> None:
    """The median norm is 0, so everything is clipped away."""
    updates = torch.tensor([[0.0], [0.0], [0.0], [7.0]])
    assert norm_clip(updates).vector.tolist() == [0.0]
    assert norm_clip(torch.zeros(3, 2)).vector.tolist() == [0.0, 0.0]


def test_breakdown_of_the_clip() -> None:
    """Hostile rows count at most as the largest honest one, until they are the majority."""
    rng = np.random.default_rng(2)
    updates = torch.from_numpy(rng.standard_normal((11, 6))).float()
    largest = row_norms(updates[5:]).max()
    updates[:5] = 1e38
    assert float(norm_clip(updates).vector.norm()) <= largest * (1 + 1e-6)
    updates[5] = 1e38
    assert float(norm_clip(updates).vector.norm()) > 1e37


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_clip_float64_rows_of_any_magnitude(scale: float) -> None:
    rows = np.random.default_rng(3).standard_normal((9, 5))
    expected = numpy64(norm_clip(torch.from_numpy(rows)).vector)
    result = norm_clip(torch.from_numpy(rows * scale))
    np.testing.assert_allclose(numpy64(result.vector) / scale, expected, rtol=1e-9)


def test_clip_float64_rows_at_both_ends_of_the_range() -> None:
    sizes = torch.tensor([[1e30], [1e300], [3.0], [2.0], [1.0]], dtype=torch.float64)
    # The median size is 3: (3 + 3 + 3 + 2 + 1) / 5.
    assert norm_clip(sizes.repeat(1, 4)).vector.tolist() == pytest.approx([12 / 5] * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    updates = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 30))).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rule in (norm_threshold, norm_clip):
        before = updates.clone()
        result = rule(updates)
        assert result.vector.dtype == wide
        assert torch.equal(updates, before)
        assert result.weights is not None
        expected = result.weights.numpy() @ numpy64(updates)
        np.testing.assert_allclose(numpy64(result.vector), expected, atol=1e-6)


def test_more_columns_than_one_block() -> None:
    updates = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 300_001))).float()
    updates[1] *= 1.01
    for order in ORDERS:
        kept = norm_threshold(updates, order=order).kept.numpy()
        assert kept[row_norms(updates, order).argmax()] == np.False_
        assert kept.sum() == 2


# --- project ------------------------------------------------------------------------------------


def test_project_by_hand() -> None:
    vector = torch.tensor([3.0, 4.0])
    assert project(vector, 5.0).tolist() == [3.0, 4.0]
    assert project(vector, 2.5).tolist() == [1.5, 2.0]
    center = torch.tensor([3.0, 0.0])
    assert project(vector, 1.0, center).tolist() == [3.0, 1.0]
    assert project(vector, 4.0, center).tolist() == [3.0, 4.0]
    assert project(torch.zeros(3), 1.0).tolist() == [0.0, 0.0, 0.0]


@given(
    st.integers(1, 20), st.floats(-30, 30), st.floats(-30, 30), st.booleans(), st.integers(0, 999)
)
@few_examples
def test_projection_is_the_nearest_point_of_the_ball(
    d: int, size: float, radius: float, float64: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float64 if float64 else torch.float32
    vector = torch.from_numpy(10.0**size * rng.standard_normal(d)).to(dtype)
    before = vector.clone()
    limit = 10.0**radius
    projected = project(vector, limit)
    assert projected.dtype == dtype
    assert torch.equal(vector, before)
    norm, length = oracles.norm(numpy64(projected)), oracles.norm(numpy64(vector))
    assert norm == pytest.approx(min(limit, length), rel=1e-6)
    cosine = numpy64(projected) / norm @ (numpy64(vector) / length)
    assert cosine == pytest.approx(1, abs=1e-6)
    assert torch.equal(project(projected, limit * (1 + 1e-6)), projected)


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_fraction": -0.1}, "drop_fraction is -0.1; allowed: 0 to below 1"),
        ({"drop_fraction": 1.0}, "drop_fraction is 1.0; allowed: 0 to below 1"),
        ({"drop_fraction": math.nan}, "drop_fraction is nan; allowed: 0 to below 1"),
        ({"order": 0.5}, "order is 0.5; allowed: 1 or more"),
        ({"order": math.nan}, "order is nan; allowed: 1 or more"),
        ({"norms": torch.ones(3)}, r"norms is \[1.0, 1.0, 1.0\]; allowed: 4 values of 0 or more"),
        ({"norms": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "norms is .*; allowed: 4 values of 0"),
        ({"norms": torch.tensor([1.0, math.nan, 1.0, 1.0])}, "norms is .*; allowed: 4 values"),
    ],
)
def test_refused_threshold_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_threshold(torch.ones(4, 2), **options)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
def test_refused_radii(radius: float) -> None:
    with pytest.raises(ValueError, match=f"radius is {radius}; allowed: above 0"):
        norm_clip(torch.ones(4, 2), radius=radius)
    with pytest.raises(ValueError, match=f"radius is {radius}; allowed: above 0"):
        project(torch.ones(4), radius)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_rows_are_named(value: float, dtype: torch.dtype) -> None:
    updates = torch.ones(5, 3, dtype=dtype)
    updates[3, 2] = value
    match = "updates: row 3 holds a NaN or an infinity"
    for order in ORDERS:
        with pytest.raises(ValueError, match=match):
            norm_threshold(updates, order=order)
    with pytest.raises(ValueError, match=match):
        norm_threshold(updates, norms=torch.ones(5))
    with pytest.raises(ValueError, match=match):
        norm_clip(updates)
    with pytest.raises(ValueError, match=match):
        norm_clip(updates, radius=1.0)
