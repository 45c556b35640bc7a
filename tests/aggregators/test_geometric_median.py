"""The geometric median: its certificate against a slow oracle, its symmetries, its breakdown."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import GeometricMedian, geometric_median
from fl_bgmd.aggregators.rows import gram_matrix

SOLVERS = ("gram", "newton", "weiszfeld")
CERTIFYING = ("gram", "newton")  # whatever the rows
TOL = 1e-6
# Kinds of which float32 vectors can be as accurate as the tolerance asks.
UNRESOLVED = ("two_far_clusters", "rows_of_all_sizes")
RESOLVED = tuple(kind for kind in oracles.KINDS if kind not in UNRESOLVED)


def assert_certified(
    updates: torch.Tensor, result: GeometricMedian, weights: np.ndarray | None = None
) -> None:
    """Compare the vector, the gap and the objective with the oracle's."""
    rows = numpy64(updates)
    _, lowest = oracles.geometric_median(rows, weights)
    vector = numpy64(result.vector)
    assert np.isfinite(vector).all()
    reached = oracles.summed_distance(vector, rows, weights)
    assert reached <= (1 + result.gap) * lowest * (1 + 1e-12)
    total = len(rows) if weights is None else weights.sum()
    rounding = torch.finfo(result.vector.dtype).eps * oracles.norm(vector) * total
    assert abs(result.objective - reached) <= 1e-6 * reached + rounding


def assert_convex_coefficients(updates: torch.Tensor, result: GeometricMedian) -> None:
    """Check that the reported weights are convex and reproduce the vector."""
    assert result.weights is not None
    assert result.weights.dtype == torch.float64
    coefficients = result.weights.numpy()
    assert (coefficients >= 0).all()
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)
    rows, vector = numpy64(updates), numpy64(result.vector)
    size = coefficients @ np.abs(rows)
    assert (np.abs(coefficients @ rows - vector) <= 1e-6 * size + 1e-300).all()


def honest_and_hostile(
    n: int, d: int, hostile: int, kind: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 updates, hostile rows last, and the honest rows among them."""
    rng = np.random.default_rng(seed)
    honest = rng.standard_normal((n - hostile, d)) + 3 * rng.standard_normal(d)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)
    rows = {
        "huge": 1e30 * rng.standard_normal((hostile, d)),
        "one far point": np.tile(1e15 * direction, (hostile, 1)),
        "aligned": direction * 10.0 ** rng.uniform(0, 30, (hostile, 1)),
        "opposed": -100 * honest.mean(axis=0) + rng.standard_normal((hostile, d)),
        "near": honest.mean(axis=0) + 10 * direction + np.zeros((hostile, d)),
        "mixed": rng.standard_normal((hostile, d)) * 10.0 ** rng.uniform(-30, 30, (hostile, 1)),
    }[kind]
    updates = torch.from_numpy(np.concatenate((honest, rows))).float()
    return updates, updates[: n - hostile]


HOSTILE = ("huge", "one far point", "aligned", "opposed", "near", "mixed")


# --- The oracle itself --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 64, 99, 100, 101, 130])
@pytest.mark.parametrize("d", [1, 511, 1025, 70_000])
def test_all_inner_products(n: int, d: int) -> None:
    """Strips of rows and pieces of columns, those left over included."""
    rows = np.random.default_rng(n).standard_normal((n, d))
    rows[n // 2] = rows[0]
    gram = gram_matrix(torch.from_numpy(rows))
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_array_equal(gram, gram.T)
    assert (abs(gram - rows @ rows.T) <= 1e-13 * np.outer(lengths, lengths)).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 0], [4, 0], [0, 3], [4, 3]], 10.0),  # the crossing of the diagonals: 2 * 5
        ([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]], math.sqrt(3)),  # three medians of 2/3 height
        ([[0, 0], [1, 0], [-0.9, 0.1]], 1 + math.hypot(0.9, 0.1)),  # an angle above 120 degrees
        ([[0.0], [1.0], [5.0]], 5.0),
        ([[2.0, 1.0]], 0.0),
    ],
)
def test_oracle_on_known_optima(rows: list[list[float]], expected: float) -> None:
    points = np.array(rows, dtype=float)
    point, value = oracles.geometric_median(points)
    assert value == pytest.approx(expected, rel=1e-12)
    assert oracles.summed_distance(point, points) == value


# --- Against the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", CERTIFYING)
@given(update_matrices())
@few_examples
def test_certificate_is_true_and_small(solver: str, updates: torch.Tensor) -> None:
    result = geometric_median(updates, solver=solver)
    assert_certified(updates, result)
    assert_convex_coefficients(updates, result)


@given(update_matrices(max_n=8, max_d=8))
@few_examples
def test_certificate_is_true_for_the_classical_solver(updates: torch.Tensor) -> None:
    result = geometric_median(updates, solver="weiszfeld", max_iter=100)
    assert_certified(updates, result)
    assert_convex_coefficients(updates, result)


@pytest.mark.parametrize("solver", CERTIFYING)
@given(update_matrices(kinds=RESOLVED))
@few_examples
def test_gap_is_within_the_default_tolerance(solver: str, updates: torch.Tensor) -> None:
    assert geometric_median(updates, solver=solver).gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("n", [3, 10, 11, 12])
def test_gap_is_within_the_default_tolerance_for_rows_of_all_sizes(solver: str, n: int) -> None:
    """Norms from 1e-8 to 1e15: the objective cannot tell good points from better ones."""
    for seed in range(30):
        rows = oracles.KINDS["rows_of_all_sizes"](np.random.default_rng(seed), n, 15)
        for updates in (torch.from_numpy(rows), torch.from_numpy(rows).float()):
            result = geometric_median(updates, solver=solver)
            assert_certified(updates, result)
            assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("n", [5, 7, 9, 10, 11])
@pytest.mark.parametrize("seed", range(4))
def test_gap_is_within_the_default_tolerance_for_two_far_clusters(
    solver: str, n: int, seed: int
) -> None:
    """The smallest majority is a million times further from the origin than it is wide."""
    rng = np.random.default_rng(seed)
    few = (n - 1) // 2
    clusters = 1e6 * rng.standard_normal((2, 13))
    rows = rng.standard_normal((n, 13)) + clusters[[0] * few + [1] * (n - few)]
    updates = torch.from_numpy(rows)
    result = geometric_median(updates, solver=solver)
    assert_certified(updates, result)
    assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@given(update_matrices(max_n=8, max_d=8), st.integers(0, 2**32 - 1))
@few_examples
def test_certificate_with_weights(solver: str, updates: torch.Tensor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = 10.0 ** rng.uniform(-3, 3, len(updates)) * (rng.random(len(updates)) < 0.8)
    weights[rng.integers(len(weights))] = 1.0
    result = geometric_median(updates, weights=torch.from_numpy(weights), solver=solver)
    assert_certified(updates, result, weights)
    assert_convex_coefficients(updates, result)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_certificate_under_attack(solver: str, kind: str) -> None:
    """49 % of the rows are hostile: 24 of 49."""
    updates, _ = honest_and_hostile(49, 7, 24, kind)
    result = geometric_median(
        updates, solver=solver, max_iter=50 if solver == "weiszfeld" else 1000
    )
    assert_certified(updates, result)
    if solver in CERTIFYING:
        assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 11])
def test_rows_of_norm_1e30_beside_rows_of_norm_1e_minus_8(solver: str, n: int) -> None:
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    few = (n - 1) // 2
    rows[:few] *= 1e30
    rows[few:] *= 1e-8
    updates = torch.from_numpy(rows).float()
    result = geometric_median(updates, solver=solver)
    assert_certified(updates, result)
    assert result.gap <= TOL
    if n > 2:
        assert float(result.vector.norm()) <= 1e-6


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("solver", SOLVERS)
def test_float64_rows_of_any_magnitude(solver: str, scale: float) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((7, 5))
    expected = geometric_median(torch.from_numpy(rows), solver=solver)
    result = geometric_median(torch.from_numpy(rows * scale), solver=solver)
    assert_certified(torch.from_numpy(rows * scale), result)
    assert result.gap <= 2e-6
    np.testing.assert_allclose(result.vector.numpy() / scale, expected.vector.numpy(), rtol=1e-5)
    assert result.objective / scale == pytest.approx(expected.objective, rel=1e-6)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_float64_rows_at_both_ends_of_the_range(solver: str) -> None:
    """One row of 1e300 must not make the others, honest and hostile, look alike."""
    rng = np.random.default_rng(2)
    for largest in (1e160, 1e200, 1e300):
        rows = rng.standard_normal((9, 4))
        rows[:3] *= 1e30
        rows[3] *= largest
        updates = torch.from_numpy(rows)
        result = geometric_median(updates, solver=solver)
        assert result.gap <= TOL
        assert_certified(updates, result)
        assert_convex_coefficients(updates, result)
        bound = 2 * 5 / (9 - 2 * 4) * oracles.distances(rows[4:].mean(axis=0), rows[4:]).max()
        assert oracles.distances(rows[4:].mean(axis=0), result.vector.numpy()[None]) <= bound


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(solver: str, dtype: torch.dtype) -> None:
    rows = np.random.default_rng(3).standard_normal((6, 30))
    updates = torch.from_numpy(rows).to(dtype)
    result = geometric_median(updates, solver=solver)
    assert result.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.vector.shape == (30,)
    assert_certified(updates, result)
    assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
def test_more_columns_than_one_block(solver: str) -> None:
    """The columns repeat, so the answer is known."""
    rows = torch.from_numpy(np.random.default_rng(4).standard_normal((5, 7))).float()
    repeats = 60_001
    result = geometric_median(rows.repeat(1, repeats), solver=solver)
    expected = geometric_median(rows, solver=solver)
    assert result.objective == pytest.approx(math.sqrt(repeats) * expected.objective, rel=1e-6)
    torch.testing.assert_close(
        result.vector.view(repeats, 7), expected.vector.expand(repeats, 7), rtol=1e-5, atol=1e-6
    )


# --- Values derived by hand ---------------------------------------------------------------------


def test_one_row_is_its_own_median_to_the_bit() -> None:
    row = torch.tensor([[0.1, -2.5e30, 3e-30]])
    for solver in SOLVERS:
        result = geometric_median(row, solver=solver)
        assert torch.equal(result.vector, row[0])
        assert (result.gap, result.objective) == (0.0, 0.0)
        assert result.weights is not None
        assert result.weights.tolist() == [1.0]


def test_equal_rows_are_their_own_median_to_the_bit() -> None:
    rows = torch.tensor([[0.1, 0.7, -1.3]]).repeat(7, 1)
    for solver in SOLVERS:
        result = geometric_median(rows, solver=solver)
        assert torch.equal(result.vector, rows[0])
        assert result.gap == 0.0


@pytest.mark.parametrize("solver", CERTIFYING)
def test_two_rows(solver: str) -> None:
    """Every point between them is a median; the sum of distances is their distance."""
    result = geometric_median(torch.tensor([[0.0, 0.0], [6.0, 8.0]]), solver=solver)
    assert result.objective == pytest.approx(10)
    assert result.gap <= TOL


def test_equilateral_triangle() -> None:
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    for solver in SOLVERS:
        result = geometric_median(triangle, solver=solver)
        torch.testing.assert_close(result.vector, triangle.mean(0), rtol=0, atol=1e-6)
        assert result.objective == pytest.approx(math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_triangle_with_an_angle_above_120_degrees(solver: str) -> None:
    """The median is the vertex of that angle, which is a row, to the bit."""
    triangle = torch.tensor([[0.1, 0.2], [5.1, 0.2], [-4.9, 1.2]])
    result = geometric_median(triangle, solver=solver)
    assert torch.equal(result.vector, triangle[0])
    assert result.gap <= TOL
    assert result.weights is not None
    assert result.weights.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("solver", CERTIFYING)
def test_crossing_of_the_diagonals(solver: str) -> None:
    """Four corners of a convex quadrangle: (0,0)-(4,4) and (1,3)-(3,-1) cross at (5/3, 5/3)."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 3.0], [4.0, 4.0], [3.0, -1.0]], dtype=torch.float64)
    result = geometric_median(corners, solver=solver)
    torch.testing.assert_close(
        result.vector, torch.full((2,), 5 / 3, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert result.objective == pytest.approx(math.hypot(4, 4) + math.hypot(2, 4), rel=1e-6)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_odd_number_of_collinear_rows(solver: str) -> None:
    positions = torch.tensor([[-3.0], [0.5], [1.0], [7.0], [1e6]])
    direction = torch.tensor([[3.0, -4.0]])
    result = geometric_median(positions * direction, solver=solver)
    assert torch.equal(result.vector, direction[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_mean_that_is_a_row_but_not_the_median(solver: str) -> None:
    """The iteration starts on (or near) a row that it must leave: the median is -1 along a line."""
    positions = torch.tensor([[0.0], [-1.0], [-1.0], [-1.0], [3.0]], dtype=torch.float64)
    for direction in ([1.0], [0.6, 0.8]):
        updates = positions * torch.tensor([direction], dtype=torch.float64)
        for max_iter in (1, 10, 100):
            result = geometric_median(updates, solver=solver, max_iter=max_iter)
            assert_certified(updates, result)
        assert result.objective == pytest.approx(5.0, rel=1e-3)


def test_more_than_half_of_the_weight_on_one_row() -> None:
    rows = torch.tensor([[1.0, 2.0], [5.0, -1.0], [-7.0, 3.0], [9.0, 9.0]])
    weights = torch.tensor([3.5, 1.0, 1.0, 1.0])
    for solver in SOLVERS:
        result = geometric_median(rows, weights=weights, solver=solver, tol=1e-4)
        torch.testing.assert_close(result.vector, rows[0], rtol=0, atol=1e-2)
    assert torch.equal(geometric_median(rows, weights=weights).vector, rows[0])


# --- Properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", CERTIFYING)
@given(st.integers(3, 12), st.integers(2, 20), st.integers(0, 2**32 - 1))
@few_examples
def test_symmetries(solver: str, n: int, d: int, seed: int) -> None:
    """Permutation, translation, scale, rotation, and weights that repeat rows."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((n, d)))
    vector = geometric_median(rows, tol=1e-9, solver=solver).vector

    def check(updates: torch.Tensor, expected: torch.Tensor) -> None:
        found = geometric_median(updates, tol=1e-9, solver=solver).vector
        size = float(updates.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * size)

    check(rows[torch.from_numpy(rng.permutation(n))], vector)
    offset = 10 * torch.from_numpy(rng.standard_normal(d))
    check(rows + offset, vector + offset)
    check(-1e-7 * rows, -1e-7 * vector)
    turn = oracles.rotation(d, seed)
    check(rows @ turn, vector @ turn)

    counts = torch.from_numpy(rng.integers(1, 4, n))
    repeated = geometric_median(rows.repeat_interleave(counts, 0), tol=1e-9, solver=solver)
    weighted = geometric_median(rows, weights=counts, tol=1e-9, solver=solver)
    torch.testing.assert_close(weighted.vector, repeated.vector, rtol=0, atol=1e-5)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_rows_of_weight_zero_do_not_count(solver: str) -> None:
    rows = torch.from_numpy(np.random.default_rng(5).standard_normal((6, 4)))
    rows[3:] *= 1e12
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    result = geometric_median(rows, weights=weights, solver=solver)
    alone = geometric_median(rows[:3], weights=weights[:3], solver=solver)
    torch.testing.assert_close(result.vector, alone.vector, rtol=0, atol=1e-5)
    assert result.weights is not None
    assert result.weights[3:].tolist() == [0.0, 0.0, 0.0]
    assert result.gap <= TOL


def test_many_equal_rows_of_little_weight() -> None:
    """More than half of the rows, not of the weight, are at one point that is not the median."""
    angles = torch.tensor([0.5, 0.5 + 2 / 3, 0.5 + 4 / 3], dtype=torch.float64) * math.pi
    heavy = torch.stack((angles.cos(), angles.sin()), dim=1)
    light = torch.tensor([[0.1, 0.0]], dtype=torch.float64).repeat(9, 1)
    weights = torch.tensor([1.0] * 3 + [0.01] * 9)
    for solver in SOLVERS:
        updates = torch.cat((heavy, light))
        result = geometric_median(updates, weights=weights, solver=solver)
        assert_certified(updates, result, weights.numpy().astype(float))
        assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
def test_far_rows_of_little_weight_do_not_cost_digits(solver: str) -> None:
    """Most of the weight is a million times further from the origin than it is wide."""
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((11, 4)) + 1e6
    rows[3:] += 1e9 * rng.standard_normal((8, 4))
    weights = torch.tensor([1.0] * 3 + [0.01] * 8)
    result = geometric_median(torch.from_numpy(rows), weights=weights, solver=solver)
    assert_certified(torch.from_numpy(rows), result, weights.numpy().astype(float))
    assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
def test_scaling_all_weights_changes_the_objective_only(solver: str) -> None:
    rows = torch.from_numpy(np.random.default_rng(6).standard_normal((6, 4)))
    weights = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 2.0])
    one, many = (geometric_median(rows, weights=c * weights, solver=solver) for c in (1, 1000))
    torch.testing.assert_close(one.vector, many.vector, rtol=0, atol=1e-6)
    assert many.objective == pytest.approx(1000 * one.objective, rel=1e-9)


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("n", [3, 4, 10, 11, 25])
def test_a_minority_cannot_move_it_beyond_the_honest_rows(solver: str, n: int, kind: str) -> None:
    """||GM - m|| <= 2 (1 - f') / (1 - 2 f') * max_i ||x_i - m|| for any m (Lopuhaa, Rousseeuw)."""
    hostile = (n - 1) // 2
    for seed in range(3):
        updates, honest = honest_and_hostile(n, 6, hostile, kind, seed)
        middle = numpy64(honest).mean(axis=0)
        largest = oracles.distances(middle, numpy64(honest)).max()
        fraction = hostile / n
        moved = oracles.norm(numpy64(geometric_median(updates, solver=solver).vector) - middle)
        assert moved <= 2 * (1 - fraction) / (1 - 2 * fraction) * largest * (1 + 1e-5)


@st.composite
def attacks(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Draw float64 updates that fit float32, the largest minority of them hostile, and f.

    The honest rows' spread, their distance from the origin and the attack's size are unrelated.
    """
    n = draw(st.integers(3, 45))
    d = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(("scattered", "one point", "line", "flipped", "tight", "near")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, far, size = 10.0 ** rng.uniform([-6, -3, 0], [3, 4, 30])
    f = (n - 1) // 2
    honest = spread * rng.standard_normal((n - f, d)) + far * rng.standard_normal(d)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)
    if kind == "scattered":
        hostile = size * rng.standard_normal((f, d))
    elif kind == "one point":
        hostile = np.tile(size * direction, (f, 1))
    elif kind == "line":
        hostile = direction * 10.0 ** rng.uniform(-8, 30, (f, 1))
    elif kind == "flipped":
        hostile = -size * honest[:f]
    elif kind == "tight":
        hostile = size * direction + spread * rng.standard_normal((f, d))
    else:
        hostile = honest.mean(axis=0) + 10 * spread * direction + np.zeros((f, d))
    return torch.from_numpy(np.clip(np.concatenate((honest, hostile)), -1e38, 1e38)), f


@pytest.mark.parametrize("solver", CERTIFYING)
@given(attacks())
@settings(few_examples, max_examples=150)
def test_no_minority_breaks_it_whatever_the_scales(
    solver: str, attack: tuple[torch.Tensor, int]
) -> None:
    updates, f = attack
    n = len(updates)
    honest = updates[: n - f].numpy()
    middle = honest.mean(axis=0)
    bound = 2 * (n - f) / (n - 2 * f) * oracles.distances(middle, honest).max()
    result = geometric_median(updates, solver=solver)
    rounding = 1e-12 * oracles.norm(middle)
    assert oracles.norm(result.vector.numpy() - middle) <= bound * (1 + 1e-5) + rounding
    assert result.gap <= TOL
    single = geometric_median(updates.float(), solver=solver)
    moved = oracles.norm(numpy64(single.vector) - middle)
    assert moved <= bound * (1 + 1e-5) + 1e-6 * n * oracles.norm(middle)


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("seed", range(12))
def test_gap_is_within_the_default_tolerance_when_hostile_rows_are_equal(
    solver: str, seed: int
) -> None:
    """The median is then often at the point that they share, away from the origin."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 42))
    hostile = (n - 1) // 2
    honest = rng.standard_normal((n - hostile, 30)) + 8 * rng.standard_normal(30)
    direction = rng.standard_normal(30)
    direction /= np.linalg.norm(direction)
    point = honest.mean(axis=0) + 10 ** rng.uniform(0, 3) * direction
    updates = torch.from_numpy(np.concatenate((honest, np.tile(point, (hostile, 1)))))
    assert geometric_median(updates, solver=solver).gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("seed", [*range(20), 129, 638, 1367])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_majority_on_a_line(solver: str, seed: int, dtype: torch.dtype) -> None:
    """In one dimension the optimum is known, and it is the honest row nearest to the others.

    Along a line the objective has no curvature between the two clusters, so Newton's steps lead
    anywhere and the pull is the same everywhere.
    """
    rng = np.random.default_rng(seed)
    n = 2 * int(rng.integers(1, 22)) + 1
    hostile = (n - 1) // 2
    d = int(rng.integers(1, 3))
    spread = 10.0 ** rng.uniform(-4, 1)
    far = spread * 10.0 ** rng.uniform(0, 8)
    offset = spread * 10.0 ** rng.uniform(-1, 6)
    rows = spread * rng.standard_normal((n - hostile, d))
    others = np.tile(far, (hostile, d)) + spread * rng.standard_normal((hostile, d))
    updates = torch.from_numpy(np.concatenate((rows, others)) + offset).to(dtype)
    result = geometric_median(updates, solver=solver)
    assert_certified(updates, result)
    assert_convex_coefficients(updates, result)
    honest = numpy64(updates)[: n - hostile]
    middle = honest.mean(axis=0)
    bound = 2 * (n - hostile) / (n - 2 * hostile) * oracles.distances(middle, honest).max()
    rounding = n * torch.finfo(dtype).eps * oracles.norm(middle)
    assert oracles.norm(numpy64(result.vector) - middle) <= bound * (1 + 1e-5) + rounding
    if dtype == torch.float64:
        assert result.gap <= TOL


@pytest.mark.parametrize("solver", CERTIFYING)
@pytest.mark.parametrize("n", [3, 4, 10, 11])
def test_a_majority_moves_it_anywhere(solver: str, n: int) -> None:
    hostile = n - (n - 1) // 2
    moved = []
    for far in (1e3, 1e6, 1e9):
        updates, _ = honest_and_hostile(n, 6, hostile, "near")
        updates[n - hostile :] = far
        moved.append(float(geometric_median(updates, solver=solver).vector.abs().max()))
    assert moved[0] > 100
    assert moved[1] > 100 * moved[0]
    assert moved[2] > 100 * moved[1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_iteration_returns_a_finite_point_with_its_true_gap(solver: str) -> None:
    for kind in HOSTILE:
        updates, _ = honest_and_hostile(11, 5, 5, kind)
        result = geometric_median(updates, solver=solver, max_iter=1)
        assert result.iterations <= 1
        assert_certified(updates, result)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_a_tolerance_out_of_reach_returns_the_best_point_found(solver: str) -> None:
    updates, _ = honest_and_hostile(11, 5, 5, "opposed")
    result = geometric_median(updates, tol=1e-15, solver=solver)
    assert result.gap < TOL
    assert result.iterations < 1000
    assert_certified(updates, result)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_looser_tolerance_takes_no_more_iterations(solver: str) -> None:
    updates, _ = honest_and_hostile(21, 5, 4, "opposed")
    iterations = [
        geometric_median(updates, tol=tol, solver=solver).iterations for tol in (1e-1, 1e-3, 1e-6)
    ]
    assert iterations == sorted(iterations)


def test_input_is_not_modified_and_need_not_be_contiguous() -> None:
    rows = torch.from_numpy(np.random.default_rng(7).standard_normal((9, 6)))
    wide = torch.zeros(18, 6, dtype=torch.float64)
    wide[::2] = rows
    for solver in SOLVERS:
        before = wide.clone()
        strided = geometric_median(wide[::2], solver=solver)
        assert torch.equal(wide, before)
        assert torch.equal(strided.vector, geometric_median(rows, solver=solver).vector)
        transposed = rows.T.contiguous().T
        assert torch.equal(geometric_median(transposed, solver=solver).vector, strided.vector)


@pytest.mark.parametrize("solver", CERTIFYING)
def test_result_does_not_share_memory_with_the_input(solver: str) -> None:
    row = torch.ones(1, 3)
    result = geometric_median(row, solver=solver)
    row.zero_()
    assert result.vector.tolist() == [1.0, 1.0, 1.0]


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_non_finite_rows_are_named(value: float, solver: str, dtype: torch.dtype) -> None:
    updates = torch.ones(4, 3, dtype=dtype)
    updates[2, 1] = value
    with pytest.raises(ValueError, match="updates: row 2 holds a NaN or an infinity"):
        geometric_median(updates, solver=solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol is 0.0; allowed: above 0"),
        ({"tol": -1.0}, "tol is -1.0; allowed: above 0"),
        ({"tol": math.nan}, "tol is nan; allowed: above 0"),
        ({"max_iter": 0}, "max_iter is 0; allowed: a whole number, 1 or more"),
        ({"solver": "secant"}, "solver is 'secant'; allowed: gram, newton, weiszfeld"),
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\); allowed: \(2,\)"),
        ({"weights": torch.ones(2, 1)}, r"weights has shape \(2, 1\); allowed: \(2,\)"),
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights is \[1.0, -1.0\]; allowed: finite"),
        ({"weights": torch.zeros(2)}, r"weights is \[0.0, 0.0\]; allowed: .* not all 0"),
        ({"weights": torch.tensor([1.0, math.nan])}, r"weights is \[1.0, nan\]; allowed: finite"),
        ({"weights": torch.tensor([1.0, math.inf])}, r"weights is \[1.0, inf\]; allowed: finite"),
        (
            {"weights": torch.tensor([1e308, 1e308], dtype=torch.float64)},
            r"weights is \[1e\+308, 1e\+308\]; .* a sum below 1e154",
        ),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometric_median(torch.ones(2, 3), **options)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 2, 2), ()])
def test_refused_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"updates has shape .*; allowed: "):
        geometric_median(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_refused_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"updates has dtype {dtype}; allowed: torch.float16"):
        geometric_median(torch.ones(2, 3).to(dtype))


def test_refused_types() -> None:
    with pytest.raises(TypeError, match=r"updates must be a torch\.Tensor, not ndarray"):
        geometric_median(np.ones((2, 3)))  # type: ignore[arg-type]
