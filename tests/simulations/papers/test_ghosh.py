"""The experiments of Ghosh et al., at a fraction of their size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_bgmd.compression import Sign
from simulations.cli import main
from simulations.papers.ghosh import GHOSH, FigureSet, l1_sign, reproduce, run_curve
from simulations.papers.ghosh_problems import Curve, Network, Regression

SMALL = Regression(examples=1000, dimensions=60, iterations=80)


def final(curve: Curve) -> float:
    return float(np.mean([run_curve(curve, seed, SMALL)[-1] for seed in range(3)]))


def test_rows_are_compressed_as_by_the_compressor() -> None:
    rows = torch.randn(5, 33)
    rows[0, :2] = torch.tensor([0.0, -0.0])
    one_by_one = [Sign().decode(Sign().encode(row), 33) for row in rows]
    torch.testing.assert_close(l1_sign(rows), torch.stack(one_by_one), rtol=1e-6, atol=0)


def test_thresholding_beats_averaging_by_orders_of_magnitude() -> None:
    assert final(Curve("", 20, 22)) < 0.05 * final(Curve("", 20, 0))


def test_thresholding_beats_the_majority_vote() -> None:
    assert final(Curve("", 20, 22)) < final(Curve("", 20, 0, rule="majority"))


def test_error_feedback_is_faster() -> None:
    plain, fed = (run_curve(Curve("", 10, 12, feedback=f), 0, SMALL) for f in (False, True))
    assert plain[0] == fed[0]
    assert fed[20] < plain[20]


def test_algorithm_2_as_printed_has_the_step_size_twice() -> None:
    """A literal transcription; l1-sign is homogeneous, so that it is the shorter step."""
    curve, problem = Curve("", 4, 6, rule="printed"), replace(SMALL, iterations=15)
    found = run_curve(curve, 0, problem)
    task = problem.draw(curve, (generator := torch.Generator().manual_seed(0)))
    w, e, gamma = task.start, torch.zeros(200, 60), problem.step
    for t in range(15):
        assert found[t] == pytest.approx(task.measure(w), rel=1e-5)
        gradients = task.gradients(w)
        gradients[:4] += 10**0.5 * torch.randn(4, 60, generator=generator)
        p = gamma * gradients + e
        q = p.abs().mean(1, keepdim=True) * torch.where(p < 0, -1.0, 1.0)
        e = p - q
        kept = q.norm(dim=1).argsort()[: 200 - 6]
        w = w - gamma / 194 * q[kept].sum(0)
    once = run_curve(
        replace(curve, rule="threshold", feedback=True), 0, replace(problem, step=0.04)
    )
    np.testing.assert_allclose(found, once, rtol=1e-4)


def test_the_model_stays_in_w_at_a_step_that_is_too_long() -> None:
    problem = replace(SMALL, step=3.0)
    history = run_curve(Curve("", 20, 22, feedback=True), 0, problem)
    assert history.max() < problem.radius + history[0]
    assert history[-1] > history[0]


def test_figures_6_and_7_are_of_the_attacks_of_section_8() -> None:
    attacks = {
        figure: {curve.attack for curve in curves}
        for experiment in GHOSH.values()
        for figure, (_, curves) in experiment.figures.items()
        if figure.startswith(("figure-6", "figure-7"))
    }
    assert attacks == {
        "figure-6a": {"gaussian"},
        "figure-6b": {"label-shift"},
        "figure-7a": {"ascent"},
        "figure-7b": {"ascent"},
    }


@pytest.mark.parametrize("attack", ["gaussian", "ascent"])
def test_thresholding_converges_with_many_hostile_workers(attack: str) -> None:
    curve = Curve("", 60, 62, attack=attack)
    history = run_curve(curve, 0, SMALL)
    assert history[-1] < 0.3 * history[0]
    assert history[-1] < 0.5 * run_curve(Curve("", 60, 0, attack=attack), 0, SMALL)[-1]


def test_lies_after_the_compression_are_what_was_said() -> None:
    """One step of Algorithm 1 by hand: 4 of 200 send -0.9 g, as long as l1-sign of it."""
    problem = replace(SMALL, iterations=1)
    found = run_curve(Curve("", 4, 6, attack="ascent-after"), 0, problem)
    task = problem.draw(Curve("", 4, 6), torch.Generator().manual_seed(0))
    rows = task.gradients(task.start)
    sent = l1_sign(rows)
    sent[:4] = -0.9 * rows[:4] / rows[:4].norm(dim=1, keepdim=True) * sent[:4].norm(dim=1)[:, None]
    kept = sent.norm(dim=1).argsort()[: 200 - 6]
    expected = task.measure(task.start - problem.step / 194 * sent[kept].sum(0))
    assert found[1] == pytest.approx(expected, rel=1e-5)
    noisy, compressed = (
        run_curve(Curve("", 4, 6, attack=attack), 0, problem)[1]
        for attack in ("gaussian-after", "gaussian")
    )
    assert noisy != compressed


def test_a_seed_fixes_a_curve() -> None:
    curve = Curve("", 10, 12)
    first, second, other = (run_curve(curve, seed, SMALL) for seed in (1, 1, 2))
    assert first.tolist() == second.tolist()
    assert first[0] != other[0]


def test_figures_and_table_are_written_and_a_sweep_resumes(tmp_path: Path) -> None:
    calls: list[str] = []
    figures = GHOSH["ghosh-regression"].figures
    experiment = FigureSet(Regression(examples=400, dimensions=10, iterations=3), figures)
    path = tmp_path / "curves.jsonl"
    reproduce(experiment, tmp_path, seeds=1, jobs=1, done=calls.append)
    first = path.read_text()
    path.write_text(first + first.splitlines()[0][:50])
    results = reproduce(experiment, tmp_path, seeds=2, jobs=1, done=calls.append)
    assert len(experiment.runs(2)) == 2 * 17
    assert (len(calls), calls[-1]) == (17 + 17, "17 of 17 runs")
    assert path.read_text().startswith(first)
    assert len(path.read_text().splitlines()) == 34 + 1
    assert set(results) == set(figures)
    for figure, (_, curves) in figures.items():
        assert [*results[figure]] == [curve.label for curve in curves]
        assert all(histories.shape == (2, 4) for histories in results[figure].values())
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    # The same run stands behind the curves that two figures share.
    shared = results["figure-1"]["20 hostile, threshold 22"]
    assert np.array_equal(shared, results["figure-6a"]["10 % hostile"])
    assert "| figure-6a | 40 % hostile " in (tmp_path / "table.md").read_text()


def network(curve: Curve, seed: int = 0) -> list[float]:
    return run_curve(curve, seed, Network(workers=10, iterations=8, batch=20)).tolist()


def test_a_network_learns_under_each_lie_behind_the_threshold() -> None:
    for attack in ("gaussian", "ascent", "label-shift", "random-labels"):
        history = network(Curve("", 2, 3, attack=attack))
        assert history[0] == pytest.approx(2.3, abs=0.1)
        assert history[-1] < 0.6 * history[0], attack
    assert network(Curve("", 2, 0))[-1] > 2.3


def test_hostile_labels_are_of_their_attack() -> None:
    problem = Network(workers=20)
    tasks = {
        attack: problem.draw(Curve("", 5, 6, attack=attack), torch.Generator().manual_seed(1))
        for attack in ("gaussian", "label-shift", "random-labels")
    }
    true = tasks["gaussian"]._labels
    shares = tasks["gaussian"]._shares
    for attack, task in tasks.items():
        assert torch.equal(task._labels[shares[5:]], true[shares[5:]]), attack
    assert torch.equal(tasks["label-shift"]._labels[shares[:5]], 9 - true[shares[:5]])
    kept = (tasks["random-labels"]._labels == true)[shares[:5]].float().mean()
    assert kept == pytest.approx(0.1, abs=0.01)
    assert sorted(shares.flatten().tolist()) == [*range(60000)]


def test_gradients_are_those_of_one_worker_after_the_other() -> None:
    task = Network(workers=3, batch=500).draw(Curve("", 0, 0), torch.Generator().manual_seed(1))
    task._shares = task._shares[:, :500]  # a mini-batch is all that a worker has
    rows = task.gradients(task.start)
    model = task._model
    for row, share in zip(rows, task._shares, strict=True):
        loss = torch.nn.functional.cross_entropy(model(task._images[share]), task._labels[share])
        alone = torch.autograd.grad(loss, [*model.parameters()])
        flat = torch.cat([part.flatten() for part in alone])
        assert float((row - flat).norm()) < 1e-4 * float(flat.norm())


def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "ghosh-regression", "--seeds=0"]) == 2
    assert "seeds is 0; allowed: 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--no-run", "--epochs=1", "--device=cpu", "--backend=vectorized", "--jobs=2"]
)
def test_options_without_a_bearing_are_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "fig-toy", option]) == 2
    key = option.split("=")[0].removeprefix("--")
    assert f"{key} is given with fig-toy" in capsys.readouterr().err
