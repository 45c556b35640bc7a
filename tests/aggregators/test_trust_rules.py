"""FLTrust and MoNNA: rules that may know an update of the server's own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

from fl_bgmd.aggregators import RULES, build_rule, fltrust, nearest_neighbor_averaging

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.4, 0.49)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- FLTrust ------------------------------------------------------------------------------------


@given(update_matrices(min_n=2))
@few_examples
def test_fltrust_against_its_algorithm(updates: torch.Tensor) -> None:
    root, updates = updates[0].clone(), updates[1:]
    rows, own = numpy64(updates), numpy64(root)
    length = np.linalg.norm(own)
    trust, scaled = [], []
    for row in rows:
        size = np.linalg.norm(row)
        trust.append(max(0.0, row @ own / (size * length)) if size * length > 0 else 0.0)
        scaled.append(row * length / size if size > 0 else row)
    result = fltrust(updates, root)
    expected = np.zeros_like(own)
    if sum(trust) > 1e-9:
        expected = np.array(trust) @ np.array(scaled) / sum(trust)
        assert np.abs(numpy64(result.vector) - expected).max() <= 1e-5 * length
    assert np.linalg.norm(numpy64(result.vector)) <= length * (1 + 1e-6)
    assert result.weights is not None
    np.testing.assert_allclose(
        result.weights.numpy() @ rows, numpy64(result.vector), atol=1e-6 * max(length, 1e-300)
    )


def test_fltrust_by_hand() -> None:
    # Cosines 1, 0.6, -1 and 0 with a root of norm 2; the rows at norm 2.
    rows = torch.tensor([[10.0, 0.0], [0.3, 0.4], [-1.0, 0.0], [0.0, 5.0]])
    result = fltrust(rows, torch.tensor([2.0, 0.0]))
    assert result.vector.tolist() == pytest.approx([(2 + 0.6 * 1.2) / 1.6, 0.6 * 1.6 / 1.6])
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx([0.2 / 1.6, 0.6 * 4 / 1.6, 0, 0])


def test_where_nobody_is_trusted_nothing_moves() -> None:
    rows = -normal(1, 9).expand(5, -1)
    assert torch.equal(fltrust(rows, normal(1, 9)[0]).vector, torch.zeros(9))
    assert torch.equal(fltrust(rows, torch.zeros(9)).vector, torch.zeros(9))
    assert torch.equal(fltrust(torch.zeros(5, 9), torch.ones(9)).vector, torch.zeros(9))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_fltrust_holds_against_any_number_of_rows(size: float) -> None:
    """No aggregate is longer than the root or on its other side, be all rows hostile."""
    root = normal(1, 50, 1)[0]
    rows = size * normal(20, 50, 2)
    vector = fltrust(rows, root).vector
    assert float(vector.norm()) <= float(root.norm()) * (1 + 1e-5)
    assert float(vector @ root) > 0
    mixed = torch.cat((rows, root.repeat(10, 1) + 0.1 * normal(10, 50, 3)))
    assert float(torch.cosine_similarity(fltrust(mixed, root).vector, root, dim=0)) > 0.9


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_rows_and_roots_of_any_magnitude(scale: float) -> None:
    rows, root = normal(9, 20).double() + 0.5, normal(1, 20, 4)[0].double() + 0.5
    for rule in (fltrust, nearest_neighbor_averaging):
        found = rule(scale * rows, scale * root).vector / scale
        torch.testing.assert_close(found, rule(rows, root).vector, rtol=1e-9, atol=1e-12)


# --- MoNNA --------------------------------------------------------------------------------------


@given(update_matrices(min_n=2), st.sampled_from(FRACTIONS), st.booleans())
@few_examples
def test_monna_against_brute_force(updates: torch.Tensor, fraction: float, with_root: bool) -> None:
    rows = numpy64(updates)
    count = len(rows) - math.floor(fraction * len(rows) + 1e-9)
    squared = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    radii = np.sort(squared, axis=1)[:, count - 1]
    pivots = [0] if with_root else np.flatnonzero(radii <= radii.min() * (1 + 1e-9)).tolist()
    root = updates[0] if with_root else None
    kept = nearest_neighbor_averaging(updates, root, byzantine_fraction=fraction).kept.numpy()
    assert kept.sum() == count
    fits = [
        squared[pivot][kept].max() <= np.sort(squared[pivot])[count - 1] * (1 + 1e-6)
        for pivot in pivots
    ]
    assert any(fits)


def test_monna_by_hand() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0], [4.5], [100.0]])
    # Three are within 2 of 1 (0 and 3) and of 3 (4.5 and 1): the first.
    assert nearest_neighbor_averaging(rows, byzantine_fraction=0.4).vector.tolist() == (
        pytest.approx([4 / 3])
    )
    near_zero = nearest_neighbor_averaging(rows, torch.tensor([0.4]), byzantine_fraction=0.4)
    assert near_zero.kept.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("kind", ["huge", "one point", "mixed"])
@pytest.mark.parametrize("with_root", [False, True])
def test_monna_leaves_far_rows_out(kind: str, with_root: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((11, 9))
    rows[:5] = {
        "huge": 1e30 * rng.standard_normal((5, 9)),
        "one point": np.full((5, 9), 1e6),
        "mixed": 10.0 ** rng.uniform(3, 30, (5, 1)) * rng.standard_normal((5, 9)),
    }[kind]
    root = torch.from_numpy(rng.standard_normal(9)).float() if with_root else None
    updates = torch.from_numpy(rows).float()
    kept = nearest_neighbor_averaging(updates, root, byzantine_fraction=0.46).kept
    assert kept.tolist() == [False] * 5 + [True] * 6


# --- The root -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        (None, TypeError, r"root is None; allowed: a tensor \(d,\), the server's own update"),
        (torch.zeros(2), ValueError, r"root has shape \(2,\); allowed: \(3,\)"),
        (torch.tensor([0, math.nan, 0]), ValueError, "root holds a NaN or an infinity; allowed:"),
    ],
)
def test_refused_roots(root: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fltrust(torch.ones(4, 3), root)


def test_a_rule_is_given_the_root_by_name() -> None:
    rows, root = normal(6, 5), normal(1, 5, 9)[0]
    rule = build_rule("fltrust+clipping")
    torch.testing.assert_close(rule(rows, root=root).vector, fltrust(rows, root).vector)
    assert [name for name, kind in RULES.items() if kind.needs_root] == ["fltrust"]
    with pytest.raises(TypeError, match="root is None"):
        rule(rows)
    own = build_rule("monna", byzantine_fraction=0.4)
    assert not torch.equal(own(rows, root=root).vector, own(rows).vector)
