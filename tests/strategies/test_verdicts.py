"""What the server made of each client: in the result, as JSON lines, in checkpoints, in the log."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_bgmd.strategies import GMD, MultiKrum, RobustStrategy, Verdict, Verdicts
from simulations.grid import InProcessGrid
from strategies.survey import Sketch, Survey
from strategies.verdicts import Heard

SIZE = 12


def update(number: int, partition: int) -> Any:
    """Return an update: partition 0 sends NaN but in round 2, partition 1 a long one."""
    if partition == 0 and number != 2:
        return np.full(SIZE, np.nan)
    drawn = np.random.default_rng([number, partition]).standard_normal(SIZE)
    return 100 * drawn if partition == 1 else 1 + 0.1 * drawn


def grid() -> InProcessGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        partition = int(context.node_config["partition-id"])
        [model] = message.content["arrays"].to_numpy_ndarrays()  # type: ignore[union-attr]
        metrics = MetricRecord({"num-examples": 1, "partition-id": partition})
        moved = ArrayRecord([model + update(number, partition)])
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return InProcessGrid(app, 6, {})


def start(strategy: RobustStrategy, rounds: int) -> Any:
    return strategy.start(grid(), ArrayRecord([np.zeros(SIZE)]), num_rounds=rounds)


def test_each_client_has_a_verdict_in_each_round() -> None:
    result = start(GMD(fraction_evaluate=0.0), 4)
    assert len(result.verdicts) == 24
    assert [v.verdict for v in result.verdicts if v.partition == 0] == [
        "non-finite",
        "accepted",
        "non-finite",
        "non-finite",
    ]
    before = np.zeros(SIZE)
    for number in range(1, 5):
        weights = result.train_metrics_clientapp[number]["client-weights"]
        found = [v for v in result.verdicts if v.round == number and v.accepted]
        assert [v.weight for v in found] == weights
        rows = np.array([-update(number, v.partition) for v in found])
        assert [v.norm for v in found] == pytest.approx(np.linalg.norm(rows, axis=1))
        # Rows of 12 columns are not sketched.
        moved = np.array(weights) @ rows
        assert [v.distance for v in found] == pytest.approx(
            np.linalg.norm(rows - moved, axis=1), rel=1e-6
        )
        before -= moved
    assert result.arrays.to_numpy_ndarrays()[0] == pytest.approx(before)


def test_lines_of_json_and_the_frame_keep_all_bits_of_a_node_id() -> None:
    verdicts = Verdicts()
    node = 2**64 - 1
    verdicts.add(3, [Heard(node, 5)], norms=[1.5], distances=[float("inf")], benched={node})
    [line] = verdicts.json_lines()
    assert json.loads(line)["node"] == str(node)
    assert Verdict.from_json(line) == verdicts[0] == verdicts[-1]
    assert verdicts[0].benched
    assert verdicts[0].weight is None
    assert verdicts[0].distance == pytest.approx(np.finfo(np.float64).max)
    [row] = verdicts.frame.to_dict("records")
    assert (row["node"], row["partition"], row["round"]) == (node, 5, 3)


def test_old_rounds_go_and_the_counts_stay() -> None:
    verdicts = Verdicts(most=25)
    for number in range(1, 11):
        bad = [Heard(17, None, "non-finite")] if number > 1 else [Heard(17)]
        verdicts.add(number, [*bad, *(Heard(node) for node in range(9))], asked=[99])
    assert {v.round for v in verdicts} == {9, 10}
    assert verdicts.dropped == 8 * 11
    assert verdicts.summary() == [
        "node 99 rejected in 10 of 10 rounds: no-reply",
        "node 17 rejected in 9 of 10 rounds: non-finite",
    ]
    again = Verdicts.from_dict(verdicts.to_dict())
    assert list(again) == list(verdicts)
    assert again.summary() == verdicts.summary()


def test_a_resumed_run_has_the_verdicts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fraction_evaluate": 0.0, "seed": 3}
    whole = start(GMD(**options), 4)
    start(GMD(**options, checkpoints=tmp_path), 2)
    resumed = start(GMD(**options, checkpoints=tmp_path), 4)
    assert list(resumed.verdicts) == list(whole.verdicts)
    assert resumed.verdicts.summary() == whole.verdicts.summary()


def test_the_log_ends_with_who_was_rejected(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.INFO, "flwr"):
        start(GMD(fraction_evaluate=0.0), 4)
    assert "node 1 rejected in 3 of 4 rounds: non-finite" in caplog.text


def test_benched_nodes_have_verdicts_as_well() -> None:
    strategy = MultiKrum(bench_after=1, bench_rounds=1, fraction_evaluate=0.0, seed=1)
    found = [(v.verdict, v.benched) for v in start(strategy, 3).verdicts if v.node == 1]
    assert found == [("non-finite", True), ("benched", False), ("non-finite", True)]


def _rows(shape: tuple[int, int]) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=draw) + torch.linspace(0, 3, shape[0])[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(10, 100_000), (3, 32_768), (70, 5_000), (2, 1)])
def test_norms_and_distances_of_rows_that_stay_are_exact(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = _rows(shape).to(dtype)
    vector, kept = rows.float().mean(0), rows.clone()
    survey = Survey.of(rows, vector)
    assert torch.equal(rows, kept)
    exact = rows.double().norm(dim=1).numpy()
    np.testing.assert_allclose(survey.norms, exact, rtol=1e-5)
    assert survey.distances is not None
    far = (rows.double() - vector.double()).norm(dim=1).numpy()
    np.testing.assert_allclose(survey.distances, far, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(Survey.of(rows, None).norms, exact, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 0.0])
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 0.09, 0.11, 1.0])
def test_distances_of_rows_that_nearly_agree_are_no_rounding_errors(
    apart: float, scale: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    vector = scale * torch.randn(200_000, generator=draw)
    rows = vector + apart * scale * torch.randn((4, 200_000), generator=draw)
    survey = Survey.of(rows, vector)
    exact = rows.double().norm(dim=1).numpy()
    far = (rows.double() - vector.double()).norm(dim=1).numpy()
    np.testing.assert_allclose(survey.norms, exact, rtol=1e-5)
    np.testing.assert_allclose(survey.distances, far, rtol=1e-3 if apart > 0.1 else 1e-6)


@pytest.mark.parametrize("shape", [(10, 100_000), (3, 32_768), (70, 5_000), (2, 1)])
def test_distances_of_rows_that_are_overwritten_are_right_to_a_few_percent(
    shape: tuple[int, int],
) -> None:
    rows = _rows(shape)
    vector, kept = rows.mean(0), rows.clone()
    sketch = Sketch.of(rows, 2**63 - 1)
    assert torch.equal(rows, kept)
    exact = rows.double().norm(dim=1).numpy()
    far = (rows - vector).double().norm(dim=1).numpy()
    rows.zero_()
    survey = sketch.survey(vector)
    np.testing.assert_allclose(survey.norms, exact, rtol=1e-5)
    assert survey.distances is not None
    np.testing.assert_allclose(survey.distances, far, rtol=0.12, atol=1e-6)


def test_rows_no_wider_than_a_sketch_are_kept() -> None:
    rows = _rows((70, 2048))
    vector = rows.mean(0)
    far = (rows - vector).double().norm(dim=1).numpy()
    sketch = Sketch.of(rows, 1)
    rows.zero_()
    np.testing.assert_allclose(sketch.survey(vector).distances, far, rtol=1e-6)


@pytest.mark.parametrize("overwritten", [False, True])
def test_norms_beyond_float32_are_told(overwritten: bool) -> None:
    rows = torch.full((3, 5000), -1e30)
    rows[2] = 1
    survey = Sketch.of(rows, 0).survey(rows[2]) if overwritten else Survey.of(rows, rows[2])
    np.testing.assert_allclose(survey.norms, [1e30 * 5000**0.5] * 2 + [5000**0.5], rtol=1e-5)
    assert survey.distances is not None
    assert survey.distances[2] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(survey.distances).all()


def test_on_round_gets_floats_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: dict[int, dict[str, float]] = {}

    def on_round(number: int, figures: dict[str, float]) -> None:
        told[number] = figures
        raise OSError("the tracker is away")

    with caplog.at_level(logging.WARNING, "flwr"):
        start(GMD(fraction_evaluate=0.0, on_round=on_round), 3)
    assert list(told) == [1, 2, 3]
    assert told[1]["rejected-non-finite"] == 1.0
    assert all(type(value) is float for value in told[3].values())
    assert {"waiting-seconds", "screening-seconds", "rule-seconds", "evaluation-seconds"} <= set(
        told[2]
    )
    assert caplog.text.count("the tracker is away") == 1


def test_distances_can_be_left_out() -> None:
    result = start(GMD(fraction_evaluate=0.0, verdict_distances=False), 2)
    assert {v.distance for v in result.verdicts} == {None}
    assert all(v.norm for v in result.verdicts if v.accepted)
