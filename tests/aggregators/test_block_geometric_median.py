"""The block rule: which coordinates it takes, what it keeps, and who gets into its memory."""

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices

import fl_bgmd.aggregators as rules
from fl_bgmd.aggregators import BlockGeometricMedian, BlockMemory, geometric_median
from fl_bgmd.aggregators.sampling import inclusion_probabilities, select_block

BLOCK_SELECTIONS = ("sample", "top-k", "uniform")
SCORES = ("clipped", "squared-norm", "norm")
MEMORY_RULES = ("robust", "mean", "per-client", "none")


def block_geometric_median(
    updates: torch.Tensor, memory: torch.Tensor | BlockMemory | None = None, **options: Any
) -> BlockGeometricMedian:
    """Apply the rule to few coordinates, whose blocks are smaller than what it would sample."""
    if isinstance(memory, torch.Tensor):
        memory = BlockMemory(memory)
    return rules.block_geometric_median(updates, memory, **{"min_block_size": 1} | options)


def waits(result: BlockGeometricMedian) -> torch.Tensor:
    """Return what waits in the memory of a result."""
    assert result.memory is not None
    return result.memory.vector


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Return float64 rows whose columns differ in size."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d)) * rng.uniform(0.1, 3, d))


def column_scores(rows: np.ndarray, score: str) -> np.ndarray:
    """Return the scores of Algorithm 2, or those of rows clipped to the median row norm."""
    if score == "clipped":
        norms = np.sqrt((rows**2).sum(axis=1))
        rows = rows * np.minimum(1, np.median(norms) / norms)[:, None]
    squared = (rows**2).sum(axis=0)
    return np.sqrt(squared) if score == "norm" else squared


def residual_rows(rows: np.ndarray, block: torch.Tensor) -> np.ndarray:
    residuals = rows.copy()
    residuals[:, block.numpy()] = 0.0
    return residuals


def assert_block(block: torch.Tensor, k: int, d: int) -> None:
    assert block.dtype == torch.int64
    assert len(block) == k
    assert (block[1:] > block[:-1]).all()
    assert int(block[0]) >= 0
    assert int(block[-1]) < d


# --- Choosing the block -------------------------------------------------------------------------


@st.composite
def score_vectors(draw: st.DrawFn) -> torch.Tensor:
    """Draw (d,) float32 scores: flat, spread over many magnitudes, tied, with zeros."""
    d = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from((0, 1, 10, 30)))
    scores = 10.0 ** rng.uniform(-spread, 0, d)
    if draw(st.booleans()):
        scores = scores[rng.integers(0, d, d)]
    scores[rng.random(d) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0.0
    return torch.from_numpy(scores).float()


@given(score_vectors(), st.data())
@settings(few_examples, max_examples=200)
def test_exactly_k_distinct_coordinates(scores: torch.Tensor, data: st.DataObject) -> None:
    d = len(scores)
    k = data.draw(st.integers(1, d))
    generator = seeded(data.draw(st.integers(0, 1000)))
    for selection in BLOCK_SELECTIONS:
        assert_block(select_block(scores, k, selection=selection, generator=generator), k, d)


@pytest.mark.parametrize("d", [31, 33, 5_000, 600_001, 1_100_000])
@pytest.mark.parametrize("spread", [0, 3, 30])
def test_exactly_k_of_many(d: int, spread: int) -> None:
    """Blocks of scores, a last one that is not full, scores that are certain among others."""
    rng = np.random.default_rng(d)
    scores = torch.from_numpy(10.0 ** rng.uniform(-spread, 0, d)).float()
    scores[rng.random(d) < 0.3] = 0.0
    for k in (1, d // 10, d // 2):
        block = select_block(scores, k, generator=seeded(k))
        assert_block(block, k, d)
        assert (scores[block] > 0).all()


def test_large_blocks_take_their_share_of_every_part() -> None:
    """Whatever the order of the comb, each tenth of the coordinates gets what its scores sum to."""
    d, k = 1_500_000, 150_000
    scores = torch.rand(d, generator=seeded(0)) * torch.linspace(0.1, 1.0, d)
    expected = inclusion_probabilities(scores, k).double()
    block = select_block(scores, k, generator=seeded(1))
    hit = torch.zeros(d, dtype=torch.float64).index_fill(0, block, 1.0)
    for part in (torch.arange(d) // (d // 10), torch.arange(d) % 7, scores.argsort().argsort() % 5):
        found = torch.zeros(10, dtype=torch.float64).index_add(0, part, hit)
        wanted = torch.zeros(10, dtype=torch.float64).index_add(0, part, expected)
        # Independent draws would deviate by sqrt(wanted); systematic ones by less.
        assert ((found - wanted).abs() <= 4 * wanted.sqrt() + 1e-6).all()


@given(score_vectors(), st.data())
@settings(few_examples, max_examples=200)
def test_zero_scores_only_fill_up(scores: torch.Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    generator = seeded(data.draw(st.integers(0, 1000)))
    positive = int((scores > 0).sum())
    for selection in ("sample", "top-k"):
        block = select_block(scores, k, selection=selection, generator=generator)
        assert int((scores[block] > 0).sum()) == min(k, positive)


@given(score_vectors(), st.data())
@settings(few_examples, max_examples=200)
def test_inclusion_probabilities(scores: torch.Tensor, data: st.DataObject) -> None:
    """They are min(1, s / tau), sum to k, and keep Lemma 1's promise in expectation."""
    positive = int((scores > 0).sum())
    if positive < 2:
        return
    k = data.draw(st.integers(1, positive - 1))
    found = inclusion_probabilities(scores, k).double().numpy()
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()
    assert found.sum() == pytest.approx(k, rel=1e-6)
    s = scores.double().numpy()
    low, high = 0.0, s.sum() / k  # tau by bisection
    for _ in range(2000):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, s / tau).sum() > k else (low, tau)
    np.testing.assert_allclose(found, np.minimum(1, s / high), rtol=1e-5, atol=1e-6)
    residual = ((1 - found) * s).sum() / s.sum()
    assert residual <= 1 - k / len(s) + 1e-6


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1, 1, 1, 1], 2, [0.5, 0.5, 0.5, 0.5]),
        ([1, 2, 3, 4], 1, [0.1, 0.2, 0.3, 0.4]),
        ([1, 1, 1, 97], 2, [1 / 3, 1 / 3, 1 / 3, 1]),  # capped once
        ([1, 1, 8, 90], 3, [0.5, 0.5, 1, 1]),  # capped twice: 30 * 3 / 100, then 2 * 8 / 10
        ([2, 2, 4, 0], 2, [0.5, 0.5, 1, 0]),  # a score of exactly tau
    ],
)
def test_inclusion_probabilities_by_hand(
    scores: list[float], k: int, expected: list[float]
) -> None:
    found = inclusion_probabilities(torch.tensor(scores, dtype=torch.float32), k)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_inclusion_frequencies_match_the_scores(k: int) -> None:
    """Every coordinate within 4.5 standard deviations (two-sided 7e-6), and all of them jointly."""
    draws = 4000
    rng = np.random.default_rng(k)
    scores = torch.from_numpy(rng.gamma(0.5, size=40)).float()
    scores[3] = scores[17] = 0.0
    generator = seeded(k)
    counts = np.zeros(40)
    for _ in range(draws):
        counts[select_block(scores, k, generator=generator).numpy()] += 1
    p = inclusion_probabilities(scores, k).double().numpy()
    assert (counts[p == 0] == 0).all()
    assert (counts[p > 1 - 1e-9] == draws).all()
    free = (p > 0) & (p <= 1 - 1e-9)
    z = (counts - draws * p)[free] / np.sqrt(draws * p * (1 - p))[free]
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize("k", [1, 5, 39])
def test_uniform_frequencies(k: int) -> None:
    draws = 2000
    counts = np.zeros(40)
    generator = seeded(k)
    for _ in range(draws):
        block = select_block(torch.zeros(40), k, selection="uniform", generator=generator)
        counts[block.numpy()] += 1
    p = k / 40
    assert (np.abs(counts - draws * p) / math.sqrt(draws * p * (1 - p))).max() < 4.5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("small", [1e-6, 1e-9, 1e-12, 1e-20, 1e-30])
def test_few_large_columns_beside_many_tiny_ones(small: float, score: str) -> None:
    """The large ones are certain; the rest of the block is drawn by scores lost in the total."""
    updates = normal(10, 1000).float()
    updates[:, 50:] *= small
    result = block_geometric_median(updates, score=score, generator=seeded(0))
    assert_block(result.block, 100, 1000)
    if score != "norm" or small < 1e-6:
        assert result.block[:50].tolist() == list(range(50))


def test_one_hostile_row_with_few_huge_entries() -> None:
    updates = normal(10, 1000).float()
    for size in (1e3, 1e9, 1e18, 1e36):
        updates[0, :50] = size
        for score in SCORES:
            result = block_geometric_median(updates, score=score, generator=seeded(0))
            assert_block(result.block, 100, 1000)
            assert float(result.vector.norm()) <= float(updates[1:].norm(dim=1).max())


def test_top_k_takes_the_largest() -> None:
    scores = torch.tensor([0.1, 5.0, 0.0, 2.0, 3.0, 0.2])
    assert select_block(scores, 3, selection="top-k").tolist() == [1, 3, 4]


@pytest.mark.parametrize("selection", BLOCK_SELECTIONS)
def test_all_scores_zero(selection: str) -> None:
    assert_block(select_block(torch.zeros(50), 7, selection=selection), 7, 50)
    result = block_geometric_median(torch.zeros(4, 50), selection=selection)
    assert_block(result.block, 5, 50)
    assert not result.vector.any()
    assert result.residual_ratio == 0.0
    assert not waits(result).any()


@pytest.mark.parametrize("selection", BLOCK_SELECTIONS)
def test_k_of_d_or_more_takes_all(selection: str) -> None:
    assert select_block(torch.rand(5), 5, selection=selection).tolist() == [0, 1, 2, 3, 4]
    assert select_block(torch.rand(5), 9, selection=selection).tolist() == [0, 1, 2, 3, 4]


def test_more_categories_than_float32_integers() -> None:
    """torch.multinomial refuses 2^24 categories; sums of as many float32 scores must not drift."""
    d = 2**24 + 7
    updates = torch.rand(2, d, generator=seeded(0))
    updates[:, -3:] = 100.0  # taken for certain, at the far end
    result = block_geometric_median(updates, generator=seeded(1), memory_rule="none")
    assert_block(result.block, round(0.1 * d), d)
    assert result.block[-3:].tolist() == [d - 3, d - 2, d - 1]
    halves = int((result.block < d // 2).sum()) / len(result.block)
    assert halves == pytest.approx(0.5, abs=1e-2)
    assert torch.count_nonzero(result.vector) <= len(result.block)


def test_the_same_seed_draws_the_same_block() -> None:
    updates = normal(5, 200)
    for selection in ("sample", "uniform"):
        blocks = [
            block_geometric_median(updates, selection=selection, generator=seeded(seed)).block
            for seed in (1, 1, 2)
        ]
        assert torch.equal(blocks[0], blocks[1])
        assert not torch.equal(blocks[0], blocks[2])
        torch.manual_seed(5)
        one = block_geometric_median(updates, selection=selection).block
        torch.manual_seed(5)
        assert torch.equal(one, block_geometric_median(updates, selection=selection).block)


def test_a_generator_of_its_own_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    block_geometric_median(normal(5, 200), generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


# --- The scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@given(update_matrices(min_n=2, min_d=4, kinds=("normal", "rows_of_all_sizes", "mostly_zero")))
@few_examples
def test_top_k_of_the_scores(score: str, updates: torch.Tensor) -> None:
    rows = numpy64(updates)
    if not (rows != 0).any(axis=1).all():
        return
    result = block_geometric_median(
        updates, block_fraction=0.4, selection="top-k", score=score, tol=1e-3
    )
    expected = column_scores(rows, score)
    inside = np.zeros(len(expected), dtype=bool)
    inside[result.block.numpy()] = True
    # Ties and rounding to float32 aside, nothing outside scores more than anything inside.
    assert expected[inside].min() >= expected[~inside].max() * (1 - 1e-5)


def test_clipped_scores_by_hand() -> None:
    """Norms 5, 1 and 1000 have the median 5, so the last row counts as (0, 0, 5)."""
    updates = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1000.0]])
    # Columns: 9, 16, 1 and 25 of 51, so k = 2 takes them with probability 18, 32, 2 and 50 of 51.
    draws = 800
    counts = np.zeros(4)
    generator = seeded(0)
    for _ in range(draws):
        block = block_geometric_median(
            updates, block_fraction=0.5, generator=generator, tol=1e-2
        ).block
        counts[block.numpy()] += 1
    p = np.array([18, 32, 2, 50]) / 51
    assert (np.abs(counts - draws * p) / np.sqrt(draws * p * (1 - p))).max() < 4.5


@pytest.mark.parametrize(
    ("score", "expected"),
    [("norm", [0.1, 0.2, 0.3, 0.4]), ("squared-norm", [1 / 30, 4 / 30, 9 / 30, 16 / 30])],
)
def test_norm_and_squared_norm_by_hand(score: str, expected: list[float]) -> None:
    updates = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    draws = 800
    counts = np.zeros(4)
    generator = seeded(1)
    for _ in range(draws):
        block = block_geometric_median(
            updates, block_fraction=0.25, score=score, generator=generator, tol=1e-2
        ).block
        counts[block.numpy()] += 1
    p = np.array(expected)
    assert (np.abs(counts - draws * p) / np.sqrt(draws * p * (1 - p))).max() < 4.5


def test_block_hijack() -> None:
    """40 % of the rows put 1e4 on a tenth of the coordinates, as many as the block holds."""
    n, d, k, draws = 10, 400, 40, 60
    taken = {}
    for score in ("clipped", "squared-norm"):
        generator = seeded(0)
        total = 0
        for seed in range(draws):
            rng = np.random.default_rng(seed)
            rows = rng.standard_normal((n, d))
            prey = rng.permutation(d)[:k]
            rows[:4] = 0.0
            rows[:4, prey] = 1e4
            block = block_geometric_median(
                torch.from_numpy(rows), score=score, generator=generator, tol=1e-2
            ).block
            total += len(np.intersect1d(block.numpy(), prey))
        taken[score] = total / (draws * k)
    assert taken["squared-norm"] > 0.99
    # Their share of the clipped mass is 4 rows of 10, and 6/10 * 1/10 of the rest is theirs too.
    assert taken["clipped"] == pytest.approx(0.4 + 0.06, abs=0.05)


# --- Lemma 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "score"),
    [("sample", "squared-norm"), ("sample", "norm"), ("uniform", "squared-norm")],
)
@pytest.mark.parametrize("block_fraction", [0.05, 0.3])
def test_lemma_1(selection: str, score: str, block_fraction: float) -> None:
    """E ||G - C_k(G)||^2 <= (1 - k/d) ||G||^2, over 250 blocks of one G."""
    n, d, draws = 4, 60, 250
    updates = torch.from_numpy(np.random.default_rng(0).standard_t(3, (n, d)))
    generator = seeded(0)
    ratios = np.array(
        [
            block_geometric_median(
                updates,
                block_fraction=block_fraction,
                selection=selection,
                score=score,
                memory_rule="none",
                generator=generator,
                tol=1e-2,
            ).residual_ratio
            for _ in range(draws)
        ]
    )
    error = 4.5 * ratios.std() / math.sqrt(draws)
    assert ratios.mean() <= 1 - block_fraction + error
    squared = column_scores(updates.numpy(), "squared-norm")
    if selection == "uniform":
        p = np.full(d, block_fraction)
    else:
        scores = torch.from_numpy(column_scores(updates.numpy(), score)).float()
        p = inclusion_probabilities(scores, round(block_fraction * d)).double().numpy()
        assert ratios.mean() < 1 - block_fraction - error  # heavy tails: strictly better
    expected = ((1 - p) * squared).sum() / squared.sum()
    assert ratios.mean() == pytest.approx(expected, abs=error)


@given(
    update_matrices(min_d=2, kinds=("normal", "collinear", "small_integers", "mostly_zero")),
    st.sampled_from(BLOCK_SELECTIONS),
    st.floats(0.01, 1.0),
    st.booleans(),
)
@few_examples
def test_residual_ratio(
    updates: torch.Tensor, selection: str, block_fraction: float, with_memory: bool
) -> None:
    d = updates.shape[1]
    memory = torch.linspace(-1, 1, d, dtype=updates.dtype) if with_memory else None
    result = block_geometric_median(
        updates, memory, block_fraction=block_fraction, selection=selection, generator=seeded(0)
    )
    rows = numpy64(updates) + (0 if memory is None else numpy64(memory))
    assert_block(result.block, max(1, round(block_fraction * d)), d)
    total = (rows**2).sum()
    expected = (residual_rows(rows, result.block) ** 2).sum() / total if total > 0 else 0.0
    rounding = 1e-12 if updates.dtype == torch.float64 or memory is None else 1e-5
    assert result.residual_ratio == pytest.approx(expected, abs=rounding)


# --- The vector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_rule", MEMORY_RULES)
def test_vector_is_the_geometric_median_of_the_block_and_zero_elsewhere(
    memory_rule: str, dtype: torch.dtype
) -> None:
    updates = normal(7, 41).to(dtype)
    result = block_geometric_median(
        updates, block_fraction=0.3, memory_rule=memory_rule, generator=seeded(0)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert isinstance(result, BlockGeometricMedian)
    assert result.vector.dtype == wide
    assert result.vector.shape == (41,)
    chosen = updates[:, result.block].to(wide)
    expected = geometric_median(chosen)
    torch.testing.assert_close(result.vector[result.block], expected.vector)
    assert torch.count_nonzero(result.vector) == len(result.block)
    assert result.gap <= 1e-6
    assert result.objective == pytest.approx(expected.objective)
    _, lowest = oracles.geometric_median(numpy64(chosen))
    assert expected.objective <= (1 + 2e-6) * lowest
    assert result.weights is not None
    np.testing.assert_allclose(
        result.weights.numpy() @ numpy64(chosen), numpy64(result.vector[result.block]), atol=1e-5
    )
    if memory_rule != "none":
        assert waits(result).dtype == wide


@pytest.mark.parametrize(
    ("d", "block_fraction", "k"),
    [(1, 0.1, 1), (3, 0.1, 1), (14, 0.1, 1), (16, 0.1, 2), (200, 0.1, 20), (9, 1.0, 9)],
)
def test_size_of_the_block(d: int, block_fraction: float, k: int) -> None:
    result = block_geometric_median(normal(3, d), block_fraction=block_fraction)
    assert_block(result.block, k, d)


def test_a_whole_block_is_the_geometric_median() -> None:
    updates = normal(7, 30)
    expected = geometric_median(updates)
    for memory_rule in MEMORY_RULES:
        result = block_geometric_median(updates, block_fraction=1.0, memory_rule=memory_rule)
        torch.testing.assert_close(result.vector, expected.vector)
        assert result.residual_ratio == 0.0
        if result.memory is not None:
            assert not waits(result).any()


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("memory_rule", ["robust", "mean", "per-client"])
def test_float64_rows_of_any_magnitude(memory_rule: str, scale: float) -> None:
    updates = normal(5, 40)
    memory = normal(5, 40, seed=1) if memory_rule == "per-client" else normal(1, 40, seed=1)[0]
    options = {"memory_rule": memory_rule, "selection": "top-k"}
    expected = block_geometric_median(updates, memory, **options)
    result = block_geometric_median(updates * scale, memory * scale, **options)
    assert torch.equal(result.block, expected.block)
    torch.testing.assert_close(result.vector / scale, expected.vector, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(waits(result) / scale, waits(expected), rtol=1e-5, atol=1e-6)
    assert result.residual_ratio == pytest.approx(expected.residual_ratio)


@pytest.mark.parametrize("largest", [1e160, 1e200, 1e300])
def test_float64_rows_at_both_ends_of_the_range(largest: float) -> None:
    """One row of 1e300 must not make the others, honest and hostile, look alike."""
    updates = normal(9, 40)
    updates[:3] *= 1e30
    updates[3] *= largest
    result = block_geometric_median(updates, selection="uniform", generator=seeded(0))
    honest = float(updates[4:].norm(dim=1).max())
    assert float(result.vector.norm()) <= 20 * honest
    assert float(waits(result).norm()) <= honest


# --- The memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", BLOCK_SELECTIONS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("with_memory", [False, True])
def test_memory_formulas(selection: str, score: str, with_memory: bool) -> None:
    """Equation 8 and this project's variants, from the reported block and weights."""
    n, d = 6, 40
    updates = normal(n, d, seed=2) * torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]
    for memory_rule in MEMORY_RULES:
        memory = None
        if with_memory and memory_rule == "per-client":
            memory = normal(n, d, seed=3)
        elif with_memory and memory_rule != "none":
            memory = normal(1, d, seed=3)[0]
        result = block_geometric_median(
            updates,
            memory,
            selection=selection,
            score=score,
            memory_rule=memory_rule,
            generator=seeded(0),
        )
        rows = updates.numpy() + (0 if memory is None else memory.numpy())
        residuals = residual_rows(rows, result.block)
        if memory_rule == "none":
            assert result.memory is None
            continue
        tolerance = 1e-9
        if memory_rule == "per-client":
            expected = residuals
        elif memory_rule == "mean":
            expected = residuals.mean(axis=0)
        else:
            waited = residual_rows(rows[:1] - updates.numpy()[:1], result.block)[0]
            weights = oracles.redescending_weights(residual_rows(updates.numpy(), result.block))
            assert weights.min() < 0.5 * weights.max()  # the case is not trivial
            expected = waited + weights @ residual_rows(updates.numpy(), result.block)
            tolerance = 2e-3
        size = np.abs(expected).max()
        np.testing.assert_allclose(waits(result).numpy() / size, expected / size, atol=tolerance)


def test_memories_by_hand() -> None:
    """Residuals 3, 4, 5, 6 and 400: Huber's center is 5.25, the radius 1.25, and 400 is far out.

    With the radius 1.25 around 5.25 the rows pull with -2.25 (cut to -1.25), -1.25, -0.25, 0.75 and
    394.75 (cut to 1.25): the sum is 0.75 - 1.5 = -0.75 short of balance, so the center moves down
    until it balances; the oracle finds where.
    """
    residuals = np.array([3.0, 4.0, 5.0, 6.0, 400.0])
    updates = torch.zeros(5, 3, dtype=torch.float64)
    updates[:, :2] = 1e4 * torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1], [1, 1]])
    updates[:, 2] = torch.from_numpy(residuals)
    result = block_geometric_median(updates, block_fraction=0.67, selection="top-k")
    assert result.block.tolist() == [0, 1]
    weights = oracles.redescending_weights(residuals[:, None])
    assert waits(result).tolist() == pytest.approx([0, 0, weights @ residuals], rel=1e-3)
    assert 4 < float(waits(result)[2]) < 5.1
    mean = block_geometric_median(
        updates, block_fraction=0.67, selection="top-k", memory_rule="mean"
    )
    assert waits(mean).tolist() == pytest.approx([0, 0, residuals.mean()])


@pytest.mark.parametrize("with_memory", [False, True])
def test_mean_memory_loses_nothing(with_memory: bool) -> None:
    """The mean of G is the memory outside the block plus what the block's mean would be."""
    updates = normal(6, 50)
    memory = normal(1, 50, seed=1)[0] if with_memory else None
    result = block_geometric_median(updates, memory, memory_rule="mean", generator=seeded(0))
    mean = updates.mean(dim=0) + (0 if memory is None else memory)
    outside = torch.ones(50, dtype=torch.bool)
    outside[result.block] = False
    torch.testing.assert_close(waits(result)[outside], mean[outside])
    assert not waits(result)[result.block].any()
    assert not result.vector[outside].any()


@pytest.mark.parametrize("memory_rule", ["mean", "per-client"])
@pytest.mark.parametrize("selection", BLOCK_SELECTIONS)
def test_printed_memories_are_added_to_every_row(selection: str, memory_rule: str) -> None:
    updates = normal(6, 50)
    memory = normal(6, 50, seed=1) if memory_rule == "per-client" else normal(1, 50, seed=1)[0]
    options = {"memory_rule": memory_rule, "selection": selection}
    fed = block_geometric_median(updates, memory, generator=seeded(0), **options)
    added = block_geometric_median(updates + memory, generator=seeded(0), **options)
    assert torch.equal(fed.block, added.block)
    torch.testing.assert_close(fed.vector, added.vector, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(waits(fed), waits(added), rtol=1e-5, atol=1e-6)
    assert fed.residual_ratio == pytest.approx(added.residual_ratio)


@pytest.mark.parametrize("memory_rule", ["robust", "mean", "per-client"])
def test_nothing_given_is_modified_or_kept(memory_rule: str) -> None:
    updates = normal(6, 50)
    memory = normal(6, 50, seed=1) if memory_rule == "per-client" else normal(1, 50, seed=1)[0]
    before = updates.clone(), memory.clone()
    for given_memory in (memory, None):
        result = block_geometric_median(updates, given_memory, memory_rule=memory_rule)
        waits(result).fill_(7.0)
        result.vector.fill_(7.0)
        assert torch.equal(updates, before[0])
        assert torch.equal(memory, before[1])


@given(
    st.integers(3, 15),
    st.integers(2, 60),
    st.sampled_from(("sample", "top-k", "uniform")),
    st.floats(0, 30),
    st.integers(0, 2**32 - 1),
)
@few_examples
def test_no_minority_makes_the_robust_memory_larger_than_the_honest_residuals(
    n: int, d: int, selection: str, magnitude: float, seed: int
) -> None:
    """Rows count in full only within a radius that some honest row reaches."""
    rng = np.random.default_rng(seed)
    hostile = (n - 1) // 2
    rows = rng.standard_normal((n, d))
    rows[:hostile] *= 10**magnitude * (rng.random((hostile, d)) < 0.3)
    updates = torch.from_numpy(rows).float()
    result = block_geometric_median(
        updates, block_fraction=0.3, selection=selection, generator=seeded(seed)
    )
    honest = residual_rows(numpy64(updates)[hostile:], result.block)
    largest = np.sqrt((honest**2).sum(axis=1)).max()
    assert oracles.norm(numpy64(waits(result))) <= 3 * largest * (1 + 1e-5)


# --- The algorithm ------------------------------------------------------------------------------


def descend(memory_rule: str, *, attack: bool = True, rounds: int = 250) -> float:
    """Return the final loss over the first one of Algorithm 1 on a noisy quadratic.

    10 clients, 100 parameters, blocks of 10; each round 4 clients, redrawn, send -100 times
    their gradient.
    """
    rng = np.random.default_rng(0)
    generator = seeded(0)
    target = torch.from_numpy(rng.standard_normal(100))
    model = torch.zeros(100, dtype=torch.float64)
    first = float(((model - target) ** 2).sum())
    memory = None
    for _ in range(rounds):
        noise = torch.from_numpy(rng.standard_normal((10, 100)))
        updates = 0.05 * ((model - target) + 0.3 * noise)
        if attack:
            updates[rng.permutation(10)[:4]] *= -100
        result = block_geometric_median(
            updates, memory, memory_rule=memory_rule, generator=generator
        )
        memory = result.memory
        model = model - result.vector
        if float(model.abs().max()) > 1e6:
            return math.inf
    return float(((model - target) ** 2).sum()) / first


def test_attacks_enter_through_the_papers_memory_and_not_through_the_robust_one() -> None:
    robust = descend("robust")
    assert robust < 0.1
    assert descend("mean") > 10 * robust
    assert descend("per-client") > 10 * robust


def test_memory_speeds_up_what_blocks_slow_down() -> None:
    """Without an attack every memory beats none after few rounds."""
    none = descend("none", attack=False, rounds=60)
    for memory_rule in ("robust", "mean", "per-client"):
        assert descend(memory_rule, attack=False, rounds=60) < 0.8 * none


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_fraction": 0.0}, "block_fraction is 0.0; allowed: above 0 to 1"),
        ({"block_fraction": -0.1}, "block_fraction is -0.1; allowed: above 0 to 1"),
        ({"block_fraction": 1.5}, "block_fraction is 1.5; allowed: above 0 to 1"),
        ({"block_fraction": math.nan}, "block_fraction is nan; allowed: above 0 to 1"),
        ({"selection": "best"}, "selection is 'best'; allowed: sample, top-k, uniform"),
        ({"score": "l1"}, "score is 'l1'; allowed: clipped, squared-norm, norm"),
        ({"memory_rule": "all"}, "memory_rule is 'all'; allowed: robust, mean, per-client, none"),
        ({"tol": 0.0}, "tol is 0.0; allowed: above 0"),
        (
            {"memory": torch.zeros(3)},
            r"memory has shape \(3,\); allowed under memory_rule 'robust': \(4,\)",
        ),
        (
            {"memory": torch.zeros(2, 4), "memory_rule": "mean"},
            r"memory has shape \(2, 4\); allowed under memory_rule 'mean': \(4,\)",
        ),
        (
            {"memory": torch.zeros(4), "memory_rule": "per-client"},
            r"memory has shape \(4,\); allowed under memory_rule 'per-client': \(2, 4\)",
        ),
        (
            {"memory": torch.zeros(4), "memory_rule": "none"},
            "memory is given with memory_rule 'none'; allowed: None",
        ),
        ({"memory": torch.tensor([0, math.nan, 0, 0])}, "memory holds a NaN or an infinity"),
        (
            {"memory": torch.full((2, 4), math.inf), "memory_rule": "per-client"},
            "memory holds a NaN or an infinity",
        ),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_geometric_median(torch.ones(2, 4), **options)


@pytest.mark.parametrize("memory_rule", MEMORY_RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_rows_are_named(value: float, memory_rule: str) -> None:
    updates = torch.ones(4, 20)
    updates[1, 13] = value
    with pytest.raises(ValueError, match="updates: row 1 holds a NaN or an infinity"):
        block_geometric_median(updates, memory_rule=memory_rule)


def test_a_selection_that_is_none() -> None:
    with pytest.raises(ValueError, match="selection is 'first'; allowed: sample, top-k, uniform"):
        select_block(torch.ones(4), 2, selection="first")


def test_tiny_rows_are_scored_beside_a_hostile_one() -> None:
    """The largest honest columns are chosen although a liar's norm is 1e20 times theirs."""
    generator = torch.Generator().manual_seed(0)
    updates = 1e-25 * torch.randn(10, 1000, generator=generator)
    updates[:, :50] *= 100
    updates[9] = 1e-3
    result = block_geometric_median(updates, block_fraction=0.05, selection="top-k")
    assert set(result.block.tolist()) == set(range(50))
