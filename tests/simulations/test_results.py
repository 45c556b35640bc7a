"""What Python and notebooks get of a run and a study."""

import numpy as np
import pytest

from fl_bgmd.simulations import compare, run
from simulations.comparison import StudyResult
from simulations.experiment import RunResult

SMALL = {
    **{"dataset": "mnist", "model": "tiny-cnn", "num_clients": 5, "partition": "iid"},
    **{"local_steps": 1, "batch_size": 8, "num_server_rounds": 2},
}


@pytest.fixture(scope="module")
def study() -> StudyResult:
    both = ["none", "bit-flip"]
    return compare(["mean", "gmd"], both, byzantine_fraction=0.2, seeds=2, **SMALL)


def test_a_study_draws_its_rounds_and_its_accuracies(study: StudyResult) -> None:
    none, attacked = study.figure("update-norm", "bytes").axes
    assert [panel.get_title() for panel in (none, attacked)] == ["none", "bit-flip"]
    curve = next(line for line in attacked.lines if line.get_label() == "gmd")
    runs = [study.runs["gmd", "bit-flip", seed] for seed in (0, 1)]
    expected = np.mean([[e["update-norm"] for e in of.rounds[1:]] for of in runs], axis=0)
    np.testing.assert_allclose(curve.get_ydata(), expected)
    np.testing.assert_allclose(curve.get_xdata(), [runs[0].bytes_up_to(n) / 1e6 for n in (1, 2)])
    heat = study.heat_map().axes[0]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["none", "bit-flip", "worst"]


def test_what_cannot_be_drawn_is_named(study: StudyResult) -> None:
    for result in (study, study.runs["gmd", "none", 0]):
        allowed = "rounds, seconds, cpu-seconds, bytes"
        with pytest.raises(ValueError, match=f"axis is 'hours'; allowed: {allowed}"):
            result.figure(axis="hours")
        with pytest.raises(ValueError, match=r"metric is 'acuracy'; allowed: .*accuracy.*loss"):
            result.figure("acuracy")


def test_notebooks_show_a_table_and_a_picture(study: StudyResult) -> None:
    for result, cells in ((study, ["none", "gmd"]), (study.runs["gmd", "none", 0], ["finished"])):
        page = result._repr_html_()
        assert page.count("<table") == page.count("<img") == 1
        for cell in cells:
            assert f">{cell}<" in page
        assert "mnist, tiny-cnn, 5 clients (iid)" in page
        assert len(repr(result)) < 1000


def test_what_is_told_is_no_markup() -> None:
    config = run(strategy="gmd", **SMALL).config
    failed = RunResult(config, [], "failed", "ValueError: <script>alert(1)</script>")
    page = failed._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "failed" in page
    assert "<img" not in page  # there is nothing to draw


def test_verdicts_are_a_frame_after_reading_too(study: StudyResult) -> None:
    read, fresh = study.runs["gmd", "none", 0], run(strategy="gmd", **SMALL)
    assert list(read.verdict_frame) == list(fresh.verdict_frame)
    assert read.verdict_frame["norm"].tolist() == fresh.verdict_frame["norm"].tolist()
    assert len(fresh.verdict_frame) == 10
