"""The figures of a run, read back from what TensorBoard shows."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fl_bgmd.simulations import compare, run
from simulations.config import ConfigError
from simulations.experiment import RunResult

SMALL = {
    **{"dataset": "mnist", "model": "tiny-cnn", "num_clients": 4, "partition": "iid"},
    **{"local_steps": 1, "batch_size": 8, "num_server_rounds": 3, "evaluate_every": 3},
    "log_to": "tensorboard",
}


def figures(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard shows of a folder: by name, the values by round."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_run_of_a_study_has_its_figures_in_its_folder(tmp_path: Path, jobs: int) -> None:
    result = compare(["mean", "gmd"], folder=tmp_path, jobs=jobs, **SMALL)
    for (row, column, seed), of in result.runs.items():
        found = figures(tmp_path / row / column / f"seed-{seed}")
        assert found["accepted"] == {1: 4.0, 2: 4.0, 3: 4.0}
        assert found["server-accuracy"] == {3: pytest.approx(of.final_accuracy)}
        norms = {e["round"]: pytest.approx(e["update-norm"]) for e in of.rounds if e["round"] > 0}
        assert found["update-norm"] == norms
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 2


def test_a_run_that_is_repeated_in_its_folder_shows_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        result = run(strategy="gmd", folder=tmp_path, seed=seed, **SMALL)
    assert RunResult.read(tmp_path).rounds == result.rounds
    [accuracy] = figures(tmp_path)["server-accuracy"].values()
    assert accuracy == pytest.approx(result.final_accuracy)


def test_without_a_folder_there_is_no_place_for_it() -> None:
    for begin in (lambda: run(**SMALL), lambda: compare(["gmd"], **SMALL)):
        with pytest.raises(ConfigError, match="log-to is 'tensorboard' without a folder; allowed"):
            begin()


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path) -> None:
    run(strategy="gmd", folder=tmp_path, **{**SMALL, "log_to": "none"})
    assert (tmp_path / "run.json").is_file()
    assert not list(tmp_path.glob("events*"))
