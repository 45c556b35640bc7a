"""The papers' bounds by hand, and beside what is measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_bgmd.aggregators.norms import is_proven, least_delta, most_hostile
from simulations.papers import ghosh_rates, local_steps
from simulations.papers.ghosh_problems import Curve, Regression
from simulations.papers.ghosh_rates import Sample, left
from simulations.papers.local_steps import LocalSteps, run
from simulations.papers.quadratic import Quadratic
from simulations.papers.theory import (
    averaged,
    beside,
    bound_of_distance,
    bound_of_gradient,
    bound_of_memory,
    bound_of_perturbation,
    descend,
    draw_bgmd,
    draw_ghosh,
    measured_delta,
    speedups,
)

HAND = Quadratic(good=10, corrupt=5, mu=0.5, smooth=2.0, share_of_step=0.5)
"""gamma = 1/4, 1 - alpha = 1/2."""


def test_bounds_by_hand() -> None:
    # xi = 1/2: 4 (1 - xi^2) / xi^2 = 12
    assert bound_of_memory(HAND, 3.0, 0.5) == pytest.approx(12 / 16 * 9)
    expected = 96 / 16 * 9 / 0.25 * 13 + 2 * 0.01 / (100 * 0.25)
    assert bound_of_perturbation(HAND, 3.0, 0.5, 0.1) == pytest.approx(expected)
    gap = 1.25 / 2  # the curvatures' mean over 2, at a distance of 1
    assert HAND.initial_gap == pytest.approx(gap)
    gradient = 8 * gap / (0.25 * 7) + 8 * 2 * 0.25 * 9 + 48 * 4 / 16 * 9 * 3
    gradient += 2304 * 9 / 0.25 * 13 + 48 * 0.01 / (100 * 0.25 / 16)
    assert bound_of_gradient(HAND, 3.0, 0.5, 0.1, np.array([7.0])) == pytest.approx(gradient)
    distance = 16 * gap / (0.25 * 0.25) * (1 - 0.5 * 0.25 / 2) ** 7 + 16 * 2 * 0.25 * 9 / 0.25
    distance += 80 / 16 * 9 * 4 * 3 / 0.25 + 3072 * 9 / (0.25 * 0.25) * 13
    distance += 64 * 0.01 / (0.25 * 100 * 0.25 / 16)
    assert bound_of_distance(HAND, 3.0, 0.5, 0.1, np.array([7.0])) == pytest.approx(distance)


SHORT = Quadratic(iterations=80)


@pytest.mark.parametrize("corrupt", [0, 4])
def test_what_is_measured_is_below_its_bound(corrupt: int) -> None:
    problem = replace(SHORT, corrupt=corrupt)
    run = averaged(problem, 2)
    for name, (values, bound) in beside(problem, run, 2).items():
        assert values.shape == bound.shape == (80,), name
        assert (values < bound).all(), name
    assert 0 < run.residual.mean() < 1 - problem.block / problem.dimensions


def test_the_printed_memory_lets_the_corrupt_in_and_the_guarded_one_does_not() -> None:
    printed, guarded = (
        descend(replace(SHORT, corrupt=4, memory=memory), 0) for memory in ("mean", "robust")
    )
    assert guarded.gradient[-20:].mean() < 0.2 * printed.gradient[-20:].mean()


def test_the_measured_memory_is_that_of_algorithm_1() -> None:
    """With all coordinates in the block nothing waits, and the step is the rows' median."""
    whole = descend(replace(SHORT, block=100, iterations=5), 0)
    assert whole.memory.tolist() == [0.0] * 5
    assert whole.residual.tolist() == [0.0] * 5
    assert (descend(replace(SHORT, iterations=5), 0).memory > 0).all()


def test_conditions_of_ghosh_by_hand() -> None:
    assert least_delta(0.1, 0.1, 1) == pytest.approx(1 - 0.81 + 0.4 - 0.09 + 0.004)
    assert least_delta(0.1, 0.1, 2) == pytest.approx(1 - 0.81 / 1.21 + 0.4 - 0.08 + 0.004)
    # Without compression: 2 alpha^2 / (1 - alpha)^2 < 0.107, alpha / (1 - alpha) < 0.2313
    assert is_proven(1.0, 0.187, 0.187, 3)
    assert not is_proven(1.0, 0.189, 0.189, 3)
    assert most_hostile(1.0, 3) == pytest.approx(0.187)
    assert (
        most_hostile(0.05, 2) < most_hostile(0.5, 2) < most_hostile(0.5, 1) < most_hostile(1.0, 1)
    )


SMALL = Regression(examples=1000, dimensions=60, iterations=30)


def test_delta_is_that_of_l1_sign() -> None:
    """``|x|_1^2 / (d |x|^2)``, Section 3, example 4."""
    task = SMALL.draw(Curve("", 0, 0), torch.Generator().manual_seed(0))
    rows = task.gradients(task.start)
    expected = (rows.abs().sum(1) ** 2 / (60 * rows.square().sum(1))).min()
    assert measured_delta(SMALL, 2, 0)[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_smaller_block_saves_more() -> None:
    factors = [float(line["factor F"]) for line in speedups(dimensions=500)]
    assert factors == sorted(factors)
    # k / d <= 1 / F, since b eps^2 is not below 0
    for line in speedups(dimensions=500):
        assert float(line["k / d"]) <= float(line["1 / F"]) + 0.05


def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"printed": replace(SHORT, iterations=5)}
    monkeypatch.setattr("simulations.papers.theory.CASES", cases)
    monkeypatch.setattr(local_steps, "CASES", {"quantized": LocalSteps(iterations=20)})
    monkeypatch.setattr(ghosh_rates, "SWEEPS", {"n": ("examples", (5, 10), Sample(10, 5, 3))})
    seen: list[str] = []
    table = draw_bgmd(tmp_path / "bgmd", seeds=1, done=seen.append).read_text()
    assert "| printed " in table
    assert table.count("| quantized ") == 3
    table = draw_ghosh(tmp_path / "ghosh", seeds=1, done=seen.append, problem=SMALL).read_text()
    assert "(Theorem 3) of hostile workers" in table
    assert "l1-sign, error feedback" in table
    assert len(seen) == 1 + 1 + 7 + 1
    drawn = {p.name for p in tmp_path.glob("*/*.png")}
    assert drawn == {"bgmd.png", "ghosh.png", "rates.png"}


def test_without_liars_what_is_left_is_the_error_of_all_examples_together() -> None:
    """Descent of everybody's gradients ends at least squares on all m n examples: d / (m n)."""
    alone = Sample(workers=20, examples=50, dimensions=5, share=0.0)
    expected = 5 / (20 * 50)
    errors = [left(alone, seed) for seed in range(40)]
    assert np.mean(errors) == pytest.approx(expected, rel=0.5)
    fed = [left(replace(alone, compressed=True, feedback=True), seed) for seed in range(40)]
    assert np.mean(fed) == pytest.approx(np.mean(errors), rel=0.1)
    bare = [left(replace(alone, compressed=True), seed) for seed in range(40)]
    assert np.mean(bare) > 1.2 * np.mean(errors)


def test_liars_leave_an_error_that_more_workers_do_not_mend() -> None:
    few, many = (Sample(workers=m, dimensions=5, share=0.2) for m in (20, 200))
    assert left(many, 0) > 0.3 * left(few, 0)
    assert left(many, 0) > 10 * left(replace(many, share=0.0), 0)


def test_one_local_step_is_bgmd_and_several_are_bounded_likewise() -> None:
    """With so many levels that nothing is rounded, H = 1 is Algorithm 1 on the same noise."""
    fine = LocalSteps(levels=32767, local_steps=1, iterations=60)
    plain = descend(Quadratic(iterations=60), 0)
    alone = run(fine, 0)
    assert alone.gradient == pytest.approx(float(plain.gradient.mean()), rel=0.1)
    assert fine.xi == pytest.approx(0.2, rel=1e-3)
    outcome = run(replace(fine, local_steps=5, corrupt=4, memory="robust"), 0)
    sigma = outcome.moment**0.5
    assert 0.0 < outcome.gradient < local_steps.bound_of_gradient(fine, sigma)
    assert 0.0 < outcome.distance < local_steps.bound_of_distance(fine, sigma)


def test_bounds_of_local_steps_by_hand() -> None:
    problem = LocalSteps(
        dimensions=100, block=100, good=10, corrupt=5, mu=0.5, smooth=2.0,
        share_of_step=0.5, iterations=8, local_steps=2, levels=32767,
    )  # fmt: skip
    spread = 1 + 4 * (1 - problem.xi**2) / problem.xi**2
    gradient = 8 * problem.initial_gap / (0.25 * 8) + 8 * 2 * 0.25 * 9
    gradient += 24 * 4 / 16 * 4 * 9 * spread + 2304 / 2 * 4 * 9 / 0.25 * spread
    assert local_steps.bound_of_gradient(problem, 3.0) == pytest.approx(gradient)
    distance = 16 * problem.initial_gap / 0.25 * (1 - 0.5 * 0.25 / 2) ** 8
    distance += 16 * 2 * 0.25 * 9 + 40 * 4 / 16 * 4 * 9 * spread + 3072 * 4 * 9 / 0.25 * spread
    assert local_steps.bound_of_distance(problem, 3.0) == pytest.approx(distance / 0.25)
