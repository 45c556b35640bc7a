"""The rounds of a run: Flower's ``Strategy.start`` with checkpoints and an end when nothing moves.

Same calls in the same order as :meth:`flwr.serverapp.strategy.Strategy.start`.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fl_bgmd.arrivals import arriving, handed_to
from fl_bgmd.checkpoints import CheckpointError
from fl_bgmd.replies import arrays_from_state, arrays_to_state

from .averaging import ModelAverage
from .declared import options_of
from .errors import EmptyRoundsError, RunEndedError
from .live import Live
from .reporting import log_end, log_metrics, log_start, values_of
from .storage import model_in_file
from .verdicts import RobustResult, Verdicts

if TYPE_CHECKING:
    from .robust import RobustStrategy

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
StopFn = Callable[[int, Result], bool]

LOG = logging.getLogger("flwr.fl_bgmd")


def run_rounds(
    strategy: "RobustStrategy",
    grid: Grid,
    arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
    evaluate_fn: EvaluateFn | None,
    should_stop: StopFn | None,
) -> RobustResult:
    """Run the rounds from the newest checkpoint, or from the first, to ``num_rounds``.

    Ends sooner where ``should_stop`` says so of a round, also of the one a checkpoint is of.
    """
    checkpoints = strategy.settings.folder
    log_start(strategy, arrays, num_rounds, train_config, evaluate_config)
    result = RobustResult(verdicts=strategy.verdicts)
    identity = _identity(strategy, arrays, train_config)
    first, has_moved, stopped = 1, False, False
    average, averaged = ModelAverage(strategy.settings.model_average), {}
    if checkpoints is not None and (found := checkpoints.load(identity)) is not None:
        done, state = found
        if done > num_rounds:
            raise CheckpointError(
                f"num_rounds is {num_rounds} and {checkpoints.folder} has a checkpoint of round "
                f"{done}; allowed: {done} or more, or another folder"
            )
        arrays = arrays_from_state(state.pop("arrays"))
        result = _to_result(state["history"], arrays)
        averaged = state.get("average", {})  # older checkpoints have none
        strategy.load_state_dict(state["strategy"])
        if "verdicts" in state:  # older checkpoints have none
            strategy.verdicts = result.verdicts = Verdicts.from_dict(state["verdicts"])
        has_moved = bool(state["moved"])
        if hasattr(grid, "load_state_dict"):
            if state["grid"] is None:
                raise CheckpointError(
                    f"the checkpoint of round {done} in {checkpoints.folder} is of a run on a grid "
                    f"without a state; allowed with {type(grid).__name__}: its own"
                )
            grid.load_state_dict(state["grid"])
        first = done + 1
        LOG.info("resumed from the checkpoint of round %s in %s", done, checkpoints.folder)
    elif evaluate_fn is not None:
        evaluated = evaluate_fn(0, arrays)
        _keep(result.evaluate_metrics_serverapp, 0, evaluated, "Initial global evaluation")

    started, live = time.monotonic(), Live(strategy.settings.on_round)
    try:
        arrays = model_in_file(arrays, strategy.settings)
        if first > 1:
            average.load_state_dict(averaged, arrays)
            result.arrays = average.now(arrays)
            stopped = should_stop is not None and should_stop(first - 1, result)
        kept = result.arrays or arrays
        number = first - 1
        while number < num_rounds and not stopped:
            number += 1
            LOG.info("")
            LOG.info("[ROUND %s/%s]", number, num_rounds)
            messages = list(strategy.configure_train(number, arrays, train_config, grid))
            strategy.sent(messages)
            clock = time.perf_counter()
            replies = arriving(grid, messages, timeout)
            replies = handed_to(strategy.aggregate_train, replies)
            waited = time.perf_counter() - clock  # more follows where they are taken one by one
            try:
                moved, metrics = strategy.aggregate_train(number, replies)
            except EmptyRoundsError as error:
                _keep(result.train_metrics_clientapp, number, error.metrics, _TRAINED)
                raise
            if moved is not None:
                has_moved = has_moved or moved is not arrays
                arrays = moved
                kept = result.arrays = average.after(number, arrays)
            if metrics is not None:
                here = metrics.get("waiting-seconds", 0.0)
                metrics["waiting-seconds"] = waited + (here if isinstance(here, float) else 0.0)
            _keep(result.train_metrics_clientapp, number, metrics, _TRAINED)
            clock = time.perf_counter()
            messages = list(strategy.configure_evaluate(number, kept, evaluate_config, grid))
            strategy.sent(messages)
            replies = arriving(grid, messages, timeout)
            replies = handed_to(strategy.aggregate_evaluate, replies)
            metrics = strategy.aggregate_evaluate(number, replies)
            _keep(result.evaluate_metrics_clientapp, number, metrics, _EVALUATED)
            if evaluate_fn is not None:
                evaluated = evaluate_fn(number, kept)
                _keep(result.evaluate_metrics_serverapp, number, evaluated, "Global evaluation")
            if number in result.train_metrics_clientapp:
                seconds = time.perf_counter() - clock
                result.train_metrics_clientapp[number]["evaluation-seconds"] = seconds
            live.tell(number, result)
            stopped = should_stop is not None and should_stop(number, result)
            if checkpoints is not None and (
                number % checkpoints.every == 0 or number == num_rounds or stopped
            ):
                state = {
                    "arrays": arrays_to_state(arrays),
                    "average": average.state_dict(),
                    "moved": has_moved,
                    "history": _from_result(result),
                    "strategy": strategy.state_dict(),
                    "verdicts": strategy.verdicts.to_dict(),
                    "grid": grid.state_dict() if hasattr(grid, "state_dict") else None,
                }
                checkpoints.save(number, state, identity)
        if stopped:
            LOG.info("should_stop ends the run after round %s of %s", number, num_rounds)
        if number > 0 and strategy.fraction_train > 0 and not has_moved:
            raise EmptyRoundsError(
                f"none of {number} rounds moved the model; {strategy.failure}".rstrip("; "),
                result.train_metrics_clientapp.get(number, MetricRecord()),
            )
    except RunEndedError as error:
        error.result = result
        raise
    log_end(result, number - first + 1, time.monotonic() - started)
    return result


_TRAINED = "Aggregated train MetricRecord"
_EVALUATED = "Aggregated evaluate MetricRecord"


def _keep(
    history: dict[int, MetricRecord], number: int, metrics: MetricRecord | None, label: str
) -> None:
    """Put a round's metrics into the history and the log."""
    if metrics is not None:
        history[number] = metrics
        log_metrics(label, metrics)


def _identity(
    strategy: "RobustStrategy", arrays: ArrayRecord, train_config: ConfigRecord
) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that uses it.

    Strategy, model, and what clients are asked to do: ``train_config`` as it was given, before a
    round writes into it.
    """
    options = options_of(type(strategy), strategy.rule.rule.kind)
    settings = {
        f"strategy.{name}": value
        for name, value in values_of(strategy).items()
        if not options[name].is_operation and isinstance(value, bool | int | float | str | None)
    }
    return settings | {
        "strategy": type(strategy).__name__,
        "strategy.rule": str(strategy.rule),
        **{f"train_config.{key}": _as_json(value) for key, value in train_config.items()},
        "model": {key: f"{array.dtype}{list(array.shape)}" for key, array in arrays.items()},
    }


def _as_json(value: Any) -> Any:
    """Return a value of a ConfigRecord for a comparison: bytes are no JSON."""
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


_HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


def _from_result(result: Result) -> dict[str, Any]:
    return {
        name: {number: dict(metrics) for number, metrics in getattr(result, name).items()}
        for name in _HISTORIES
    }


def _to_result(state: dict[str, Any], arrays: ArrayRecord) -> RobustResult:
    histories: dict[str, Any] = {
        name: {number: MetricRecord(metrics) for number, metrics in state[name].items()}
        for name in _HISTORIES
    }
    return RobustResult(arrays=arrays, **histories)
