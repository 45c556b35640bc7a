"""The robust memory of the block rule: it converges, and colluders cannot enter it."""

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fl_bgmd.aggregators import BlockMemory, block_geometric_median, geometric_median
from fl_bgmd.aggregators.location import robust_weights, sketch
from fl_bgmd.aggregators.memory import fading
from fl_bgmd.devices import repeatable

pytestmark = pytest.mark.usefixtures("one_thread")

Rule = Callable[[Tensor], Tensor]
CLIENTS, DIMENSIONS = 10, 12_000


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep to one thread: a second costs more than it saves on rows as short as these."""
    with repeatable(1):
        yield


def block_rule(memory_rule: str = "robust") -> Rule:
    """Return the block rule as a strategy applies it, round after round, from its start."""
    generator = torch.Generator().manual_seed(0)
    memory: BlockMemory | None = None

    def step(updates: Tensor) -> Tensor:
        nonlocal memory
        result = block_geometric_median(
            updates, memory, memory_rule=memory_rule, generator=generator
        )
        memory = result.memory
        return result.vector

    return step


def median_rule(updates: Tensor) -> Tensor:
    return geometric_median(updates).vector


@cache
def noise_of_rounds() -> Tensor:
    """Return what clients' gradients differ by in 150 rounds, (150, n, d), of norm 0.01 each."""
    generator = torch.Generator().manual_seed(1)
    size = 0.01 / math.sqrt(DIMENSIONS)
    return size * torch.randn(150, CLIENTS, DIMENSIONS, generator=generator)


@cache
def distance_after(
    name: str, share: float, spread: float, attack: bool, rounds: int = 150
) -> float:
    """Return how far from the optimum a quadratic ends that starts at 10.

    Each client covers ``share`` of its way in a round, less where the curvature is lower: it is
    spread over a factor of ``spread``. Under attack 4 of 10, redrawn, send -100 times their update.
    The rule is the median (``name`` ``median``), or the block rule with the memory of that name.
    """
    rule = median_rule if name == "median" else block_rule(name)
    generator = torch.Generator().manual_seed(0)
    model = torch.randn(DIMENSIONS, generator=generator)
    model *= 10 / model.norm()
    curvature = torch.logspace(-math.log10(spread), 0, DIMENSIONS)
    curvature = curvature[torch.randperm(DIMENSIONS, generator=generator)]
    for noise in noise_of_rounds()[:rounds]:
        updates = share * (curvature * model + noise)
        if attack:
            updates[torch.randperm(CLIENTS, generator=generator)[:4]] *= -100
        model = model - rule(updates)
        if not float(model.norm()) < 1e6:
            return math.inf
    return float(model.norm())


# ------------------------------------------------------------------------------ convergence


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("attack", [False, True], ids=["honest", "attacked"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_a_quadratic_converges_however_far_clients_train(
    spread: float, attack: bool, share: float
) -> None:
    rounds = 60 if spread == 1 else 150  # what is waited for takes longer where curvatures differ
    median = distance_after("median", share, spread, attack, rounds)
    assert distance_after("robust", share, spread, attack, rounds) <= 3 * median + 0.05


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_printed_memory_diverges_with_honest_clients(share: float) -> None:
    assert distance_after("mean", share, 1.0, False) > 10


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_small_steps_lose_nothing_to_waiting(spread: float) -> None:
    """Where all that waits may be replayed, a tenth of the coordinates goes as far as all."""
    for share in (0.03, 0.1):
        median = distance_after("median", share, spread, False)
        assert distance_after("robust", share, spread, False) <= 1.01 * median + 1e-3
        assert distance_after("none", share, spread, False) > 1.5 * median


def test_the_curvature_is_measured() -> None:
    """Every client covers 0.3 of its way: what the rows say falls by that share of a step."""
    generator = torch.Generator().manual_seed(0)
    model, memory = torch.randn(5_000, generator=generator), None
    for number in range(6):
        updates = (0.3 * model).repeat(5, 1)
        result = block_geometric_median(updates, memory, generator=generator)
        memory = result.memory
        assert memory is not None
        found = memory.curvature
        assert found is None if number == 0 else found == pytest.approx(0.3, rel=1e-4)
        model = model - result.vector


def test_fading_by_hand() -> None:
    """1 + q + q^2 = 1 / c: with c = 1/1.75 that is q = 1/2; from c = 1 on nothing may wait."""
    assert fading(None, 10) == 1.0
    assert fading(0.0, 10) == 1.0
    assert fading(0.1, 10) == 1.0
    assert fading(1 / 1.75, 3) == pytest.approx(0.5)
    assert fading(1.0, 10) == pytest.approx(0.0, abs=1e-9)
    assert fading(7.0, 10) == pytest.approx(0.0, abs=1e-9)
    factors = [fading(c, 10) for c in (0.1, 0.2, 0.5, 0.9)]
    assert factors == sorted(factors, reverse=True)


def test_a_memory_knows_no_units() -> None:
    """Rows of another size leave a memory of another size, and the same curvature."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, 3_000, generator=generator) for _ in range(4)]
    memories = []
    for scale in (1.0, 2.0**40):
        memory = None
        draw = torch.Generator().manual_seed(1)
        for updates in rows:
            memory = block_geometric_median(updates * scale, memory, generator=draw).memory
        assert memory is not None
        memories.append(memory)
    small, large = memories
    torch.testing.assert_close(large.vector, small.vector * 2.0**40, rtol=1e-4, atol=0)
    assert small.curvature is not None
    assert large.curvature == pytest.approx(small.curvature, rel=1e-4, abs=1e-9)


# ------------------------------------------------------------------------------- who enters


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_those_of_the_plain_iteration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 20))
    rows = rng.standard_normal((n, 5)) * 10.0 ** rng.uniform(-1, rng.integers(1, 6), n)[:, None]
    found, expected = robust_weights(rows), oracles.redescending_weights(rows)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert found.sum() == pytest.approx(1.0)


def test_many_rows_have_the_same_weights_as_few() -> None:
    """Beyond 512 rows distances come from the points instead of their Gram matrix."""
    rows = np.random.default_rng(0).standard_normal((100, 7))
    rows[:30] += 5
    few, many = robust_weights(rows), robust_weights(np.repeat(rows, 6, axis=0))
    np.testing.assert_allclose(many.reshape(100, 6).sum(axis=1), few, atol=1e-3)


@pytest.mark.parametrize("far", [1e2, 1e8, 1e30])
def test_the_further_out_the_less_a_row_says(far: float) -> None:
    rows = np.random.default_rng(0).standard_normal((10, 50))
    honest = rows[4:].mean(axis=0)
    rows[:4] = -far
    center = robust_weights(rows) @ rows
    assert oracles.norm(center - honest) < 3
    assert robust_weights(rows)[:4].max() < 10 / far**2


def test_equal_rows_and_zeros_have_equal_weights() -> None:
    for rows in (np.zeros((4, 3)), np.ones((5, 3)), np.ones((1, 2))):
        assert robust_weights(rows) == pytest.approx(np.full(len(rows), 1 / len(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [4, 300])
def test_a_sketch_keeps_distances(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 300_000 if n < 10 else 20_000, generator=generator).to(dtype)
    rows[1:] += 0.5  # what all columns share is what signs that repeat would get wrong
    left_out = torch.arange(100, 900)
    found = sketch(rows, left_out, generator, torch.float32)
    assert found.shape[0] == n
    assert found.shape[1] < rows.shape[1]
    exact = rows.double()
    exact[:, left_out] = 0.0
    for i, j in ((0, 1), (1, 2), (2, 3), (0, 3)):
        distance = float((exact[i] - exact[j]).norm())
        assert oracles.norm(found[i] - found[j]) == pytest.approx(distance, rel=0.12)


def test_a_sketch_of_few_columns_is_the_rows() -> None:
    rows = torch.randn(3, 40, dtype=torch.float64)
    left_out = torch.tensor([0, 7, 39])
    found = sketch(rows, left_out, None, torch.float64)
    rows[:, left_out] = 0.0
    np.testing.assert_array_equal(found, rows.numpy())


def colluding(rows: Tensor, strength: float) -> Tensor:
    """Return rows that sit on the median where the block looks, and push against it elsewhere."""
    honest = rows[4:]
    strong = torch.topk(honest.square().sum(0), DIMENSIONS // 4).indices
    mean = honest.mean(0)
    lie = -strength * mean * (honest.norm(dim=1).median() / mean.norm())
    lie[strong] = geometric_median(honest).vector[strong]
    return lie


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 10.0, 100.0])
def test_colluders_win_no_more_from_the_memory_than_from_the_median(
    share: float, strength: float
) -> None:
    """4 of 14 know the rule; honest clients differ by three times what they agree on at first."""
    ends = []
    for rule in (block_rule(), median_rule):
        generator = torch.Generator().manual_seed(0)
        model = torch.randn(DIMENSIONS, generator=generator) / math.sqrt(DIMENSIONS)
        apart = torch.randn(14, DIMENSIONS, generator=generator) * 3 / math.sqrt(DIMENSIONS)
        apart -= apart[4:].mean(0)
        scales = torch.logspace(-1, 0, DIMENSIONS)
        worst = 0.0
        for _ in range(60):
            updates = share * scales * (model + apart)
            updates[:4] = colluding(updates, strength)
            model = model - rule(updates)
            worst = max(worst, float((scales * model).norm()))
        ends.append(worst)
    ours, median = ends
    assert ours <= 1.5 * median


@pytest.mark.parametrize("push", [-3.0, -1.0, 1.0, 3.0])
def test_colluders_cannot_hide_the_curvature(push: float) -> None:
    """They pull along every step that was taken, to make it look too short or too long."""
    rule = block_rule()
    generator = torch.Generator().manual_seed(0)
    model, step = torch.randn(DIMENSIONS, generator=generator), torch.zeros(DIMENSIONS)
    start = float(model.norm())
    for _ in range(60):
        updates = 0.9 * model + 0.02 * torch.randn(14, DIMENSIONS, generator=generator)
        updates[:4] += push * step * float(model.norm()) / max(float(step.norm()), 1e-9)
        step = rule(updates)
        model = model - step
        assert float(model.norm()) < 1.5 * start
    assert float(model.norm()) < 0.1 * start


def test_only_what_a_result_left_is_a_memory() -> None:
    with pytest.raises(TypeError, match="memory is a Tensor; allowed: None, or the memory of a re"):
        block_geometric_median(torch.ones(3, 4), torch.ones(4))  # type: ignore[arg-type]


def test_few_coordinates_are_all_in_the_block() -> None:
    rows = torch.randn(5, 1_000)
    result = block_geometric_median(rows)
    torch.testing.assert_close(result.vector, geometric_median(rows).vector)
    assert len(block_geometric_median(torch.randn(5, 1_001)).block) == 1_000
    assert len(block_geometric_median(torch.randn(5, 20_000)).block) == 2_000
    with pytest.raises(ValueError, match="min_block_size is 0; allowed: a whole number, 1 or more"):
        block_geometric_median(rows, min_block_size=0)
