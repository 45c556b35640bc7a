"""What all rules have in common: symmetries, breakdown, dtypes, and what they refuse.

A rule of the registry is tested unless it is named here as one that promises something else.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from every_rule import call, public
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64
from torch import Tensor

from fl_bgmd.aggregators import RULES, build_rule
from fl_bgmd.devices import repeatable

# Norms, cosines and signs are about zero.
ABOUT_ZERO = (
    *("norm-threshold", "norm-clip", "centered-clipping", "gap-filter"),
    *("sign-guard", "fools-gold", "flame", "fltrust"),
)
BY_COORDINATE = ("cmd", "trimmed-mean", "meamed", "bulyan", "sign-guard")
# The hostile share is the default of an option of its own, which may be more.
OWN_SHARE = ("norm-threshold",)


def all_but(*names: str) -> list[str]:
    assert set(names) <= set(RULES)
    return [name for name in RULES if name not in names]


def apply(name: str, rows: Tensor, fraction: float = 0.25, root: Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    if RULES[name].needs_root and root is None:
        root = rows.sum(dim=0)
    return build_rule(name, byzantine_fraction=fraction, generator=generator)(rows, root=root)


def rows_of_growing_size(n: int, d: int, seed: int) -> Tensor:
    """Without ties, whatever they are compared by."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((n, d)) + 0.3) * 1.2 ** np.arange(n)[:, None])


@pytest.mark.parametrize("name", RULES)
@given(n=st.integers(5, 10), d=st.integers(2, 20), seed=st.integers(0, 2**32 - 1))
@few_examples
def test_the_order_of_rows_and_their_unit_change_nothing(
    name: str, n: int, d: int, seed: int
) -> None:
    rows = rows_of_growing_size(n, d, seed)
    vector = apply(name, rows).vector
    size = float(rows.abs().max())
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    root = rows.sum(dim=0) if RULES[name].needs_root else None
    assert (apply(name, rows[order], root=root).vector - vector).abs().max() <= 1e-9 * size
    scaled = apply(name, 1e20 * rows).vector / 1e20
    assert (scaled - vector).abs().max() <= 1e-9 * size


@pytest.mark.parametrize("name", all_but(*ABOUT_ZERO))
@given(n=st.integers(5, 10), d=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@few_examples
def test_translation(name: str, n: int, d: int, seed: int) -> None:
    rows = rows_of_growing_size(n, d, seed)
    offset = 100 * torch.from_numpy(np.random.default_rng(seed).standard_normal(d))
    moved = apply(name, rows + offset).vector - offset
    torch.testing.assert_close(moved, apply(name, rows).vector, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", all_but(*BY_COORDINATE))
@given(n=st.integers(5, 10), d=st.integers(2, 20), seed=st.integers(0, 2**32 - 1))
@few_examples
def test_rotation(name: str, n: int, d: int, seed: int) -> None:
    rows = rows_of_growing_size(n, d, seed)
    turn = oracles.rotation(d, seed)
    turned, vector = apply(name, rows @ turn).vector, apply(name, rows).vector @ turn
    assert (turned - vector).abs().max() <= 1e-7 * float(rows.abs().max())


@pytest.mark.parametrize("kind", ["huge", "one point", "opposite", "mixed"])
@pytest.mark.parametrize("name", all_but("mean", "fools-gold"))
def test_a_quarter_of_any_size_moves_nothing_far(name: str, kind: str) -> None:
    """Averaging and FoolsGold do not claim it.

    DnC looks along one direction only: long rows hide others.
    """
    rng = np.random.default_rng(1)
    honest = rng.standard_normal((15, 60)) + 0.5
    bad = {
        "huge": np.full((4, 60), 1e30),
        "one point": np.tile(1e6 * rng.standard_normal(60), (4, 1)),
        "opposite": -1e3 * honest[:4],
        "mixed": 10.0 ** np.arange(4, 20, 4)[:, None] * rng.standard_normal((4, 60)),
    }[kind]
    rows = torch.from_numpy(np.concatenate((bad, honest)))
    root = torch.from_numpy(honest.mean(axis=0))
    found = numpy64(apply(name, rows, 4 / 19, root).vector)
    far = np.linalg.norm(found - honest.mean(axis=0))
    holds = far < np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert holds == (name != "dnc" or kind in ("huge", "one point"))


# Of eleven rows; the others hold against five.
SMALLER = {"krum": 4, "multi-krum": 4, "bulyan": 2, "robust-filter": 2}


@pytest.mark.parametrize("kind", ["huge", "one point", "opposite"])
@pytest.mark.parametrize("name", all_but("mean", "fools-gold", "dnc"))
def test_the_largest_tolerated_share_leaves_an_honest_size(name: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    hostile = SMALLER.get(name, 5)
    honest = rng.standard_normal((11, 60)) + 0.5
    bad = {
        "huge": np.full((hostile, 60), 1e30),
        "one point": np.tile(1e6 * rng.standard_normal(60), (hostile, 1)),
        "opposite": -1e3 * honest[:hostile],
    }[kind]
    rows = torch.from_numpy(np.concatenate((bad, honest[hostile:])))
    root = torch.from_numpy(honest.mean(axis=0))
    found = numpy64(apply(name, rows, hostile / 11, root).vector)
    assert np.linalg.norm(found) < 1.5 * np.linalg.norm(honest, axis=1).max()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    rows = (rows_of_growing_size(8, 30, 2)).to(dtype)
    before = rows.clone()
    root = rows.double().sum(dim=0)
    result = apply(name, rows, root=root)
    assert result.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(rows, before)
    expected = numpy64(apply(name, rows.double(), root=root).vector)
    size = np.abs(expected).max()
    np.testing.assert_allclose(numpy64(result.vector), expected, atol=1e-5 * size)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_float64_rows_of_any_magnitude(name: str, scale: float) -> None:
    rows = rows_of_growing_size(9, 7, 3)
    found = numpy64(apply(name, scale * rows).vector) / scale
    np.testing.assert_allclose(found, numpy64(apply(name, rows).vector), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_two_threads_find_what_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_growing_size(9, 3000, 4)
    alone = apply(name, rows).vector
    pools: list[int] = []

    class Watched(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr("fl_bgmd.aggregators.rows.ThreadPoolExecutor", Watched)
    monkeypatch.setattr("fl_bgmd.aggregators.rows._FEW_ELEMENTS", 0)
    with repeatable(2):
        torch.testing.assert_close(apply(name, rows).vector, alone, rtol=1e-9, atol=1e-9)
    assert 2 in pools


@pytest.mark.parametrize("name", RULES)
def test_one_row_and_equal_rows_come_back(name: str) -> None:
    if name != "fools-gold":  # which takes equal rows for one attacker's
        equal = torch.full((6, 4), 0.1)
        torch.testing.assert_close(apply(name, equal, root=equal[0]).vector, equal[0])
    one = torch.tensor([[3.0, -1.0, 2.0]])
    torch.testing.assert_close(apply(name, one, root=one[0]).vector, one[0])


@pytest.mark.parametrize("name", RULES)
def test_refused_updates(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        rows = torch.ones(5, 3)
        rows[2, 1] = value
        with pytest.raises(ValueError, match="updates: row 2 holds a NaN or an infinity"):
            apply(name, rows, root=torch.ones(3))
    for shape in ((4,), (0, 2), (4, 0), (4, 2, 1)):
        message = re.escape(f"updates has shape {shape}; allowed: (n, d)")
        with pytest.raises(ValueError, match=message):
            apply(name, torch.ones(shape), root=torch.ones(2))
    for dtype in (torch.int64, torch.int32, torch.bool):
        with pytest.raises(TypeError, match=rf"updates has dtype {dtype}; allowed: torch\.float16"):
            apply(name, torch.ones(4, 2, dtype=dtype), root=torch.ones(2))
    with pytest.raises(TypeError, match=r"updates must be a torch\.Tensor, not list"):
        call(name, [[1.0]], root=torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [name for name in all_but(*OWN_SHARE) if "byzantine_fraction" in RULES[name].takes]
)
@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, math.nan])
def test_refused_shares(name: str, fraction: float) -> None:
    message = f"byzantine_fraction is {fraction}; allowed: 0 to below 0.5"
    with pytest.raises(ValueError, match=re.escape(message)):
        public(name)(torch.ones(5, 2), byzantine_fraction=fraction)
