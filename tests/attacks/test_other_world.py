"""The lies that leave two worlds open."""

import itertools

import torch

from fl_bgmd.attacks import balanced_rows, other_world


def test_in_the_other_world_the_liars_and_some_honest_clients_have_mean_zero() -> None:
    honest = torch.randn(10, 50, generator=torch.Generator().manual_seed(1)) + 0.3
    lie = other_world(honest, 4)
    kept = balanced_rows(honest @ honest.T, 6)
    assert len(set(kept)) == 6
    torch.testing.assert_close(honest[kept].sum(0) + 4 * lie, torch.zeros(50), atol=1e-5, rtol=0)
    shortest = min(
        float(honest[[*rows]].sum(0).norm()) for rows in itertools.combinations(range(10), 6)
    )
    assert float(honest[kept].sum(0).norm()) <= 1.2 * shortest
    torch.testing.assert_close(other_world(honest, 4, length=1.5), 1.5 * lie)


def test_where_half_may_lie_nobody_is_left_to_balance() -> None:
    honest = torch.ones(3, 5)
    assert not other_world(honest, 3).any()
