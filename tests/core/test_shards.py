"""Rules on rows in shards, held here: what they make of them, and what is sent again."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_bgmd.aggregators import MIXINGS, RULES, Aggregate, build_rule
from fl_bgmd.shards import (
    Call,
    Crew,
    PerShard,
    RowsGoneError,
    Shard,
    Sharded,
    Step,
    even_edges,
    part_of,
    within,
)


class Here(Crew):
    """Holders in this process; each forgets its rows as often as it is told to."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.shards: list[Shard | None] = []
        self.sent = 0

    def hold(self, rows: Tensor) -> Sharded:
        edges = even_edges(rows.shape[1], self._count)
        self.shards = [None] * (len(edges) - 1)
        return Sharded(self, rows, edges, rows.shape, rows.dtype)

    def call(self, rows: Sharded, call: Call) -> list[Any]:
        results = []
        for i, columns in enumerate(rows.columns):
            steps = [Step(s.call.at(columns), s.instead, s.number) for s in rows.steps]
            try:
                if (shard := self.shards[i]) is None:
                    raise RowsGoneError
                results.append(shard.call(steps, call.at(columns)))
            except RowsGoneError:
                self.sent += 1
                fresh = self.shards[i] = Shard(rows.source[:, columns].clone())
                results.append(fresh.call(steps, call.at(columns)))
        return results

    def release(self) -> None:
        self.shards = [None] * len(self.shards)

    def close(self) -> None:
        pass


class Forgetful(Here):
    """Holders of whom another one dies before each call."""

    calls = 0

    def call(self, rows: Sharded, call: Call) -> list[Any]:
        self.shards[self.calls % len(self.shards)] = None
        self.calls += 1
        return super().call(rows, call)


def applied(
    spec: str, rows: Any, rounds: int = 3, change: Callable[[Tensor], Any] = lambda rows: rows
) -> list[Aggregate]:
    """Return the results of rounds, each of rows that have moved on."""
    generator = torch.Generator().manual_seed(3)
    rule, results = build_rule(spec, byzantine_fraction=0.2, generator=generator), []
    memory, last = None, None
    root = rows[0] * 0.5
    for number in range(rounds):
        given = cast(Tensor, change(rows * (1 - 0.2 * number)))
        nodes = list(range(len(rows)))
        result = rule(given, memory, nodes=nodes, root=root, last=last, overwrite=True)
        memory, last = result.memory, result.vector
        results.append(result)
    return results


SPECS = [
    *(name for name, kind in RULES.items() if kind.sharded),
    *(f"gmd+{name}" for name, kind in MIXINGS.items() if kind.sharded),
    *("gmd:solver=weiszfeld", "bgmd:memory=mean", "bgmd:memory=none", "bgmd:score=norm"),
    *("bgmd:selection=top-k", "krum+bucketing", "gap-filter+clipping+nearest-neighbor"),
    *("gmd+centering+clipping+nearest-neighbor", "gmd+centering+median-clipping"),
]


def made_up(n: int, d: int, dtype: torch.dtype = torch.float64, far: float = 10.0) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d), dtype=torch.float64)
    rows += 0.5
    rows[: n // 5] *= far
    return rows.to(dtype)


def near(found: Any, expected: Any, tolerance: float) -> None:
    scale = max(1e-300, float(torch.as_tensor(expected).abs().max()))
    assert float((torch.as_tensor(found) - torch.as_tensor(expected)).abs().max()) <= (
        tolerance * scale
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("n", "d", "shards"), [(10, 5000, 3), (25, 301, 2), (11, 3, 5), (5, 40_000, 1)]
)
def test_a_rule_makes_the_same_of_shards(spec: str, n: int, d: int, shards: int) -> None:
    rows = made_up(min(n, 13) if spec == "smea" else n, d)  # which tries all choices of rows
    crew = Here(shards)
    here, there = applied(spec, rows), applied(spec, rows, change=crew.hold)
    for found, expected in zip(there, here, strict=True):
        near(found.vector, expected.vector, 1e-11)
        if expected.weights is not None:
            near(found.weights, expected.weights, 1e-11)
    assert len(crew.shards) == min(shards, d)


@pytest.mark.parametrize("spec", ["mean", "gmd", "cmd", "bgmd", "caf", "gmd+nearest-neighbor"])
def test_rows_of_float32_agree_to_its_rounding(spec: str) -> None:
    rows = made_up(12, 6000, torch.float32)
    for found, expected in zip(
        applied(spec, rows, change=Here(4).hold), applied(spec, rows), strict=True
    ):
        assert found.vector.dtype == torch.float32
        near(found.vector, expected.vector, 2e-6)


@pytest.mark.parametrize("spec", ["gmd", "bgmd", "gmd+clipping+nearest-neighbor", "krum+bucketing"])
def test_what_holders_have_lost_is_sent_again(spec: str) -> None:
    rows = made_up(10, 3000)
    crew, lucky = Forgetful(3), Here(3)
    lost, kept = applied(spec, rows, change=crew.hold), applied(spec, rows, change=lucky.hold)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(lost, kept, strict=True))
    assert crew.sent > lucky.sent


@pytest.mark.parametrize("spec", ["gmd", "bgmd", "krum", "gmd+nearest-neighbor"])
def test_rows_beyond_the_range_of_squares_are_scaled_in_their_shards(spec: str) -> None:
    rows = made_up(10, 1000, far=1e200)
    for found, expected in zip(
        applied(spec, rows, 2, Here(3).hold), applied(spec, rows, 2), strict=True
    ):
        assert bool(torch.isfinite(found.vector).all())
        near(found.vector, expected.vector, 1e-11)


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = made_up(10, 300)
    rows[4, 200] = np.nan
    for spec in ("gmd", "cmd", "mean", "bgmd"):
        with pytest.raises(ValueError, match="row 4 holds a NaN"):
            build_rule(spec)(cast(Tensor, Here(3).hold(rows)))


def test_a_step_that_writes_leaves_nothing_of_the_rows_before() -> None:
    shard = Shard(torch.ones(2, 3))
    total = Call(torch.sum)
    doubled = Step(Call(Tensor.mul_, (2.0,)), instead=True)
    halved = Step(Call(torch.mul, (0.5,)))
    assert float(shard.call([doubled], total)) == 12.0
    assert float(shard.call([doubled, halved], total)) == 6.0
    assert float(shard.call([doubled], total)) == 12.0
    with pytest.raises(RowsGoneError):
        shard.call([], total)


def test_arguments_are_cut_as_the_columns_are() -> None:
    vector, matrix, part = torch.arange(10.0), torch.zeros(2, 2), slice(3, 6)
    assert part_of(vector, part).tolist() == [3.0, 4.0, 5.0]
    assert part_of(matrix, part) is matrix
    assert part_of(PerShard(lambda columns: columns.start), part) == 3
    assert within(torch.tensor([0, 3, 5, 6, 9]), part).tolist() == [0, 2]
