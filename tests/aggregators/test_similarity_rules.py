"""FoolsGold and FLAME."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, numpy64, update_matrices
from sklearn.cluster import HDBSCAN

from fl_bgmd.aggregators import build_rule, flame, fools_gold, mean
from fl_bgmd.aggregators.similarity import History


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(rows: np.ndarray) -> np.ndarray:
    """Return all cosines one by one, 0 where a row is 0."""
    n = len(rows)
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            lengths = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
            found[i, j] = rows[i] @ rows[j] / lengths if lengths > 0 else 0.0
    return found


# --- FoolsGold ----------------------------------------------------------------------------------


def algorithm_1(sums: np.ndarray, confidence: float) -> np.ndarray:
    """Return the alphas of the paper's Algorithm 1, client by client."""
    n, cs = len(sums), cosines(sums)
    v = [max(cs[i, j] for j in range(n) if j != i) for i in range(n)]
    alphas = []
    for i in range(n):
        pardoned = [
            cs[i, j] * v[i] / v[j] if v[j] > v[i] > 0 else cs[i, j] for j in range(n) if j != i
        ]
        alphas.append(min(1.0, max(0.0, 1 - max(pardoned))))
    if max(alphas) == 0:
        return np.zeros(n)
    found = []
    for alpha in (a / max(alphas) for a in alphas):
        logit = (
            math.inf if alpha == 1 else -math.inf if alpha == 0 else math.log(alpha / (1 - alpha))
        )
        found.append(min(1.0, max(0.0, confidence * (logit + 0.5))))
    return np.array(found)


@given(
    update_matrices(min_n=2, min_d=2, kinds=("normal", "collinear", "rows_of_all_sizes")),
    st.sampled_from((0.5, 1.0, 2.0)),
)
@few_examples
def test_fools_gold_against_its_algorithm(updates: torch.Tensor, confidence: float) -> None:
    rows = numpy64(updates)
    result = fools_gold(updates, confidence=confidence)
    expected = algorithm_1(rows, confidence) / len(rows)
    assert result.weights is not None
    # Logits of 1 - 1e-16 are any.
    likeness = np.abs(cosines(rows) - np.eye(len(rows)))
    if likeness.max() < 1 - 1e-6:
        np.testing.assert_allclose(result.weights.numpy(), expected, atol=1e-6)
    formed = result.weights.numpy() @ rows
    np.testing.assert_allclose(numpy64(result.vector), formed, atol=1e-6 * np.abs(rows).max())


def test_fools_gold_by_hand() -> None:
    """Two rows that say the same do not count; the third, at right angles to them, does."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    result = fools_gold(rows)
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx([0.0, 0.0, 1 / 3])
    assert result.vector.tolist() == pytest.approx([0.0, 1.0, 0.0])
    # cosine 0.6: 1 - 0.6 = 0.4 of both, over their maximum 1, all at right angles 1.
    apart = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    weights = fools_gold(apart).weights
    assert weights is not None
    expected = (math.log(0.4 / 0.6) + 0.5) / 3
    assert weights.tolist() == pytest.approx([expected, expected, 1 / 3])
    assert torch.equal(fools_gold(torch.ones(4, 3)).vector, torch.zeros(3))
    assert fools_gold(torch.ones(1, 3)).vector.tolist() == [1.0, 1.0, 1.0]


def test_fools_gold_remembers_clients_not_rows() -> None:
    """Those who said the same over the rounds, though not in this one, and whoever was away."""
    first = fools_gold(torch.eye(3)[[0, 0, 1]], nodes=[7, 8, 9])
    assert first.memory.nodes == (7, 8, 9)
    second = fools_gold(torch.eye(3)[[2, 2]], nodes=[9, 8], memory=first.memory)
    assert second.memory.nodes == (9, 8, 7)
    assert second.memory.sums.tolist() == [[0, 1, 1], [1, 0, 1], [1, 0, 0]]
    # Cosine 1 / 2 of the two sums: alike, so 1 - 1/2 over itself is 1 for both.
    assert second.weights is not None
    assert second.weights.tolist() == [0.5, 0.5]
    alone = fools_gold(torch.eye(3)[[2, 2]], nodes=[9, 8])
    assert alone.weights is not None
    assert alone.weights.tolist() == [0.0, 0.0]


def test_fools_gold_of_many_and_what_it_does_not_stop() -> None:
    rows = normal(10, 3_000)
    rows[:4] = rows[0] + 0.01 * rows[:4]
    weights = fools_gold(rows).weights
    assert weights is not None
    assert (weights[:4] == 0).all()
    assert (weights[4:] > 0.09).all()
    rows[9] = 1e20 * rows[9]
    assert fools_gold(rows).vector.abs().max() > 1e18
    note = build_rule("fools-gold").notes(10)["fools-gold"]
    assert note.startswith("fools-gold finds hostile clients by their likeness")


def test_fools_gold_refuses_a_memory_of_another_width() -> None:
    memory = History(torch.zeros(2, 4), (0, 1))
    with pytest.raises(ValueError, match="memory has 4 values a client; allowed: 3"):
        fools_gold(torch.ones(2, 3), memory=memory)
    with pytest.raises(ValueError, match="confidence is 0; allowed: above 0"):
        fools_gold(torch.ones(2, 3), confidence=0)
    rows = torch.ones(3, 2)
    rows[1, 0] = math.nan
    with pytest.raises(ValueError, match="updates: row 1 holds a NaN or an infinity"):
        fools_gold(rows)


# --- FLAME --------------------------------------------------------------------------------------


@given(update_matrices(min_n=3, min_d=3, kinds=("normal", "collinear", "two_far_clusters")))
@few_examples
def test_flame_against_the_clustering_of_scikit_learn(updates: torch.Tensor) -> None:
    rows = numpy64(updates)
    n = len(rows)
    distances = np.round(1 - cosines(rows), 12)
    clustering = HDBSCAN(
        min_cluster_size=n // 2 + 1,
        min_samples=1,
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    )
    expected = clustering.fit_predict(np.maximum(distances, distances.T)) == 0
    result = flame(updates)
    kept = result.kept.numpy()
    if len(np.unique(distances)) > n * (n - 1) / 2:  # one tie, that of each row with itself
        assert kept.tolist() == expected.tolist()
    norms = np.linalg.norm(rows, axis=1)
    middle = np.median(norms)
    clipped = [
        row * min(1.0, middle / size) for row, size in zip(rows[kept], norms[kept], strict=True)
    ]
    error = np.abs(numpy64(result.vector) - np.mean(clipped, axis=0)).max()
    assert error <= 1e-6 * max(middle, 1.0)


def test_flame_by_hand() -> None:
    """Three of five are within 10 degrees steps; norms 1, 1, 4, 2, 2 have the median 2."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 20.0, 120.0, 240.0]))
    sizes = torch.tensor([1.0, 1.0, 4.0, 2.0, 2.0])
    rows = sizes[:, None] * torch.stack((angles.cos(), angles.sin()), dim=1)
    result = flame(rows)
    assert result.kept.tolist() == [True, True, True, False, False]
    assert result.weights is not None
    assert result.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 6, 0, 0])
    assert flame(torch.ones(1, 2)).vector.tolist() == [1.0, 1.0]
    assert flame(torch.ones(6, 2)).kept.all()
    assert torch.equal(flame(torch.zeros(4, 2)).vector, torch.zeros(2))


@pytest.mark.parametrize("kind", ["huge", "turned", "together"])
@pytest.mark.parametrize("n", [5, 9, 14])
def test_flame_leaves_out_a_minority_that_points_elsewhere(n: int, kind: str) -> None:
    hostile = (n - 1) // 2
    rows = normal(n, 500, n) + 1.0
    rows[:hostile] = {
        "huge": 1e30 * normal(hostile, 500, 1),
        "turned": -rows[:hostile],
        "together": normal(1, 500, 2).expand(hostile, -1),
    }[kind]
    assert not flame(rows).kept[:hostile].any()


def test_the_noise_of_flame_is_drawn_and_off_by_default() -> None:
    rows = normal(8, 20_000) + 1.0
    plain = flame(rows)
    assert torch.equal(plain.vector, flame(rows).vector)
    noisy = flame(rows, noise=0.01, generator=torch.Generator().manual_seed(0))
    again = flame(rows, noise=0.01, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy.vector, again.vector)
    assert noisy.weights is None
    middle = float(np.median(rows.norm(dim=1).numpy()))
    deviation = float((noisy.vector - plain.vector).std())
    assert deviation == pytest.approx(0.01 * middle, rel=0.03)
    assert build_rule("flame").draws == []
    assert build_rule("flame:noise=0.01").draws == ["noise"]
    with pytest.raises(ValueError, match="noise is -1; allowed: 0 or more"):
        flame(rows, noise=-1)


def test_flame_of_equal_directions_is_norm_clipping() -> None:
    rows = torch.ones(5, 3) * torch.tensor([[1.0], [2.0], [3.0], [8.0], [9.0]])
    expected = mean(torch.ones(5, 3) * torch.tensor([[1.0], [2.0], [3.0], [3.0], [3.0]])).vector
    torch.testing.assert_close(flame(rows).vector, expected)
