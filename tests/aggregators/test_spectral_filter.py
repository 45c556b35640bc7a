"""The spectral filter: against SVDs in R^d, by hand, and where norms see nothing."""

import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import few_examples, numpy64

from fl_bgmd.aggregators import (
    SpectralFilter,
    build_rule,
    coordinate_median,
    mean,
    norm_clip,
    norm_threshold,
    spectral_filter,
    theoretical_sigma0,
)
from fl_bgmd.aggregators.saddle import project_columns, solve_saddle

METHODS = ("mean", "saddle")


def planted(
    n: int, d: int, corrupt: int, *, seed: int = 0, push: float | None = None
) -> tuple[torch.Tensor, np.ndarray, float]:
    """Return updates (corrupt rows first), the honest mean, and the honest sigma_0.

    Honest rows are N(0, I); corrupt rows agree on one direction and have the honest norm,
    sqrt(d), or ``push`` times it.
    """
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d))
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)
    rows[:corrupt] = math.sqrt(d) * direction * (1.0 if push is None else push)
    honest = rows[corrupt:]
    middle = honest.mean(axis=0)
    sigma0 = float(np.linalg.norm(honest - middle, 2)) / math.sqrt(len(honest))
    return torch.from_numpy(rows), middle, sigma0


def assert_consistent(updates: torch.Tensor, result: SpectralFilter) -> None:
    """Check that the vector is the plain mean of the kept rows, at least one of them."""
    kept = result.kept.numpy()
    assert kept.dtype == bool
    assert kept.any()
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx((kept / kept.sum()).tolist())
    rows = numpy64(updates)[kept]
    error = np.abs(numpy64(result.vector) - rows.mean(axis=0))
    assert (error <= 1e-6 * np.abs(rows).max(axis=0)).all()


# --- Against the oracle -------------------------------------------------------------------------


@given(
    st.integers(1, 15),
    st.integers(1, 20),
    st.integers(0, 4),
    st.sampled_from((0.1, 0.5, 1.0, 2.0)),
    st.sampled_from((0.0, 1e2, 1e4)),
    st.integers(0, 2**32 - 1),
)
@few_examples
def test_against_svds_in_r_d(
    n: int, d: int, corrupt: int, sigma0: float, offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d)) * rng.uniform(0.5, 2, (n, 1)) + offset
    rows[:corrupt] += 10.0 ** rng.uniform(0, 6, (min(n, corrupt), 1))
    vector, kept, iterations = oracles.spectral_filter(rows, sigma0)
    if not kept.any():
        return
    result = spectral_filter(torch.from_numpy(rows), sigma0=sigma0)
    assert result.kept.tolist() == kept.tolist()
    assert result.iterations == iterations
    assert result.sigma0 == pytest.approx(sigma0)
    np.testing.assert_allclose(numpy64(result.vector), vector, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("byzantine_fraction", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("n", [4, 11, 20])
def test_estimate_of_sigma0(n: int, byzantine_fraction: float) -> None:
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 7)) + 5
    rows[0] += 100
    left = math.ceil((1 - byzantine_fraction) * n - 1e-9)
    for method in METHODS:
        result = spectral_filter(
            torch.from_numpy(rows), byzantine_fraction=byzantine_fraction, method=method
        )
        assert result.sigma0 == pytest.approx(oracles.spectral_sigma0(rows, left), rel=1e-9)
        assert_consistent(torch.from_numpy(rows), result)
        if left < n:
            assert result.kept.tolist() == [i > 0 for i in range(n)]


# --- Values derived by hand ---------------------------------------------------------------------


def test_one_far_row_is_dropped() -> None:
    """0, 0, 0, 0, 10: mean 2, tau = 4, 4, 4, 4, 64, sum 80 > 4 * 5 * 1. Then all equal."""
    updates = torch.tensor([[0.0], [0.0], [0.0], [0.0], [10.0]])
    result = spectral_filter(updates, sigma0=1.0)
    assert result.kept.tolist() == [True] * 4 + [False]
    assert result.vector.tolist() == [0.0]
    assert result.iterations == 1
    # With sigma_0 = 2 the sum 80 is just allowed: 4 * 5 * 4 = 80.
    allowed = spectral_filter(updates, sigma0=2.0)
    assert allowed.kept.all()
    assert allowed.iterations == 0
    assert allowed.vector.tolist() == [2.0]


def test_soft_weights_decide_in_the_second_round() -> None:
    """A row that survives the first round at c >= 1/2 counts less in the second.

    -1, 0, 0, 1, 6, 40: mean 46/6; the farthest goes, c of the others stays above 1/2; then
    6 against -1, 0, 0, 1 goes as well.
    """
    updates = torch.tensor([[-1.0], [0.0], [0.0], [1.0], [6.0], [40.0]], dtype=torch.float64)
    result = spectral_filter(updates, sigma0=0.6)
    assert result.kept.tolist() == [True, True, True, True, False, False]
    assert result.vector.tolist() == [0.0]
    assert result.iterations == 2


def test_direction_of_the_largest_spread_decides() -> None:
    """The far row is the one of ordinary norm that agrees with nobody in the second coordinate."""
    updates = torch.tensor(
        [[5.0, 0.1], [5.1, -0.1], [4.9, 0.0], [5.0, 0.0], [5.05, 0.05], [0.0, 5.0]]
    )
    result = spectral_filter(updates, sigma0=0.2)
    assert result.kept.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("sigma0", [None, 0.1])
def test_equal_rows_are_all_kept(sigma0: float | None) -> None:
    for value in (0.0, 0.1, -1e30):
        updates = torch.full((6, 3), value)
        for method in METHODS:
            result = spectral_filter(updates, sigma0=sigma0, method=method)
            assert result.kept.all()
            assert result.iterations == 0
        torch.testing.assert_close(result.vector, updates[0])


@pytest.mark.parametrize("sigma0", [None, 0.1])
def test_one_row(sigma0: float | None) -> None:
    row = torch.tensor([[1e30, -0.1]])
    result = spectral_filter(row, sigma0=sigma0)
    assert torch.equal(result.vector, row[0])
    assert result.kept.tolist() == [True]


def test_two_rows_are_both_kept() -> None:
    """Each tau is (6^2 + 8^2) / 4 = 25 and sigma_0 is estimated as 5: 50 <= 4 * 2 * 25."""
    updates = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    result = spectral_filter(updates)
    assert result.sigma0 == pytest.approx(5.0)
    assert result.kept.all()
    assert result.vector.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "rows",
    [
        [[0.0, 0.0], [6.0, 8.0]],
        [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]],
        [[5.0], [5.0], [-5.0], [-5.0], [5.0], [-5.0]],
    ],
)
def test_rows_that_are_all_equally_wrong_do_not_vanish_together(rows: list[list[float]]) -> None:
    """Every tau is the largest, so every weight falls to 0: something must be returned."""
    updates = torch.tensor(rows)
    for method in METHODS:
        result = spectral_filter(updates, sigma0=0.01, method=method)
        assert torch.isfinite(result.vector).all()
        assert_consistent(updates, result)


@pytest.mark.parametrize("sigma0", [None, 0.5])
def test_both_methods_drop_what_is_far(sigma0: float | None) -> None:
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((12, 6)) * 0.3
    rows[[2, 7]] += [[4.0], [-9.0]]
    updates = torch.from_numpy(rows)
    for method in METHODS:
        result = spectral_filter(updates, sigma0=sigma0, method=method)
        assert_consistent(updates, result)
        assert result.kept.tolist() == [i not in (2, 7) for i in range(12)]
    assert spectral_filter(updates, sigma0=sigma0).gap is None
    gap = spectral_filter(updates, sigma0=sigma0, method="saddle").gap
    assert gap is not None
    assert 0 <= gap <= 0.05


# --- The saddle point problem -------------------------------------------------------------------


def left_over(rows: np.ndarray, c: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return the top eigenvalue of sum_i c_i (g_i - G w_i) (g_i - G w_i)^T, in R^d."""
    residuals = rows - reconstruction.T @ rows
    return float(np.linalg.norm(np.sqrt(c)[:, None] * residuals, 2) ** 2)


@given(st.integers(2, 8), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(few_examples, max_examples=25)
def test_saddle_value_and_gap(m: int, d: int, looseness: float, seed: int) -> None:
    """No W that obeys the cap does better than the gap allows; the mean does no better at all."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((m, d))
    c = rng.uniform(0.5, 1, m)
    cap = 1 / m + looseness * (1 - 1 / m)
    saddle = solve_saddle(rows @ rows.T, c, cap)
    assert saddle.gap >= 0
    slack = 1e-9 * (rows**2).sum()
    assert saddle.value <= left_over(rows, c, np.full((m, m), 1 / m)) + slack
    assert c @ saddle.errors <= saddle.value + slack
    for _ in range(50):
        trial = project_columns(rng.standard_normal((m, m)) * rng.uniform(0, 2), cap)
        assert (trial >= 0).all()
        assert (trial <= cap + 1e-9).all()
        np.testing.assert_allclose(trial.sum(axis=0), 1, atol=1e-9)
        assert left_over(rows, c, trial) >= saddle.value * (1 - saddle.gap) - slack


def test_saddle_without_a_cap_reconstructs_every_row_by_itself() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3))
    saddle = solve_saddle(rows @ rows.T, np.ones(5), 1.0)
    mean_value = left_over(rows, np.ones(5), np.full((5, 5), 0.2))
    assert saddle.value <= 1e-3 * mean_value


def test_saddle_with_the_smallest_cap_is_the_mean() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 4))
    saddle = solve_saddle(rows @ rows.T, np.ones(6), 1 / 6)
    assert saddle.value == pytest.approx(left_over(rows, np.ones(6), np.full((6, 6), 1 / 6)))


def test_projection_by_hand() -> None:
    """Less 0.2 and cut at 0 the entries sum to one; with a cap of 0.5 it takes 0.05."""
    column = np.array([[0.9], [0.5], [0.1]])
    assert project_columns(column, 1.0).ravel() == pytest.approx([0.7, 0.3, 0.0])
    assert project_columns(column, 0.5).ravel() == pytest.approx([0.5, 0.45, 0.05])
    assert project_columns(column, 1 / 3).ravel() == pytest.approx([1 / 3] * 3)


# --- Properties ---------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
@few_examples
def test_symmetries(n: int, d: int, given_sigma: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((n, d)) * rng.uniform(0.5, 2, (n, 1)))
    rows[0] += 30
    sigma0 = 1.0 if given_sigma else None

    def kept(updates: torch.Tensor, scale: float = 1.0) -> list[bool]:
        result = spectral_filter(updates, sigma0=None if sigma0 is None else scale * sigma0)
        assert_consistent(updates, result)
        return result.kept.tolist()

    before = kept(rows)
    order = rng.permutation(n)
    assert kept(rows[torch.from_numpy(order)]) == [before[i] for i in order]
    assert kept(rows + 100 * torch.from_numpy(rng.standard_normal(d))) == before
    assert kept(-1e9 * rows, 1e9) == before
    assert kept(1e-9 * rows, 1e-9) == before
    assert kept(rows @ oracles.rotation(d, seed)) == before


@pytest.mark.parametrize("sigma0_is_given", [False, True])
@pytest.mark.parametrize("corrupt", [10, 20, 37])
def test_planted_corruption_that_norms_cannot_see(corrupt: int, sigma0_is_given: bool) -> None:
    """Theorem 3: ||estimate - honest mean|| = O(sigma_0 sqrt(eps)); 1 is enough for the O here.

    Corrupt rows lie on the shell of the honest ones, so rules on norms average them in and move
    by eps sqrt(d), and the coordinate-wise median goes a good part of the way.
    """
    n, d = 150, 1500
    updates, middle, honest_sigma = planted(n, d, corrupt)
    epsilon = corrupt / n
    result = spectral_filter(
        updates,
        byzantine_fraction=epsilon,
        sigma0=honest_sigma if sigma0_is_given else None,
    )
    assert_consistent(updates, result)
    error = oracles.norm(result.vector.numpy() - middle)
    assert error <= honest_sigma * math.sqrt(epsilon)
    assert not result.kept[:corrupt].any()
    blind = (
        mean(updates),
        norm_clip(updates),
        norm_threshold(updates, drop_fraction=epsilon),
        coordinate_median(updates),
    )
    for other in blind:
        assert oracles.norm(other.vector.numpy() - middle) > 2 * error


def test_corruption_too_weak_to_see_is_too_weak_to_hurt() -> None:
    """What passes the test of line 5 moves the mean by less than sigma_0 sqrt(eps)."""
    for push in (0.05, 0.2, 0.4):
        updates, middle, sigma0 = planted(120, 300, 12, push=push)
        result = spectral_filter(updates, byzantine_fraction=0.1, sigma0=sigma0)
        error = oracles.norm(result.vector.numpy() - middle)
        assert error <= 2 * sigma0 * math.sqrt(0.1)


def test_honest_rows_alone_pass() -> None:
    for seed in range(5):
        updates, _, sigma0 = planted(50, 300, 0, seed=seed)
        assert spectral_filter(updates, sigma0=sigma0).kept.all()
        assert spectral_filter(updates).kept.all()


@pytest.mark.parametrize("size", [1e2, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("kind", ["one point", "scattered"])
def test_a_quarter_of_huge_rows(kind: str, size: float) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((20, 10))
    rows[:5] = size * (rng.standard_normal(10) if kind == "one point" else rows[:5])
    updates = torch.from_numpy(rows).float()
    result = spectral_filter(updates, byzantine_fraction=0.25)
    assert not result.kept[:5].any()
    assert_consistent(updates, result)
    honest = numpy64(updates)[5:]
    deviation = oracles.norm(numpy64(result.vector) - honest.mean(axis=0))
    assert deviation <= oracles.distances(honest.mean(axis=0), honest).max()


def test_a_majority_of_equal_rows_wins() -> None:
    updates = torch.from_numpy(np.random.default_rng(4).standard_normal((10, 4))).float()
    updates[2:] = 1e6
    result = spectral_filter(updates)
    assert (result.vector == 1e6).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_float64_rows_of_any_magnitude(scale: float) -> None:
    rows = np.random.default_rng(5).standard_normal((9, 5))
    rows[0] += 50
    for sigma0 in (None, 1.0):
        expected = spectral_filter(torch.from_numpy(rows), sigma0=sigma0)
        result = spectral_filter(
            torch.from_numpy(rows * scale), sigma0=None if sigma0 is None else scale * sigma0
        )
        assert torch.equal(result.kept, expected.kept)
        assert result.sigma0 / scale == pytest.approx(expected.sigma0)
        np.testing.assert_allclose(
            numpy64(result.vector) / scale, numpy64(expected.vector), rtol=1e-9
        )


def test_float64_rows_at_both_ends_of_the_range() -> None:
    rows = np.random.default_rng(6).standard_normal((12, 5))
    rows[:2] *= 1e30
    rows[2] *= 1e300
    result = spectral_filter(torch.from_numpy(rows), byzantine_fraction=0.25)
    assert not result.kept[:3].any()
    assert oracles.norm(numpy64(result.vector)) <= 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    rows = np.random.default_rng(7).standard_normal((8, 30))
    rows[3] += 100
    updates = torch.from_numpy(rows).to(dtype)
    before = updates.clone()
    result = spectral_filter(updates)
    assert result.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(updates, before)
    assert result.kept.tolist() == [i != 3 for i in range(8)]


# --- Warned of and refused ----------------------------------------------------------------------


def test_warns_above_a_quarter() -> None:
    updates = torch.from_numpy(np.random.default_rng(8).standard_normal((10, 4)))
    updates[:4] *= 1e6
    message = (
        "a hostile share of 0.40 .4 of 10.: the guarantee of the robust filter .* ends at 0.25"
    )
    with pytest.warns(UserWarning, match=message):
        result = spectral_filter(updates, byzantine_fraction=0.4)
    assert not result.kept[:4].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral_filter(updates, byzantine_fraction=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byzantine_fraction": -0.1}, "byzantine_fraction is -0.1; allowed: 0 to below 0.5"),
        ({"byzantine_fraction": 0.5}, "byzantine_fraction is 0.5; allowed: 0 to below 0.5"),
        ({"byzantine_fraction": math.nan}, "byzantine_fraction is nan; allowed: 0 to below 0.5"),
        ({"sigma0": 0.0}, "sigma0 is 0.0; allowed: above 0"),
        ({"sigma0": -2.0}, "sigma0 is -2.0; allowed: above 0"),
        ({"sigma0": math.nan}, "sigma0 is nan; allowed: above 0"),
        ({"method": "median"}, "method is 'median'; allowed: mean, saddle"),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_filter(torch.ones(4, 2), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_rows_are_named(value: float, dtype: torch.dtype) -> None:
    updates = torch.ones(5, 3, dtype=dtype)
    updates[3, 2] = value
    with pytest.raises(ValueError, match="updates: row 3 holds a NaN or an infinity"):
        spectral_filter(updates)


@pytest.mark.parametrize(("n", "hostile"), [(12, 5), (20, 9), (100, 42)])
def test_many_equal_outliers_do_not_pass_for_the_rule(n: int, hostile: int) -> None:
    """Beyond the guarantee, where all weights fall below a half in one step."""
    updates = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    updates[:hostile] = -1000.0
    with pytest.warns(UserWarning, match="a hostile share of 0.45"):
        result = spectral_filter(updates, byzantine_fraction=0.45)
    assert not result.kept[:hostile].any()
    assert float(result.vector.norm()) < 10


def equation_12(**changes: float) -> float:
    numbers = {"sigma": 2.0, "kappa": 3.0, "batch_size": 5, "num_clients": 20, "dimensions": 6}
    numbers |= {"byzantine_fraction": 0.2, "slack": 0.05, **changes}
    return theoretical_sigma0(**numbers)  # type: ignore[arg-type]


def test_sigma0_of_equation_12_by_hand() -> None:
    # (1 - 0.25) 20 = 15, sigma^2 / (b eps') = 4 / 0.25 = 16
    assert equation_12() ** 2 == pytest.approx(24 * 16 * (1 + 6 / 15) + 16 * 9)
    assert equation_12(sigma=0.0) == pytest.approx(4 * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slack": 0.0}, "slack 0.0; allowed: 0 or more, and above 0"),
        ({"slack": 0.06}, "byzantine_fraction \\+ slack is 0.26; allowed: at most 0.25"),
        ({"sigma": -1.0}, "sigma is -1.0; allowed: 0 or more"),
        ({"kappa": math.inf}, "kappa is inf; allowed: 0 or more"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
    ],
)
def test_sigma0_of_equation_12_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equation_12(**changes)


def test_honest_rows_are_within_equation_12() -> None:
    """Theorem 3, part 1: of honest gradients (1 - eps') n are, and here all of them."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(40, 50))  # sigma^2 / b = d = 50, kappa = 0
    sigma0 = equation_12(
        sigma=math.sqrt(50), kappa=0.0, batch_size=1, num_clients=40, dimensions=50
    )
    spread = np.linalg.norm(rows - rows.mean(0), 2) / math.sqrt(40)
    assert spread < sigma0
    assert spectral_filter(torch.from_numpy(rows), sigma0=sigma0).kept.all()


def test_slack_lets_a_row_be_made_up_of_fewer_others() -> None:
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(12, 6)))
    errors = []
    for slack in (0.0, 0.2):
        result = spectral_filter(rows, byzantine_fraction=0.05, method="saddle", slack=slack)
        errors.append(result)
    assert errors[0].gap != errors[1].gap
    rule = build_rule("robust-filter:slack=0.1", byzantine_fraction=0.2)
    assert "a slack of 0.10" in rule.notes(10)["proven"]
    assert "proven" not in build_rule("robust-filter", byzantine_fraction=0.2).notes(10)
