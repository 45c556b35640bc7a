"""Nearest-neighbor mixing and bucketing."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import bucketing, geometric_median, nearest_neighbor_mixing

# Kinds in which no two different rows are equally near up to rounding.
UNAMBIGUOUS = ("normal", "small_integers", "duplicated", "mostly_zero", "columns_of_all_sizes")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Nearest-neighbor mixing -------------------------------------------------------------------


@given(update_matrices(kinds=UNAMBIGUOUS), st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.4, 0.49)))
@few_examples
def test_mixing_against_brute_force(updates: torch.Tensor, byzantine_fraction: float) -> None:
    rows = numpy64(updates)
    byzantine = math.floor(byzantine_fraction * len(rows) + 1e-9)
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=byzantine_fraction)
    expected = oracles.nearest_neighbor_mixing(rows, byzantine)
    assert mixed.shape == updates.shape
    size = np.abs(rows).max(axis=0)
    assert (np.abs(numpy64(mixed) - expected) <= 1e-6 * size + 1e-300).all()


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_mixing_of_float32_rows_far_from_the_origin(offset: float) -> None:
    """Distances of 1 between rows of norm 1e8: float32 inner products cannot see them."""
    rng = np.random.default_rng(0)
    updates = torch.from_numpy(rng.standard_normal((11, 500)) + offset).float()
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=0.4)
    expected = oracles.nearest_neighbor_mixing(numpy64(updates), 4)
    np.testing.assert_allclose(numpy64(mixed), expected, rtol=2e-7)


def test_mixing_by_hand() -> None:
    """With f = 1 of 4 every row averages the three nearest."""
    updates = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=0.25)
    assert mixed.flatten().tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 14 / 3])
    assert torch.equal(nearest_neighbor_mixing(updates[:1]), updates[:1])


def test_fraction_zero_gives_the_mean_in_every_row() -> None:
    updates = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 9)))
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=0.0)
    torch.testing.assert_close(mixed, updates.mean(dim=0).expand(6, 9))


def test_the_fraction_that_floats_round_down() -> None:
    """0.29 * 100 is 28.999999999999996: f must be 29, so 71 rows are averaged."""
    updates = torch.zeros(100, 1)
    updates[71:] = 1e6 * torch.arange(1.0, 30.0)[:, None]
    assert not nearest_neighbor_mixing(updates, byzantine_fraction=0.29)[:71].any()


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**32 - 1))
@few_examples
def test_mixing_symmetries(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((n, d)))
    mixed = nearest_neighbor_mixing(rows)
    order = torch.from_numpy(rng.permutation(n))
    torch.testing.assert_close(nearest_neighbor_mixing(rows[order]), mixed[order])
    offset = 100 * torch.from_numpy(rng.standard_normal(d))
    torch.testing.assert_close(
        nearest_neighbor_mixing(rows + offset), mixed + offset, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(nearest_neighbor_mixing(-1e20 * rows), -1e20 * mixed)
    turn = oracles.rotation(d, seed)
    torch.testing.assert_close(nearest_neighbor_mixing(rows @ turn), mixed @ turn)


@pytest.mark.parametrize("size", [1e3, 1e15, 1e30])
@pytest.mark.parametrize("n", [3, 10, 11])
def test_far_rows_are_not_mixed_into_honest_ones(n: int, size: float) -> None:
    hostile = (n - 1) // 2
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 7))
    rows[:hostile] *= size
    updates = torch.from_numpy(rows).float()
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=hostile / n)
    honest_mean = updates[hostile:].mean(dim=0)
    torch.testing.assert_close(mixed[hostile:], honest_mean.expand(n - hostile, 7))
    # With f too small they are.
    if hostile > 1:
        mixed = nearest_neighbor_mixing(updates, byzantine_fraction=(hostile - 1) / n)
        assert (mixed[hostile:].norm(dim=1) > size / 100).all()


@given(st.integers(3, 15), st.integers(1, 20), st.floats(-2, 3), st.integers(0, 2**32 - 1))
@few_examples
def test_contraction(n: int, d: int, magnitude: float, seed: int) -> None:
    """Allouah et al., Lemma 5, for any hostile rows and S the n - f honest ones.

    mean_S ||y_i - mean_S y||^2 + ||mean_S y - mean_S x||^2 <= 8 f / (n - f) * variance_S(x)
    """
    rng = np.random.default_rng(seed)
    hostile = int(rng.integers(1, (n - 1) // 2 + 1))
    rows = rng.standard_normal((n, d))
    rows[:hostile] = 10**magnitude * (rng.standard_normal(d) + rng.standard_normal((hostile, d)))
    mixed = nearest_neighbor_mixing(torch.from_numpy(rows), byzantine_fraction=hostile / n).numpy()
    honest, after = rows[hostile:], mixed[hostile:]
    variance = ((honest - honest.mean(axis=0)) ** 2).sum(axis=1).mean()
    spread = ((after - after.mean(axis=0)) ** 2).sum(axis=1).mean()
    moved = ((after.mean(axis=0) - honest.mean(axis=0)) ** 2).sum()
    assert spread + moved <= 8 * hostile / (n - hostile) * variance * (1 + 1e-9)


def test_mixing_helps_the_geometric_median_where_honest_rows_disagree() -> None:
    """40 % of the rows pull one way; the honest ones are spread wider than their mean is long."""
    rng = np.random.default_rng(3)
    honest = 0.3 + rng.standard_normal((6, 200))
    updates = torch.from_numpy(np.concatenate((honest, -100 * honest[:4])))
    mean = honest.mean(axis=0)
    plain = oracles.norm(geometric_median(updates).vector.numpy() - mean)
    mixed = nearest_neighbor_mixing(updates, byzantine_fraction=0.4)
    assert oracles.norm(geometric_median(mixed).vector.numpy() - mean) < 0.1 * plain


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_mixing_of_float64_rows_of_any_magnitude(scale: float) -> None:
    rows = np.random.default_rng(4).standard_normal((9, 5))
    expected = numpy64(nearest_neighbor_mixing(torch.from_numpy(rows)))
    mixed = nearest_neighbor_mixing(torch.from_numpy(rows * scale))
    np.testing.assert_allclose(numpy64(mixed) / scale, expected, rtol=1e-9)


def test_mixing_of_float64_rows_at_both_ends_of_the_range() -> None:
    rows = np.random.default_rng(5).standard_normal((9, 5))
    rows[:3] *= 1e30
    rows[3] *= 1e300
    mixed = nearest_neighbor_mixing(torch.from_numpy(rows), byzantine_fraction=0.45)
    expected = rows[4:].mean(axis=0)
    np.testing.assert_allclose(mixed.numpy()[4:], np.tile(expected, (5, 1)), rtol=1e-9)


# --- Bucketing ----------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
@few_examples
def test_buckets_are_disjoint_and_complete(n: int, bucket_size: int, seed: int) -> None:
    """Rows of the identity show who went where."""
    mixed = bucketing(torch.eye(n), bucket_size=bucket_size, generator=seeded(seed))
    assert mixed.shape == (math.ceil(n / bucket_size), n)
    assert ((mixed > 0).sum(dim=0) == 1).all()
    sizes = (mixed > 0).sum(dim=1)
    assert (sizes[:-1] == bucket_size).all()
    assert int(sizes[-1]) == n - bucket_size * (len(sizes) - 1)
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(len(sizes)))
    assert (mixed[mixed > 0] * sizes[(mixed > 0).nonzero()[:, 0]] - 1).abs().max() < 1e-6


def test_bucketing_keeps_the_mean_when_the_buckets_are_full() -> None:
    updates = torch.from_numpy(np.random.default_rng(6).standard_normal((12, 9)))
    for bucket_size in (1, 2, 3, 4, 6, 12):
        mixed = bucketing(updates, bucket_size=bucket_size)
        torch.testing.assert_close(mixed.mean(dim=0), updates.mean(dim=0))


def test_bucketing_with_size_1_is_a_shuffle() -> None:
    updates = torch.arange(10.0)[:, None]
    mixed = bucketing(updates, bucket_size=1, generator=seeded(0))
    assert mixed.flatten().sort().values.tolist() == list(range(10))
    assert mixed.flatten().tolist() != list(range(10))
    assert torch.equal(mixed, bucketing(updates, bucket_size=1, generator=seeded(0)))
    assert not torch.equal(mixed, bucketing(updates, bucket_size=1, generator=seeded(1)))


def test_bucketing_by_default_uses_torch_s_generator_and_pairs() -> None:
    updates = torch.arange(7.0)[:, None]
    torch.manual_seed(1)
    one = bucketing(updates)
    torch.manual_seed(1)
    assert torch.equal(one, bucketing(updates))
    assert one.shape == (4, 1)
    assert torch.equal(bucketing(updates, bucket_size=100), torch.full((1, 1), 3.0))


def test_every_pair_is_equally_likely() -> None:
    draws = 2000
    together = sum(
        int((bucketing(torch.eye(6), generator=generator)[:, :2] > 0).all(dim=1).any())
        for generator in [seeded(2)]
        for _ in range(draws)
    )
    p = 1 / 5
    assert abs(together - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p))


# --- Both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    updates = torch.from_numpy(np.random.default_rng(7).standard_normal((8, 30))).to(dtype)
    before = updates.clone()
    for rule in (nearest_neighbor_mixing, bucketing):
        mixed = rule(updates)
        assert mixed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(updates, before)
    expected = oracles.nearest_neighbor_mixing(numpy64(updates), 2)
    np.testing.assert_allclose(numpy64(nearest_neighbor_mixing(updates)), expected, atol=1e-6)


def test_more_columns_than_one_block() -> None:
    updates = torch.from_numpy(np.random.default_rng(8).standard_normal((4, 200_001))).float()
    expected = oracles.nearest_neighbor_mixing(numpy64(updates), 1)
    np.testing.assert_allclose(numpy64(nearest_neighbor_mixing(updates)), expected, atol=1e-6)
    mixed = bucketing(updates, generator=seeded(0))
    torch.testing.assert_close(mixed.mean(dim=0), updates.mean(dim=0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_rows_are_named(value: float, dtype: torch.dtype) -> None:
    updates = torch.ones(5, 3, dtype=dtype)
    updates[4, 0] = value
    with pytest.raises(ValueError, match="updates: row 4 holds a NaN or an infinity"):
        nearest_neighbor_mixing(updates)


@pytest.mark.parametrize("byzantine_fraction", [-0.1, 0.5, 1.0, math.nan])
def test_refused_fractions(byzantine_fraction: float) -> None:
    match = f"byzantine_fraction is {byzantine_fraction}; allowed: 0 to below 0.5"
    with pytest.raises(ValueError, match=match):
        nearest_neighbor_mixing(torch.ones(4, 2), byzantine_fraction=byzantine_fraction)


@pytest.mark.parametrize("bucket_size", [0, -2])
def test_refused_bucket_sizes(bucket_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"bucket_size is {bucket_size}; allowed: a whole number, 1 or more"
    ):
        bucketing(torch.ones(4, 2), bucket_size=bucket_size)


@pytest.mark.parametrize("rule", [nearest_neighbor_mixing, bucketing])
def test_refused_updates(rule: object) -> None:
    assert callable(rule)
    with pytest.raises(ValueError, match=r"updates has shape \(4,\); allowed: \(n, d\)"):
        rule(torch.ones(4))
    with pytest.raises(TypeError, match=r"updates has dtype torch\.int64"):
        rule(torch.ones(4, 2, dtype=torch.int64))
