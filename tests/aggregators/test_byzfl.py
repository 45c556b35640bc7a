"""ByzFL's rules on the same rows, as an independent reference, with its known errors named.

``pip install byzfl`` for these; without it they are skipped, and say so.
"""

import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fl_bgmd.aggregators import (
    bucketing,
    build_rule,
    centered_clipping,
    coordinate_median,
    covariance_agnostic_filter,
    geometric_median,
    krum,
    mean,
    mean_around_median,
    minimum_diameter_averaging,
    multi_krum,
    nearest_neighbor_averaging,
    nearest_neighbor_mixing,
    smallest_eigenvalue_averaging,
    trimmed_mean,
)
from fl_bgmd.aggregators.mixing import adaptive_clipping, clipping

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("byzfl") is None,
    reason="byzfl is not installed: pip install byzfl to compare with its rules",
)

SHAPES = [(5, 1), (7, 2), (10, 2), (11, 4), (12, 3)]
Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def byzfl() -> Any:
    return importlib.import_module("byzfl")


def attacked(n: int, hostile: int, d: int = 40) -> Array:
    """Return rows of which the first few are longer, and shifted together."""
    rows = np.random.default_rng(n).standard_normal((n, d))
    rows[:hostile] = 3.0 * rows[:hostile] + 1.0
    return rows


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("Meamed", mean_around_median),
        ("MDA", minimum_diameter_averaging),
        ("NNM", nearest_neighbor_mixing),
    ],
)
def test_the_same_result(byzfl: Any, name: str, rule: Any, n: int, hostile: int) -> None:
    rows = attacked(n, hostile)
    found = rule(torch.from_numpy(rows), byzantine_fraction=hostile / n)
    vector = getattr(found, "vector", found).numpy()
    np.testing.assert_allclose(vector, getattr(byzfl, name)(hostile)(rows), atol=1e-6)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
def test_the_same_trimmed_mean(byzfl: Any, n: int, hostile: int) -> None:
    rows = attacked(n, hostile)
    found = trimmed_mean(torch.from_numpy(rows), trim_fraction=hostile / n).vector.numpy()
    np.testing.assert_allclose(found, byzfl.TrMean(hostile)(rows), atol=1e-9)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
@pytest.mark.parametrize(("name", "rule"), [("Average", mean), ("Median", coordinate_median)])
def test_the_same_mean_and_median(byzfl: Any, name: str, rule: Any, n: int, hostile: int) -> None:
    rows = attacked(n, hostile)
    found = rule(torch.from_numpy(rows)).vector.numpy()
    np.testing.assert_allclose(found, getattr(byzfl, name)()(rows), atol=1e-9)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
def test_its_geometric_median_arrives_where_it_takes_enough_steps(
    byzfl: Any, n: int, hostile: int
) -> None:
    rows = attacked(n, hostile)
    found = geometric_median(torch.from_numpy(rows), tol=1e-9).vector.numpy()
    np.testing.assert_allclose(found, byzfl.GeometricMedian(T=1000)(rows), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("n", "hostile"), SHAPES)
def test_the_same_centered_clipping_and_the_same_a_round_later(
    byzfl: Any, n: int, hostile: int, steps: int
) -> None:
    """It keeps the aggregate, which is where the next round starts."""
    theirs = byzfl.CenteredClipping(L=steps, tau=2.0)
    center = None
    for number in range(2):
        rows = attacked(n, hostile) + number
        found = centered_clipping(
            torch.from_numpy(rows), center=center, radius=2.0, iterations=steps
        )
        center = found.vector
        np.testing.assert_allclose(center.numpy(), theirs(rows), atol=1e-9)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
def test_the_same_krum_where_it_is_told_one_hostile_row_more(
    byzfl: Any, n: int, hostile: int
) -> None:
    """It counts a neighbor more (below); else Krum and Multi-Krum, of ``n - f`` rows, agree."""
    rows = attacked(n, hostile)
    updates, share = torch.from_numpy(rows), (hostile - 1) / n
    one = krum(updates, byzantine_fraction=share).vector.numpy()
    np.testing.assert_allclose(one, byzfl.Krum(hostile)(rows), atol=1e-9)
    many = multi_krum(updates, byzantine_fraction=share, num_selected=n - hostile).vector.numpy()
    np.testing.assert_allclose(many, byzfl.MultiKrum(hostile)(rows), atol=1e-9)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
@pytest.mark.parametrize("pivot", [0, 3])
def test_monna_with_the_pivot_for_the_root(byzfl: Any, n: int, hostile: int, pivot: int) -> None:
    """Its default pivot is the first client, whoever that is: the first is hostile here."""
    rows = attacked(n, hostile)
    updates = torch.from_numpy(rows)
    found = nearest_neighbor_averaging(updates, updates[pivot], byzantine_fraction=hostile / n)
    np.testing.assert_allclose(found.vector.numpy(), byzfl.MoNNA(hostile, pivot)(rows), atol=1e-9)


@pytest.mark.parametrize(("n", "hostile"), SHAPES)
def test_adaptive_clipping(byzfl: Any, n: int, hostile: int) -> None:
    rows = attacked(n, hostile)
    updates = torch.from_numpy(rows.copy())
    found = adaptive_clipping(updates, byzantine_fraction=hostile / n).apply(updates).numpy()
    np.testing.assert_allclose(found, byzfl.ARC(hostile)(rows.copy()), atol=1e-9)


def test_clipping_and_buckets_of_one(byzfl: Any) -> None:
    rows = attacked(9, 2)
    updates = torch.from_numpy(rows.copy())
    found = clipping(updates, radius=2.0).apply(updates).numpy()
    np.testing.assert_allclose(found, byzfl.Clipping(2.0)(rows.copy()), atol=1e-9)
    ours, theirs = bucketing(updates, bucket_size=1).numpy(), byzfl.Bucketing(1)(rows.copy())
    np.testing.assert_allclose(np.sort(ours, axis=0), np.sort(theirs, axis=0))


# --- Its known errors ---------------------------------------------------------------------------


def test_its_krum_counts_one_neighbor_more(byzfl: Any) -> None:
    """``n - f - 1`` where Blanchard et al. have ``n - f - 2``: here that decides."""
    rows = np.array([[0.0], [1.0], [3.0], [4.5], [8.0], [9.0]])
    theirs = byzfl.Krum(2)(rows)
    ours = krum(torch.from_numpy(rows), byzantine_fraction=0.34).vector.numpy()
    # Two neighbors: 1 + 9, 1 + 4, 2.25 + 4, 2.25 + 12.25, 1 + 12.25, 1 + 20.25. Three, and 3
    # has 2.25 + 4 + 9, 1 has 1 + 4 + 12.25.
    assert ours.tolist() == [1.0]
    assert theirs.tolist() == [3.0]
    # Of the four best rows ours has 8, for which three neighbors are one too many: theirs has 4.5.
    many = multi_krum(torch.from_numpy(rows), byzantine_fraction=0.34).vector
    assert many.tolist() == [(0 + 1 + 3 + 8) / 4]
    assert byzfl.MultiKrum(2)(rows).tolist() == [(0 + 1 + 3 + 4.5) / 4]


def test_its_geometric_median_takes_three_steps_from_zero(byzfl: Any) -> None:
    """With four of nine rows far away each step leaves most of the way."""
    rows = attacked(9, 0) + 20.0
    rows[:4] = -1e6
    honest = rows[4:].mean(axis=0)
    theirs = np.linalg.norm(byzfl.GeometricMedian()(rows) - honest)
    ours = np.linalg.norm(geometric_median(torch.from_numpy(rows)).vector.numpy() - honest)
    assert theirs > 5 * ours


def test_its_centered_clipping_takes_no_start(byzfl: Any) -> None:
    """Its check of the type fails for every value: an array cannot be of both libraries."""
    for start in (np.zeros(3), torch.zeros(3)):
        with pytest.raises(TypeError, match="m must be of type"):
            byzfl.CenteredClipping(m=start)
    rows = torch.ones(3, 3)
    assert centered_clipping(rows, center=torch.ones(3)).vector.tolist() == [1.0] * 3


@pytest.mark.parametrize("rule", ["CAF", "SMEA"])
def test_its_top_eigenvectors_are_one_step_of_the_power_method(byzfl: Any, rule: str) -> None:
    """From a random start, and the length after it: another result each time, but for d = 1."""
    own = {"CAF": covariance_agnostic_filter, "SMEA": smallest_eigenvalue_averaging}[rule]
    line = np.random.default_rng(0).standard_normal((9, 1))
    ours = own(torch.from_numpy(line), byzantine_fraction=0.12).vector.numpy()
    np.testing.assert_allclose(getattr(byzfl, rule)(1)(line), ours, atol=1e-6)
    rows = attacked(9, 3)
    np.random.seed(0)
    several = {tuple(np.round(getattr(byzfl, rule)(3)(rows), 9)) for _ in range(5)}
    assert len(several) > 1


def test_its_caf_returns_nothing_without_hostile_rows(byzfl: Any) -> None:
    rows = attacked(6, 1)
    assert byzfl.CAF(0)(rows) is None
    found = covariance_agnostic_filter(torch.from_numpy(rows), byzantine_fraction=0).vector
    np.testing.assert_allclose(found.numpy(), rows.mean(axis=0))


def test_a_row_that_its_caf_has_dropped_still_sets_the_scale(byzfl: Any) -> None:
    """``tau_max`` is over all rows: after 1e30 no weight falls any more, and it never ends."""
    program = (
        "import byzfl, numpy as np; rows = np.random.default_rng(0).standard_normal((9, 5)); "
        "rows[0] = 1e30; print('begun', flush=True); byzfl.CAF(2)(rows)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        # Nine rows like the others take it less than a millisecond.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.kill()
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 5)))
    rows[0] = 1e30
    found = covariance_agnostic_filter(rows, byzantine_fraction=0.23).vector
    assert found.abs().max() < 3


def test_its_clipping_overwrites_what_it_is_given(byzfl: Any) -> None:
    rows = attacked(6, 1)
    given = rows.copy()
    byzfl.Clipping(0.5)(given)
    assert not np.array_equal(given, rows)
    updates = torch.from_numpy(rows.copy())
    clipping(updates, radius=0.5).apply(updates)
    assert np.array_equal(updates.numpy(), rows)


def test_a_nan_passes_through_it(byzfl: Any) -> None:
    rows = attacked(6, 1)
    rows[0, 0] = np.nan
    assert np.isnan(byzfl.Meamed(1)(rows)).any()
    with pytest.raises(ValueError, match="row 0 holds a NaN"):
        mean_around_median(torch.from_numpy(rows))


@pytest.mark.parametrize("before", ["arc-nnm", "nnm", "arc", "none"])
@pytest.mark.parametrize("name", ["gm", "trimmed-mean", "multi-krum"])
def test_its_pipelines_as_rules_apply_its_classes_in_order(
    byzfl: Any, name: str, before: str
) -> None:
    rows = torch.from_numpy(attacked(11, 3)).float()
    classes = {"arc": byzfl.ARC(f=3), "nnm": byzfl.NNM(f=3)}
    last = {
        "gm": byzfl.GeometricMedian(),
        "trimmed-mean": byzfl.TrMean(f=3),
        "multi-krum": byzfl.MultiKrum(f=3),
    }[name]
    mixed = rows
    for part in before.split("-") if before != "none" else []:
        mixed = classes[part](mixed)
    spec = f"benchmarks.byzfl_rules:pipeline:{name},before={before}"
    found = build_rule(spec, byzantine_fraction=3 / 11)(rows).vector
    torch.testing.assert_close(found, last(mixed))
