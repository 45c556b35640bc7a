"""The regression experiment of Ghosh et al., at a tenth of its size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_bgmd.compression import Sign
from simulations.cli import main
from simulations.ghosh import FIGURES, Curve, Setup, count_runs, l1_sign, reproduce, run_curve

SMALL = Setup(examples=1000, dimensions=60, iterations=80)


def final(curve: Curve) -> float:
    return float(np.mean([run_curve(curve, seed, SMALL)[-1] for seed in range(3)]))


def test_rows_are_compressed_as_by_the_compressor() -> None:
    rows = torch.randn(5, 33)
    one_by_one = [Sign().decode(Sign().encode(row), 33) for row in rows]
    torch.testing.assert_close(l1_sign(rows), torch.stack(one_by_one), rtol=1e-6, atol=0)


def test_thresholding_beats_averaging_by_orders_of_magnitude() -> None:
    assert final(Curve("", 20, 22)) < 0.05 * final(Curve("", 20, 0))


def test_thresholding_beats_the_majority_vote() -> None:
    assert final(Curve("", 20, 22)) < final(Curve("", 20, 0, compressor="sign"))


def test_error_feedback_is_faster() -> None:
    plain, fed = (run_curve(Curve("", 10, 12, feedback=f), 0, SMALL) for f in (False, True))
    assert plain[0] == fed[0]
    assert fed[20] < plain[20]


@pytest.mark.parametrize("attack", ["gaussian", "ascent"])
def test_thresholding_converges_with_many_hostile_workers(attack: str) -> None:
    curve = Curve("", 60, 62, attack=attack)
    history = run_curve(curve, 0, SMALL)
    assert history[-1] < 0.3 * history[0]
    assert history[-1] < 0.5 * run_curve(Curve("", 60, 0, attack=attack), 0, SMALL)[-1]


def test_a_seed_fixes_a_curve() -> None:
    curve = Curve("", 10, 12)
    first, second, other = (run_curve(curve, seed, SMALL) for seed in (1, 1, 2))
    assert first.tolist() == second.tolist()
    assert first[0] != other[0]


def test_figures_and_table_are_written(tmp_path: Path) -> None:
    calls: list[int] = []
    setup = Setup(examples=400, dimensions=10, iterations=3)
    results = reproduce(tmp_path, seeds=2, jobs=1, done=lambda: calls.append(1), setup=setup)
    assert len(calls) == count_runs(2) == 2 * 15
    assert set(results) == set(FIGURES)
    for figure, (_, curves) in FIGURES.items():
        assert [*results[figure]] == [curve.label for curve in curves]
        assert all(histories.shape == (2, 4) for histories in results[figure].values())
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    # The same run stands behind the curves that two figures share.
    shared = results["figure-1"]["20 hostile, threshold 22"]
    assert np.array_equal(shared, results["figure-6a"]["10 % hostile"])
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert len(lines) == count_runs(2)
    assert "| figure-6a | 40 % hostile |" in (tmp_path / "table.md").read_text()


def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "ghosh-regression", "--seeds=0"]) == 2
    assert "seeds is 0; allowed: 1 or more" in capsys.readouterr().err
