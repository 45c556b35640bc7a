"""Coordinate-wise median and trimmed mean, and the sorting network behind them."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import Aggregate, coordinate_median, trimmed_mean
from fl_bgmd.aggregators.coordinates import selection_network

TRIMS = (0.0, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.49)
MIN, MAX = 1, 2


def numpy_of(result: Aggregate) -> np.ndarray:
    assert result.weights is None
    return numpy64(result.vector)


def assert_close(found: torch.Tensor, expected: np.ndarray, rows: np.ndarray) -> None:
    """Compare up to the rounding of a sum of the largest value of each coordinate."""
    slack = 8 * torch.finfo(found.dtype).eps * np.abs(rows).max(axis=0)
    assert (np.abs(numpy64(found) - expected) <= slack).all()


# --- Against the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_median_of_every_n_to_200(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 201):
        rows = rng.standard_normal((n, 33))
        rows[:, 11:22] = np.round(2 * rows[:, 11:22])  # ties
        rows[:, 22:] *= 10.0 ** rng.uniform(-20, 20, (n, 11))
        updates = torch.from_numpy(rows).to(dtype)
        expected = np.median(numpy64(updates), axis=0)
        found = numpy_of(coordinate_median(updates))
        np.testing.assert_allclose(found, expected, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("n", [*range(1, 34), 64, 100])
def test_trimmed_mean_of_several_fractions(n: int) -> None:
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 33))
    rows[:, 11:22] = np.round(2 * rows[:, 11:22])
    updates = torch.from_numpy(rows).float()
    for trim_fraction in TRIMS:
        expected = oracles.trimmed_mean(numpy64(updates), math.floor(trim_fraction * n + 1e-9))
        found = trimmed_mean(updates, trim_fraction=trim_fraction).vector
        assert_close(found, expected, numpy64(updates))


@given(update_matrices(), st.floats(0, 0.499))
@few_examples
def test_both_on_rows_of_all_kinds(updates: torch.Tensor, trim_fraction: float) -> None:
    rows = numpy64(updates)
    assert_close(coordinate_median(updates).vector, np.median(rows, axis=0), rows)
    trim = math.floor(trim_fraction * len(rows) + 1e-9)
    expected = oracles.trimmed_mean(rows, trim)
    assert_close(trimmed_mean(updates, trim_fraction=trim_fraction).vector, expected, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    updates = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 50))).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rule in (coordinate_median, trimmed_mean):
        assert rule(updates).vector.dtype == wide
    assert_close(
        coordinate_median(updates).vector, np.median(numpy64(updates), axis=0), numpy64(updates)
    )


@pytest.mark.parametrize("n", [2, 7, 10])
def test_more_columns_than_one_block(n: int) -> None:
    updates = torch.from_numpy(np.random.default_rng(n).standard_normal((n, 200_003))).float()
    found = numpy_of(coordinate_median(updates))
    np.testing.assert_allclose(found, np.median(numpy64(updates), axis=0), rtol=1e-6)
    expected = oracles.trimmed_mean(numpy64(updates), n // 4)
    assert_close(trimmed_mean(updates).vector, expected, numpy64(updates))


@pytest.mark.parametrize("n", range(1, 13))
def test_selection_network_by_the_0_1_principle(n: int) -> None:
    """A network of minima and maxima keeps the right ranks if it does so for zeros and ones.

    All 2^n inputs at once, each wire a row; a comparator writes only the outputs it names.
    """
    inputs = np.array(list(itertools.product((0, 1), repeat=n))).T
    for trim in range((n + 1) // 2):
        wires = inputs.copy()
        for low, high, outputs in selection_network(n, trim):
            assert 0 <= low < high < n
            smaller = np.minimum(wires[low], wires[high])
            larger = np.maximum(wires[low], wires[high])
            wires[low] = smaller if outputs & MIN else -99
            wires[high] = larger if outputs & MAX else -99
        middle = slice(trim, n - trim)
        assert (wires[middle].sum(axis=0) == np.sort(inputs, axis=0)[middle].sum(axis=0)).all()


def test_selection_network_is_pruned() -> None:
    """Fewer comparisons than sorting; none at all where every rank is averaged."""
    assert selection_network(10, 0) == ()
    assert len(selection_network(10, 4)) < 31  # Batcher sorts 10 with 31


# --- Values derived by hand ---------------------------------------------------------------------


def test_median_by_hand() -> None:
    updates = torch.tensor([[1.0, -5.0], [2.0, 0.0], [100.0, 3.0]])
    assert coordinate_median(updates).vector.tolist() == [2.0, 0.0]
    updates = torch.tensor([[1.0, -5.0], [2.0, 0.0], [100.0, 3.0], [4.0, 7.0]])
    assert coordinate_median(updates).vector.tolist() == [3.0, 1.5]
    assert coordinate_median(updates[:2]).vector.tolist() == [1.5, -2.5]
    assert coordinate_median(updates[:1]).vector.tolist() == [1.0, -5.0]


def test_trimmed_mean_by_hand() -> None:
    updates = torch.tensor([[8.0], [1.0], [-1e30], [2.0], [1e30], [4.0], [5.0], [3.0]])
    # floor(0.25 * 8) = 2 fall on each side: 1 and -1e30, 8 and 1e30; 2, 3, 4, 5 are left.
    assert trimmed_mean(updates).vector.tolist() == [3.5]
    # floor(0.13 * 8) = 1: 1, 2, 3, 4, 5, 8 are left.
    assert trimmed_mean(updates, trim_fraction=0.13).vector.tolist() == pytest.approx([23 / 6])
    # floor(0.49 * 8) = 3: the median.
    assert trimmed_mean(updates, trim_fraction=0.49).vector.tolist() == [3.5]


def test_fractions_that_floats_round_down() -> None:
    """0.29 * 100 is 28.999999999999996; 29 rows must go."""
    updates = torch.arange(100.0)[:, None] ** 2
    expected = float((torch.arange(29.0, 71.0) ** 2).mean())
    found = trimmed_mean(updates, trim_fraction=0.29).vector
    assert found.tolist() == pytest.approx([expected], rel=1e-6)


def test_largest_float32_values_do_not_overflow() -> None:
    updates = torch.full((4, 3), 3.4e38)
    assert torch.isfinite(coordinate_median(updates).vector).all()
    assert trimmed_mean(updates).vector.tolist() == pytest.approx([3.4e38] * 3)


# --- Properties ---------------------------------------------------------------------------------


@given(st.integers(1, 15), st.integers(1, 20), st.integers(0, 2**32 - 1))
@few_examples
def test_symmetries(n: int, d: int, seed: int) -> None:
    """Permutation and a power of two: to the bit. Translation by steps that are exact: likewise."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(np.round(64 * rng.standard_normal((n, d))) / 64)
    order = torch.from_numpy(rng.permutation(n))
    offset = torch.from_numpy(np.round(64 * rng.standard_normal(d)))
    for rule in (coordinate_median, trimmed_mean):
        vector = rule(rows).vector
        permuted = rule(rows[order]).vector
        torch.testing.assert_close(permuted, vector, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(rule(rows + offset).vector, vector + offset, rtol=0, atol=1e-12)
        assert torch.equal(rule(rows * 2.0**-40).vector, vector * 2.0**-40)
        torch.testing.assert_close(rule(-rows).vector, -vector, rtol=1e-14, atol=1e-14)
        columns = torch.from_numpy(rng.permutation(d))
        assert torch.equal(rule(rows[:, columns]).vector, vector[columns])


@pytest.mark.parametrize("n", [3, 4, 10, 11, 31])
@pytest.mark.parametrize("hostile_value", [3e38, -3e38, 0.0])
def test_a_minority_stays_between_the_honest_values(n: int, hostile_value: float) -> None:
    rng = np.random.default_rng(n)
    hostile = (n - 1) // 2
    updates = torch.from_numpy(1 + rng.random((n, 20))).float()
    updates[:hostile] = hostile_value
    honest = updates[hostile:]
    for vector in (
        coordinate_median(updates).vector,
        trimmed_mean(updates, trim_fraction=hostile / n).vector,
    ):
        assert (vector >= honest.amin(dim=0) * (1 - 1e-6)).all()
        assert (vector <= honest.amax(dim=0) * (1 + 1e-6)).all()


def test_one_more_hostile_row_than_trimmed_breaks_it() -> None:
    updates = torch.ones(10, 4)
    updates[:3] = 1e30
    assert trimmed_mean(updates, trim_fraction=0.3).vector.tolist() == [1.0] * 4
    assert (trimmed_mean(updates, trim_fraction=0.2).vector > 1e28).all()
    updates[:6] = 1e30
    assert (coordinate_median(updates).vector > 1e29).all()


def test_input_is_not_modified_and_need_not_be_contiguous() -> None:
    wide = torch.from_numpy(np.random.default_rng(2).standard_normal((12, 9))).float()
    before = wide.clone()
    for rule in (coordinate_median, trimmed_mean):
        strided = rule(wide[::2]).vector
        assert torch.equal(wide, before)
        assert torch.equal(strided, rule(wide[::2].contiguous()).vector)
        assert torch.equal(strided, rule(wide[::2].T.contiguous().T).vector)


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_rows_are_named(value: float, dtype: torch.dtype) -> None:
    """Even where the value would be trimmed away, and in the last of several blocks."""
    for n, d in ((1, 1), (5, 3), (3, 100_000)):
        updates = torch.ones(n, d, dtype=dtype)
        updates[n - 1, d - 1] = value
        for rule in (coordinate_median, trimmed_mean):
            with pytest.raises(ValueError, match=f"updates: row {n - 1} holds a NaN or an inf"):
                rule(updates)


@pytest.mark.parametrize("trim_fraction", [-0.1, 0.5, 1.0, math.nan, math.inf])
def test_refused_trim_fractions(trim_fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"trim_fraction is {trim_fraction}; allowed: 0 to below"):
        trimmed_mean(torch.ones(4, 2), trim_fraction=trim_fraction)
