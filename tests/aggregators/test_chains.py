"""Chains of mixings: on one Gram matrix what they are one by one, and around the last aggregate."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import few_examples, update_matrices
from torch import Tensor

from fl_bgmd.aggregators import build_rule, means, nearest_neighbor_mixing, rows
from fl_bgmd.aggregators.chain import Chain, chained
from fl_bgmd.aggregators.mixing import centering, clipping, lower_median
from fl_bgmd.aggregators.rule import build_mixings

KEEPING = ("clipping", "median-clipping", "arc", "nearest-neighbor")
CHAINS = [
    *("+".join(pair) for pair in itertools.product(KEEPING, repeat=2)),
    "clipping+median-clipping+nearest-neighbor",
    "arc+nearest-neighbor+median-clipping+clipping:factor=0.5",
    "nearest-neighbor+nearest-neighbor+clipping:radius=0.3",
]


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def one_by_one(spec: str, updates: Tensor, fraction: float, origin: Tensor | None = None) -> Tensor:
    """Return the mixed rows, in float64, each mixing applied to what the one before has made."""
    mixed = updates.double()
    for bound in build_mixings(spec):
        inputs = {"byzantine_fraction": fraction, "generator": None, "last": None}
        mixed = bound(updates=mixed, origin=origin, **inputs).apply(mixed)
    return mixed


def chain_of(spec: str, updates: Tensor, fraction: float, origin: Tensor | None = None) -> Chain:
    inputs = {"byzantine_fraction": fraction, "generator": None, "last": None}
    made = chained(build_mixings(spec), updates, origin, **inputs)
    assert made is not None
    return made


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("spec", CHAINS)
@given(st.integers(3, 12), st.integers(2, 20), st.sampled_from((0.0, 0.2, 0.4)), st.integers(0, 99))
@settings(few_examples, max_examples=10)
def test_a_chain_is_its_mixings_one_by_one(
    spec: str, with_origin: bool, n: int, d: int, fraction: float, seed: int
) -> None:
    updates = normal(n, d, seed).double() + 0.5
    updates[0] *= 7.0
    origin = normal(1, d, seed + 1)[0].double() if with_origin else None
    expected = one_by_one(spec, updates, fraction, origin)
    inputs = {"byzantine_fraction": fraction, "generator": None, "last": None}
    chain = chained(build_mixings(spec), updates, origin, **inputs)
    if chain is None:  # neighbors of so few rows are the same for most of them
        assert "nearest-neighbor" in spec.split("+")[:-1]
        return
    found = chain.apply(updates)
    # A geometric median is certified to 1e-6 of its objective: its point to a thousandth.
    close = 1e-2 if "median" in spec else 1e-9
    if "median" in spec and "nearest" in spec.split("median", 1)[1]:
        return  # who is nearest may hang on the median's last digits: see the next test
    torch.testing.assert_close(found, expected, atol=close, rtol=0)
    shares = np.linspace(0, 1, n)
    if origin is None:
        formed = torch.from_numpy(chain.spread(shares)) @ updates
        torch.testing.assert_close(formed, torch.from_numpy(shares) @ found, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [10, 100])
def test_the_chain_of_the_recipe(n: int) -> None:
    updates = normal(n, 400) + 1.0
    updates[: n // 5] *= 1e4
    spec = "clipping+median-clipping+nearest-neighbor"
    expected = one_by_one(spec, updates, 0.25)
    found = chain_of(spec, updates, 0.25).apply(updates)
    # A few neighbors that are as far may change places.
    apart = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(apart.median()) < 1e-4
    assert float(apart.max()) < 0.1


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("spec", [chain for chain in CHAINS if len(chain.split("+")) > 2])
def test_a_chain_passes_over_the_rows_twice(
    spec: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the Gram matrix and the origin's column, once to mix; one by one it is 6 to 9."""
    updates = normal(n, 500)
    passes = []
    original = rows.sum_blocks

    def counted(function: Any, given: Tensor, *args: Any, **options: Any) -> Any:
        passes.append(given.shape[0])
        return original(function, given, *args, **options)

    monkeypatch.setattr(rows, "sum_blocks", counted)
    monkeypatch.setattr(means, "sum_blocks", counted)
    chain_of(spec, updates, 0.25).apply(updates)
    assert passes.count(n) <= 3
    chained_passes = len(passes)
    one_by_one(spec, updates, 0.25)
    assert len(passes) - chained_passes >= 2 * chained_passes - 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7])
def test_rows_of_any_size_and_anywhere(scale: float, offset: float) -> None:
    updates = scale * (normal(9, 60).double() + offset)
    updates[:2] *= 1e8
    for spec in ("clipping+nearest-neighbor", "clipping:factor=0.5+nearest-neighbor"):
        rule = build_rule(f"mean+{spec}", byzantine_fraction=0.23)
        expected = one_by_one(spec, updates, 0.23).mean(dim=0)
        found = rule(updates).vector
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_where_digits_are_at_stake_the_mixings_are_applied_one_by_one() -> None:
    inputs = {"byzantine_fraction": 0.25, "generator": None, "last": None}
    bounds = build_mixings("clipping:factor=0.5+nearest-neighbor")
    far = normal(9, 60).double() + 1e9
    assert chained(bounds, far, None, **inputs) is None
    assert chained(bounds, 1e200 * normal(9, 60).double(), None, **inputs) is None
    assert chained(bounds, normal(600, 20), None, **inputs) is None
    assert chained(bounds, normal(9, 60), None, **inputs) is not None


def test_rows_are_mixed_in_place_and_weights_are_the_clients() -> None:
    updates = normal(9, 50)
    before = updates.clone()
    rule = build_rule("gmd+clipping+nearest-neighbor", byzantine_fraction=0.25)
    result = rule(updates)
    assert torch.equal(updates, before)
    assert result.weights is not None
    torch.testing.assert_close(result.weights @ updates.double(), result.vector.double())
    place = updates.data_ptr()
    assert torch.equal(rule(updates, overwrite=True).vector, result.vector)
    assert updates.data_ptr() == place
    assert not torch.equal(updates, before)
    weighted = build_rule("mean+clipping+nearest-neighbor", byzantine_fraction=0.25)
    given = torch.arange(1.0, 10.0)
    clipped = clipping(before).apply(before)
    mixed = nearest_neighbor_mixing(clipped, byzantine_fraction=0.25)
    chain = chain_of("clipping+nearest-neighbor", before, 0.25)
    theirs = torch.from_numpy(chain.average(given.double().numpy()))
    expected = (theirs / theirs.sum()) @ mixed.double()
    found = weighted(before, weights=given).vector.double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@given(update_matrices(min_n=2, dtypes=(torch.float32, torch.float16)))
@few_examples
def test_every_dtype_and_kind_of_rows(updates: Tensor) -> None:
    if not torch.isfinite(updates).all():
        return
    vector = build_rule("mean+clipping+nearest-neighbor")(updates).vector
    assert vector.dtype == torch.float32
    assert torch.isfinite(vector).all()
    bound = float(updates.double().norm(dim=1).max())
    assert float(vector.double().norm()) <= bound * (1 + 1e-5)


def test_a_row_that_is_not_finite_is_named() -> None:
    updates = normal(5, 4)
    updates[3, 1] = torch.nan
    with pytest.raises(ValueError, match="updates: row 3 holds a NaN or an infinity"):
        build_rule("mean+clipping+nearest-neighbor")(updates)
    with pytest.raises(ValueError, match=r"updates has shape \(4,\); allowed: \(n, d\)"):
        build_rule("mean+clipping+nearest-neighbor")(torch.ones(4))


# --- Centering ----------------------------------------------------------------------------------


def test_centering_by_hand() -> None:
    """Around (10, 0) the rows are 1, 2 and 3 away; around zero they are 11, 8 and 13 long."""
    updates = torch.tensor([[11.0, 0.0], [8.0, 0.0], [13.0, 0.0]])
    last = torch.tensor([10.0, 0.0])
    rule = build_rule("mean+centering+clipping")
    assert rule(updates, last=last).vector.tolist() == pytest.approx([(11 + 8 + 12) / 3, 0.0])
    assert rule(updates).vector.tolist() == pytest.approx([(11 + 8 + 11) / 3, 0.0])
    none = build_rule("mean+centering")
    assert torch.equal(none(updates, last=last).vector, updates.mean(dim=0))


@pytest.mark.parametrize("spec", ["clipping", "arc", "clipping+nearest-neighbor", "arc+arc"])
def test_centering_moves_the_origin_of_what_follows(spec: str) -> None:
    updates, last = normal(9, 30).double() + 3.0, normal(1, 30, 5)[0].double() + 3.0
    rule = build_rule(f"cmd+centering+{spec}", byzantine_fraction=0.25)
    moved = build_rule(f"cmd+{spec}", byzantine_fraction=0.25)(updates - last).vector + last
    torch.testing.assert_close(rule(updates, last=last).vector, moved, atol=1e-9, rtol=0)
    distances = (updates - last).norm(dim=1)
    assert lower_median(distances.numpy()) < lower_median(updates.norm(dim=1).numpy())


def test_centering_and_the_rows() -> None:
    updates, last = normal(7, 5), normal(1, 5, 1)[0]
    before = updates.clone()
    build_rule("mean+centering+clipping")(updates, last=last)
    assert torch.equal(updates, before)
    assert build_rule("mean+centering+clipping").uses("last")
    assert not build_rule("mean+clipping").uses("last")
    with pytest.raises(ValueError, match=r"last has shape \(4,\); allowed: \(5,\)"):
        centering(updates, last=torch.zeros(4))
