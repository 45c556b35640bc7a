"""Mixings that clip: by hand, against float64, and what a minority can do to them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_bgmd.aggregators import build_rule, geometric_median
from fl_bgmd.aggregators.mixing import adaptive_clipping, clipping, lower_median, median_clipping


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def of_lengths(*lengths: float) -> Tensor:
    return torch.diag(torch.tensor(lengths, dtype=torch.float64))


def lengths_of(rows: Tensor) -> list[float]:
    return [round(length, 5) for length in rows.double().norm(dim=1).tolist()]


def test_clipping_by_hand() -> None:
    rows = of_lengths(1.0, 4.0, 2.0, 8.0)
    assert lengths_of(clipping(rows).apply(rows)) == [1, 2, 2, 2]
    assert lengths_of(clipping(rows, factor=2.0).apply(rows)) == [1, 4, 2, 4]
    assert lengths_of(clipping(rows, radius=5.0).apply(rows)) == [1, 4, 2, 5]


def test_adaptive_clipping_by_hand() -> None:
    rows = of_lengths(*range(1, 11))
    # f = 2 of n = 10: 2 * 2 * 8 / 10 = 3.2 rows, clipped to the fourth longest.
    found = lengths_of(adaptive_clipping(rows, byzantine_fraction=0.2).apply(rows))
    assert found == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    assert torch.equal(adaptive_clipping(rows, byzantine_fraction=0.0).apply(rows), rows)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_median_clipping_against_float64(n: int) -> None:
    rows = normal(n, 40)
    rows[0] *= 30
    center = geometric_median(rows.double()).vector
    offsets = rows.double() - center
    distances = offsets.norm(dim=1)
    limit = lower_median(distances.numpy())
    expected = center + offsets * (limit / distances.clamp_min(1e-300)).clamp_max(1.0)[:, None]
    torch.testing.assert_close(
        median_clipping(rows).apply(rows).double(), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("mixing", [clipping, adaptive_clipping, median_clipping])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_matrix_is_the_same_for_rows_and_for_weights(mixing: object, size: float) -> None:
    rows = normal(9, 20).double() * size
    rows[:3] *= 1e6
    made = mixing(rows)  # type: ignore[operator]
    before = rows.clone()
    mixed = made.apply(rows)
    assert torch.equal(rows, before)
    shares = np.linspace(0.0, 1.0, 9)
    expected = torch.from_numpy(shares) @ mixed
    found = torch.from_numpy(made.spread(shares)) @ rows
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * size)
    assert made.average(shares).tolist() == shares.tolist()
    assert made.apply(rows, out=rows) is rows
    assert torch.equal(rows, mixed)


@pytest.mark.parametrize("spec", ["clipping", "median-clipping", "arc"])
def test_long_rows_draw_nobody_far(spec: str) -> None:
    """A minority of any length moves the mean of clipped rows by no more than honest rows do."""
    rows = normal(11, 50)
    honest = rows[4:].norm(dim=1).max()
    for size in (1e3, 1e15, 1e30):
        rows[:4] = size
        vector = build_rule(f"mean+{spec}", byzantine_fraction=0.37)(rows).vector
        assert float(vector.norm()) < 2.5 * float(honest)


def test_rows_that_are_equal_or_zero_stay() -> None:
    for rows in (torch.zeros(4, 3), torch.ones(4, 3)):
        for mixing in (clipping, adaptive_clipping, median_clipping):
            torch.testing.assert_close(mixing(rows).apply(rows), rows)


def test_refused_options() -> None:
    for spec in ("mean+clipping:radius=0", "mean+clipping:factor=-1", "mean+median-clipping:0"):
        with pytest.raises(ValueError, match="allowed: a number, above 0"):
            build_rule(spec)
