"""Krum and Multi-Krum, and centered clipping."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import centered_clipping, krum, multi_krum

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.4, 0.49)


# --- Krum and Multi-Krum ------------------------------------------------------------------------


def assert_best_scores(updates: torch.Tensor, kept: torch.Tensor, byzantine: int) -> None:
    """No row that was left out has a better score than one that was kept."""
    scores = oracles.krum_scores(numpy64(updates), byzantine)
    mask = kept.numpy()
    if not mask.all():
        assert scores[mask].max() <= scores[~mask].min() * (1 + 1e-9)


@given(update_matrices(min_n=2), st.sampled_from(FRACTIONS), st.data())
@few_examples
def test_krum_against_brute_force(
    updates: torch.Tensor, byzantine_fraction: float, data: st.DataObject
) -> None:
    n = len(updates)
    byzantine = math.floor(byzantine_fraction * n + 1e-9)
    one = krum(updates, byzantine_fraction=byzantine_fraction)
    assert int(one.kept.sum()) == 1
    assert_best_scores(updates, one.kept, byzantine)
    row = updates[int(one.kept.nonzero())]
    assert torch.equal(one.vector, row)

    num_selected = data.draw(st.integers(1, n))
    many = multi_krum(updates, byzantine_fraction=byzantine_fraction, num_selected=num_selected)
    assert int(many.kept.sum()) == num_selected
    assert_best_scores(updates, many.kept, byzantine)
    chosen = numpy64(updates)[many.kept.numpy()]
    error = np.abs(numpy64(many.vector) - chosen.mean(axis=0))
    assert (error <= 1e-6 * np.abs(chosen).max(axis=0)).all()
    assert many.weights is not None
    assert many.weights.tolist() == pytest.approx((many.kept / num_selected).tolist())


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_krum_of_float32_rows_far_from_the_origin(offset: float) -> None:
    """Flower's float32 ||x||^2 + ||y||^2 - 2 <x, y> picks at random here."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.linspace(0.5, 2, 12))[:, None]
    updates = torch.from_numpy(offset + sizes * rng.standard_normal((12, 500))).float()
    result = krum(updates, byzantine_fraction=0.25)
    assert int(result.kept.nonzero()) == oracles.krum_scores(numpy64(updates), 3).argmin()
    many = multi_krum(updates, byzantine_fraction=0.25)
    best = np.sort(np.argsort(oracles.krum_scores(numpy64(updates), 3))[:9])
    assert many.kept.nonzero().flatten().tolist() == best.tolist()


def test_krum_by_hand() -> None:
    """With n = 5 and f = 1 two neighbors count: 1 + 9, 1 + 4, 2.25 + 4, 2.25 + 12.25, ..."""
    updates = torch.tensor([[0.0], [1.0], [3.0], [4.5], [100.0]])
    result = krum(updates, byzantine_fraction=0.2)
    assert result.kept.tolist() == [False, True, False, False, False]
    assert result.vector.tolist() == [1.0]
    two = multi_krum(updates, byzantine_fraction=0.2, num_selected=2)
    assert two.kept.tolist() == [False, True, True, False, False]
    assert two.vector.tolist() == [2.0]
    default = multi_krum(updates, byzantine_fraction=0.2)
    assert default.kept.tolist() == [True, True, True, True, False]
    assert default.vector.tolist() == pytest.approx([8.5 / 4])


def test_krum_of_few_rows() -> None:
    assert krum(torch.tensor([[7.0, 8.0]])).vector.tolist() == [7.0, 8.0]
    assert krum(torch.tensor([[7.0], [9.0]])).vector.tolist() == [7.0]
    assert krum(torch.tensor([[0.0], [5.0], [6.0]])).vector.tolist() == [5.0]
    assert multi_krum(torch.tensor([[7.0], [9.0]])).vector.tolist() == [8.0]


def test_equal_rows() -> None:
    updates = torch.full((6, 3), 0.1)
    assert torch.equal(krum(updates).vector, updates[0])
    torch.testing.assert_close(multi_krum(updates).vector, updates[0])


@given(st.integers(5, 12), st.integers(1, 20), st.integers(0, 2**32 - 1))
@few_examples
def test_krum_symmetries(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Rows of growing size: no two scores are equal.
    rows = torch.from_numpy(rng.standard_normal((n, d)) * 1.5 ** np.arange(n)[:, None])
    for rule in (krum, multi_krum):
        vector = rule(rows).vector
        order = torch.from_numpy(rng.permutation(n))
        torch.testing.assert_close(rule(rows[order]).vector, vector)
        offset = 100 * torch.from_numpy(rng.standard_normal(d))
        moved = rule(rows + offset).vector
        torch.testing.assert_close(moved, vector + offset, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(rule(-1e20 * rows).vector, -1e20 * vector)
        turn = oracles.rotation(d, seed)
        torch.testing.assert_close(rule(rows @ turn).vector, vector @ turn)


@pytest.mark.parametrize("kind", ["huge", "one point", "mixed", "aligned"])
@pytest.mark.parametrize("n", [5, 7, 10, 15])
def test_krum_never_picks_a_far_row(n: int, kind: str) -> None:
    """For n > 2 f + 2 (Blanchard et al., Proposition 4.2)."""
    hostile = (n - 3) // 2
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 9))
    rows[:hostile] = {
        "huge": 1e30 * rng.standard_normal((hostile, 9)),
        "one point": np.full((hostile, 9), 1e6),
        "mixed": 10.0 ** rng.uniform(2, 30, (hostile, 1)) * rng.standard_normal((hostile, 9)),
        "aligned": 1e3 * np.arange(1, hostile + 1)[:, None] * np.ones(9),
    }[kind]
    updates = torch.from_numpy(rows).float()
    assert not krum(updates, byzantine_fraction=hostile / n).kept[:hostile].any()
    assert not multi_krum(updates, byzantine_fraction=hostile / n).kept[:hostile].any()


def test_a_majority_breaks_krum() -> None:
    updates = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 4))).float()
    updates[4:] = 1e6
    assert (krum(updates, byzantine_fraction=0.3).vector == 1e6).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_krum_of_float64_rows_of_any_magnitude(scale: float) -> None:
    rows = np.random.default_rng(2).standard_normal((9, 5))
    expected = multi_krum(torch.from_numpy(rows), num_selected=4)
    result = multi_krum(torch.from_numpy(rows * scale), num_selected=4)
    assert torch.equal(result.kept, expected.kept)
    np.testing.assert_allclose(numpy64(result.vector) / scale, numpy64(expected.vector), rtol=1e-9)


def test_krum_of_float64_rows_at_both_ends_of_the_range() -> None:
    rows = np.random.default_rng(3).standard_normal((9, 5))
    rows[:2] *= 1e30
    rows[2] *= 1e300
    result = multi_krum(torch.from_numpy(rows), byzantine_fraction=0.34)
    assert result.kept.tolist() == [False] * 3 + [True] * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    updates = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 30))).to(dtype)
    before = updates.clone()
    for rule in (krum, multi_krum, centered_clipping):
        result = rule(updates)
        assert result.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(updates, before)
    assert_best_scores(updates, krum(updates).kept, 2)


@pytest.mark.parametrize("num_selected", [0, -1])
def test_refused_numbers_of_rows(num_selected: int) -> None:
    match = f"num_selected is {num_selected}; allowed: a whole number, 1 or more"
    with pytest.raises(ValueError, match=match):
        multi_krum(torch.ones(5, 2), num_selected=num_selected)


def test_of_fewer_rows_than_are_to_be_selected_all_are() -> None:
    assert multi_krum(torch.arange(10.0).view(5, 2), num_selected=6).kept.all()


@pytest.mark.parametrize("byzantine_fraction", [-0.1, 0.5, 1.0, math.nan])
def test_refused_fractions(byzantine_fraction: float) -> None:
    match = f"byzantine_fraction is {byzantine_fraction}; allowed: 0 to below 0.5"
    for rule in (krum, multi_krum):
        with pytest.raises(ValueError, match=match):
            rule(torch.ones(5, 2), byzantine_fraction=byzantine_fraction)


# --- Centered clipping --------------------------------------------------------------------------


@given(
    update_matrices(),
    st.sampled_from((None, 1e-3, 1.0, 1e6)),
    st.sampled_from(("origin", "near", "row")),
    st.integers(1, 5),
)
@few_examples
def test_clipping_against_a_loop(
    updates: torch.Tensor, radius: float | None, start: str, iterations: int
) -> None:
    rows = numpy64(updates)
    center = {
        "origin": None,
        "near": torch.linspace(-1, 1, updates.shape[1], dtype=updates.dtype),
        "row": updates[-1].clone(),
    }[start]
    result = centered_clipping(updates, radius=radius, center=center, iterations=iterations)
    middle = None if center is None else numpy64(center)
    expected = oracles.centered_clipping(rows, radius, middle, iterations)
    size = np.abs(rows).max() + (0 if middle is None else np.abs(middle).max())
    assert oracles.norm(numpy64(result.vector) - expected) <= 1e-6 * size
    assert result.weights is not None
    origin = np.zeros(rows.shape[1]) if middle is None else middle
    formed = origin + result.weights.numpy() @ (rows - origin)
    assert oracles.norm(numpy64(result.vector) - formed) <= 1e-6 * size


@pytest.mark.parametrize("offset", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("with_center", [False, True])
def test_clipping_of_rows_far_from_the_origin(offset: float, with_center: bool) -> None:
    """The steps after the first are as small as the spread; they must not be lost."""
    rng = np.random.default_rng(0)
    rows = offset + rng.standard_normal((10, 20)) * rng.uniform(0.1, 5, (10, 1))
    center = rng.standard_normal(20) if with_center else None
    for iterations in (1, 2, 3, 10):
        result = centered_clipping(
            torch.from_numpy(rows),
            center=None if center is None else torch.from_numpy(center),
            iterations=iterations,
        )
        expected = oracles.centered_clipping(rows, None, center, iterations)
        error = oracles.norm(numpy64(result.vector) - expected)
        assert error <= 1e-4 + 1e-12 * offset


def test_clipping_by_hand() -> None:
    """From 0 with radius 1: clip(3) + clip(-0.5) + clip(10) = 1.5, over 3."""
    updates = torch.tensor([[3.0], [-0.5], [10.0]])
    one = centered_clipping(updates, radius=1.0, iterations=1)
    assert one.vector.tolist() == pytest.approx([0.5])
    # Then clip(2.5) + clip(-1) + clip(9.5) = 1 around 0.5.
    two = centered_clipping(updates, radius=1.0, iterations=2)
    assert two.vector.tolist() == pytest.approx([0.5 + 1 / 3])
    # From 2: clip(1) + clip(-2.5) + clip(8) = 1.
    centered = centered_clipping(updates, radius=1.0, iterations=1, center=torch.tensor([2.0]))
    assert centered.vector.tolist() == pytest.approx([2 + 1 / 3])
    # By default the radius is the median distance: 3 from 0, so 3 - 0.5 + 3.
    default = centered_clipping(updates, iterations=1)
    assert default.vector.tolist() == pytest.approx([5.5 / 3])
    # A radius beyond all rows gives the mean at once.
    far = centered_clipping(updates, radius=1e9, iterations=1)
    assert far.vector.tolist() == pytest.approx([12.5 / 3])


def test_clipping_at_the_rows() -> None:
    updates = torch.full((4, 3), 0.3)
    assert torch.equal(centered_clipping(updates, center=updates[0]).vector, updates[0])
    assert not centered_clipping(torch.zeros(4, 3)).vector.any()


@given(st.integers(1, 12), st.integers(1, 9), st.floats(0, 38), st.floats(-3, 3), st.integers(1, 5))
@few_examples
def test_each_step_of_the_clipping_is_at_most_the_radius(
    n: int, d: int, magnitude: float, log_radius: float, iterations: int
) -> None:
    rng = np.random.default_rng(n)
    updates = torch.from_numpy(10.0**magnitude * rng.uniform(-1, 1, (n, d))).float()
    radius = 10.0**log_radius
    result = centered_clipping(updates, radius=radius, iterations=iterations)
    assert float(result.vector.double().norm()) <= iterations * radius * (1 + 1e-5)


@pytest.mark.parametrize("size", [1e3, 1e15, 1e30])
def test_breakdown_of_the_clipping(size: float) -> None:
    """With the default radius: from the origin in 3 steps at most 3 median distances."""
    rng = np.random.default_rng(5)
    updates = torch.from_numpy(rng.standard_normal((11, 6))).float()
    updates[:5] = size
    honest = oracles.distances(np.zeros(6), numpy64(updates[5:])).max()
    # Each step is shorter than the honest rows' largest distance to where it starts.
    assert float(centered_clipping(updates).vector.norm()) <= (1 + 2 + 4) * honest
    updates[5] = size
    assert float(centered_clipping(updates).vector.norm()) > size / 10


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_clipping_of_float64_rows_of_any_magnitude(scale: float) -> None:
    rng = np.random.default_rng(6)
    rows, center = rng.standard_normal((9, 5)), rng.standard_normal(5)
    for radius in (None, 0.5):
        expected = oracles.centered_clipping(rows, radius, center, 3)
        result = centered_clipping(
            torch.from_numpy(rows * scale),
            radius=None if radius is None else radius * scale,
            center=torch.from_numpy(center * scale),
        )
        np.testing.assert_allclose(numpy64(result.vector) / scale, expected, rtol=1e-9)


def test_clipping_of_float64_rows_at_both_ends_of_the_range() -> None:
    rows = np.random.default_rng(7).standard_normal((9, 5))
    rows[:3] *= 1e30
    rows[3] *= 1e300
    result = centered_clipping(torch.from_numpy(rows))
    expected = oracles.centered_clipping(rows, None, None, 3)
    np.testing.assert_allclose(numpy64(result.vector), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0; allowed: above 0"),
        ({"radius": -1.0}, "radius is -1.0; allowed: above 0"),
        ({"radius": math.nan}, "radius is nan; allowed: above 0"),
        ({"iterations": 0}, "iterations is 0; allowed: a whole number, 1 or more"),
        ({"center": torch.zeros(2)}, r"center has shape \(2,\); allowed: \(3,\)"),
        ({"center": torch.zeros(1, 3)}, r"center has shape \(1, 3\); allowed: \(3,\)"),
        ({"center": torch.tensor([0.0, math.nan, 0.0])}, "center holds a NaN or an infinity"),
        ({"center": torch.tensor([0.0, math.inf, 0.0])}, "center holds a NaN or an infinity"),
    ],
)
def test_refused_clipping_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        centered_clipping(torch.ones(4, 3), **options)
