"""SignGuard, and the mean shift behind it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices
from sklearn.cluster import MeanShift, estimate_bandwidth

from fl_bgmd.aggregators import sign_guard
from fl_bgmd.aggregators.signs import mean_shift


def normal(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_the_mean_shift_finds_the_clusters_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    middles = rng.uniform(0, 1, (3, 3))
    points = np.repeat(middles, [8, 4, 3], axis=0) + 0.01 * rng.standard_normal((15, 3))
    bandwidth = estimate_bandwidth(points, quantile=0.5)
    expected = MeanShift(bandwidth=bandwidth).fit_predict(points)
    found = mean_shift(points)
    largest = [labels == np.bincount(labels).argmax() for labels in (found, expected)]
    assert (largest[0] == largest[1]).all()


def test_the_mean_shift_by_hand() -> None:
    # Half of five, two with the point itself, are within 1, 1, 1, 10 and 10: 23 / 5 = 4.6.
    points = np.array([[0.0], [1.0], [2.0], [20.0], [30.0]])
    assert mean_shift(points).tolist() == [0, 0, 0, 1, 2]
    equal = np.array([[0.5], [0.5], [0.5], [0.7]])
    assert mean_shift(equal).tolist() == [0, 0, 0, 1]
    assert mean_shift(np.zeros((1, 3))).tolist() == [0]


@given(update_matrices(kinds=("normal", "mostly_zero", "rows_of_all_sizes")), st.integers(0, 99))
@few_examples
def test_against_the_definition(updates: torch.Tensor, seed: int) -> None:
    rows = numpy64(updates)
    result = sign_guard(updates, coordinate_share=1.0)
    counts = [(rows > 0).sum(axis=1), (rows == 0).sum(axis=1), (rows < 0).sum(axis=1)]
    features = np.stack(counts, axis=1) / rows.shape[1]
    labels = mean_shift(features)
    norms = np.linalg.norm(rows, axis=1)
    middle = np.median(norms)
    like_most = labels == np.bincount(labels).argmax()
    kept = like_most & (norms >= 0.1 * middle) & (norms <= 3 * middle)
    kept = kept if kept.any() else like_most
    assert result.kept.tolist() == kept.tolist()
    clipped = [
        row * min(1.0, middle / norm) if norm > 0 else row
        for row, norm in zip(rows[kept], norms[kept], strict=True)
    ]
    error = np.abs(numpy64(result.vector) - np.mean(clipped, axis=0)).max()
    assert error <= 1e-6 * max(middle, 1e-300)


def test_by_hand() -> None:
    """Norms 2, 2, 2, 2, 2, 40 and 0.1; the sixth is too long, the last too short, one is turned."""
    rows = torch.tensor([[1.0, 1.0, 1.0, 1.0]] * 4 + [[-1.0] * 4] + [[20.0] * 4] + [[0.05] * 4])
    result = sign_guard(rows, coordinate_share=1.0)
    assert result.kept.tolist() == [True] * 4 + [False] * 3
    assert result.vector.tolist() == [1.0] * 4
    rows[0] *= 2  # within three times the median: clipped to it
    assert sign_guard(rows, coordinate_share=1.0).vector.tolist() == [1.0] * 4


def test_where_the_filters_agree_on_nobody_the_signs_decide() -> None:
    rows = torch.tensor([[10.0, 10.0], [10.0, 10.0], [10.0, 10.0], [-1.0, 1.0], [1.0, -1.0]])
    result = sign_guard(rows, coordinate_share=1.0, upper=0.5, lower=0.0)
    assert result.kept.tolist() == [True, True, True, False, False]


def test_rows_of_foreign_signs_are_left_out() -> None:
    rows = normal(12, 20_000, shift=0.3)
    rows[:3] *= -1
    rows[3] = 1e30
    result = sign_guard(rows, generator=seeded())
    assert result.kept.tolist() == [False] * 4 + [True] * 8


def test_a_tenth_of_the_columns_is_looked_at_and_which_is_drawn() -> None:
    """A row that is turned in the columns of one draw is found by it, and not by all others."""
    rows = normal(9, 5_000, shift=0.5)
    generator = seeded(5)
    starts = torch.arange(0, 5_000, 10)
    drawn = starts + (10 * torch.rand(500, generator=generator, dtype=torch.float64)).long()
    before = int((rows[0] > 0).sum())
    rows[0, drawn] *= -1
    others = torch.ones(5_000, dtype=torch.bool)
    others[drawn] = False
    missing = before - int((rows[0] > 0).sum())
    negative = (others & (rows[0] < 0)).nonzero().flatten()
    rows[0, negative[torch.randperm(len(negative), generator=seeded())[:missing]]] *= -1
    assert int((rows[0] > 0).sum()) == before
    assert not sign_guard(rows, generator=seeded(5)).kept[0]
    assert any(sign_guard(rows, generator=seeded(seed)).kept[0] for seed in range(6, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinate_share": 0.0}, "coordinate_share is 0.0; allowed: above 0 to 1"),
        ({"coordinate_share": 1.5}, "coordinate_share is 1.5; allowed: above 0 to 1"),
        ({"lower": -1.0}, "lower is -1.0; allowed: 0 or more"),
        ({"upper": 0.0}, "upper is 0.0; allowed: above 0"),
    ],
)
def test_refused_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sign_guard(normal(5, 3), **options)  # type: ignore[arg-type]
