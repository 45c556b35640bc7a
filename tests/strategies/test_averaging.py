"""An average of the last models: what is evaluated, kept and resumed, and what clients train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flower_messages import same_bits
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_bgmd.checkpoints import CheckpointError
from fl_bgmd.filed import folder_of
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import BGMD, GMD, Mean, RobustStrategy
from simulations.config import strategy_for, validate
from simulations.grid import InProcessGrid
from strategies.averaging import ModelAverage

START = torch.tensor([4.0, -3.0, 0.5])


def clients(trained: list[torch.Tensor]) -> ClientApp:
    """Clients that turn the model's sign, as one does that a step too long throws about."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content["arrays"].to_torch_state_dict()
        trained.append(sent["w"])
        arrays = {"w": -0.9 * sent["w"], "seen": sent["seen"] + 10}
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        first = float(message.content["arrays"].to_torch_state_dict()["w"][0])
        metrics = MetricRecord({"first": first, "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run(strategy: RobustStrategy, num_rounds: int = 6, **more: Any) -> Result:
    arrays = ArrayRecord({"w": START.clone(), "seen": torch.tensor(0)})
    grid = InProcessGrid(clients(more.pop("trained", [])), 4, {})
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds, **more)


def weights(arrays: ArrayRecord) -> torch.Tensor:
    return arrays.to_torch_state_dict()["w"]


def options(**more: Any) -> dict[str, Any]:
    return {"fraction_evaluate": 0.0, "seed": 1, "byzantine_fraction": 0.0, **more}


def test_the_mean_of_all_models_is_the_share_of_one() -> None:
    result = run(GMD(**options(model_average=1.0)))
    models = [(-0.9) ** number * START for number in range(1, 7)]
    torch.testing.assert_close(weights(result.arrays), torch.stack(models).mean(0))
    # Counters, as of batch norm, are averaged too and stay integers.
    assert result.arrays.to_torch_state_dict()["seen"].item() == 35


def test_an_average_forgets_what_is_long_ago() -> None:
    average, share = ModelAverage(0.25), 0.25
    expected = 0.0
    for number in range(1, 201):
        value = float(number < 100) + float(number == 2)
        kept = average.after(number, ArrayRecord({"w": torch.full((3,), value)}))
        expected += (value - expected) / max(share * number, 1.0)
        if number <= 4:
            assert float(weights(kept)[0]) == value
    assert float(weights(kept)[0]) == pytest.approx(expected, abs=1e-5)
    assert 0.0 < expected < 0.1  # the half that is long ago would be 0.5 of a plain mean


def test_without_it_the_last_model_is_what_there_is() -> None:
    record = ArrayRecord({"w": START})
    assert ModelAverage(0.0).after(7, record) is record
    last = run(GMD(**options())).arrays
    assert same_bits(run(GMD(**options(model_average=0.0))).arrays, last)
    # A sixth of six rounds is one.
    assert same_bits(run(GMD(**options(model_average=1 / 6))).arrays, last)
    assert not same_bits(run(GMD(**options(model_average=0.3))).arrays, last)


def test_clients_train_the_last_model_and_everyone_evaluates_the_average() -> None:
    trained: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(weights(arrays))
        return MetricRecord({"first": float(weights(arrays)[0])})

    given = options(model_average=0.5) | {"fraction_evaluate": 1.0}
    result = run(Mean(**given), trained=trained, evaluate_fn=evaluate)
    for number, model in enumerate(trained):  # four clients a round
        torch.testing.assert_close(model, (-0.9) ** (number // 4) * START)
    average = START
    for number in range(1, 7):
        average = average.lerp((-0.9) ** number * START, 1 / max(0.5 * number, 1.0))
        torch.testing.assert_close(seen[number], average)
        here = result.evaluate_metrics_clientapp[number]
        assert here["first"] == pytest.approx(float(average[0]), rel=1e-5)
    assert torch.equal(weights(result.arrays), seen[-1])


def test_half_precision_models_are_averaged_in_single() -> None:
    average = ModelAverage(0.01)
    for number in range(1, 2001):
        value = 1.0 if number == 1 else 1.01
        kept = average.after(number, ArrayRecord({"w": torch.full((2,), value).half()}))
    # A step of a two-thousandth of 0.01 would be rounded away in float16.
    assert weights(kept).dtype == torch.float16
    assert float(weights(kept)[0]) == pytest.approx(1.01, abs=1e-3)


@pytest.mark.parametrize("rows", ["memory", "file"])
def test_a_resumed_run_continues_its_average(tmp_path: Path, rows: str) -> None:
    given = options(model_average=0.3, rows=rows, rows_dir="/var/tmp")
    whole = run(BGMD(**given)).arrays
    assert (folder_of(whole) is not None) == (rows == "file")
    saved = {"checkpoints": tmp_path}
    half = run(BGMD(**given, **saved), 3).arrays
    ends: list[torch.Tensor] = []

    def stop(number: int, result: Result) -> bool:
        ends.append(weights(result.arrays))
        return False

    resumed = run(BGMD(**given, **saved), should_stop=stop).arrays
    assert same_bits(resumed, whole)
    assert torch.equal(ends[0], weights(half))  # what the checkpoint's round came to
    # Nothing is left to do: the result is the average all the same.
    assert same_bits(run(BGMD(**given, **saved)).arrays, whole)
    with pytest.raises(CheckpointError, match=r"strategy.model_average was 0.3 and is 0.0"):
        run(BGMD(**options(rows=rows, rows_dir="/var/tmp"), **saved))


def test_a_second_run_begins_anew() -> None:
    strategy = GMD(**options(model_average=0.3))
    first = run(strategy).arrays
    assert same_bits(run(strategy).arrays, first)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(OptionError, match="model_average is "):
        GMD(model_average=share)


def test_it_is_a_key_of_a_run() -> None:
    strategy = strategy_for(validate({"model-average": 0.25}), fraction_evaluate=1.0)
    assert strategy.model_average == 0.25
