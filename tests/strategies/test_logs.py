"""What a run says: its settings, its results, and when more clients look hostile than expected."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_messages import needed, regression_app, regression_model
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

import fl_bgmd.strategies
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.strategies import BGMD, CMD, GMD, Krum, Mean, MultiKrum, RobustStrategy, options_of
from simulations.grid import InProcessGrid
from strategies.reporting import table, values_of
from strategies.settings import FLOWERS_OPTIONS

CLASSES = sorted(
    (
        found
        for name in fl_bgmd.strategies.__all__
        if isinstance(found := getattr(fl_bgmd.strategies, name), type)
        and issubclass(found, RobustStrategy)
        and found is not RobustStrategy
    ),
    key=lambda cls: cls.__name__,
)


def run(strategy: FedAvg, nodes: int = 4, rounds: int = 2, **options: Any) -> Result:
    grid = InProcessGrid(regression_app(), nodes, {})
    return strategy.start(grid, regression_model(), num_rounds=rounds, **options)


def measured(number: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"accuracy": number / 10})


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterable[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "flwr"):
        yield caplog


# ------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_and_its_value_is_logged(
    cls: type[RobustStrategy], log: pytest.LogCaptureFixture
) -> None:
    run(cls(byzantine_fraction=0.125, **needed(cls)), nodes=5, rounds=1)
    for name in options_of(cls).keys() - FLOWERS_OPTIONS.keys():
        assert f"── {name}: " in log.text
    assert "── byzantine_fraction: 0.125\n" in log.text


def test_the_values_are_those_in_force() -> None:
    found = values_of(BGMD(memory="none", block_fraction=0.5, compressor="top-k:0.5"))
    assert found["memory"] == "none"
    assert found["block_fraction"] == 0.5
    assert found["compressor"] == "top-k:0.5"
    assert found["min_valid_replies"] == 3
    assert values_of(MultiKrum(num_selected=2))["num_selected"] == 2
    assert "num_selected" not in values_of(Krum())  # nobody can choose it
    assert values_of(fl_bgmd.strategies.QBGMD())["compressor"] == "qsgd"


def test_an_option_of_a_subclass_is_logged(log: pytest.LogCaptureFixture) -> None:
    class Own(GMD):
        def __init__(self, *, patience: int = 3, **options: Any) -> None:
            super().__init__(**options)

    run(Own(patience=7), rounds=1)
    assert "Starting Own strategy" in log.text
    assert "── patience: 7\n" in log.text


def test_the_start_says_what_flower_says_of_fedavg(log: pytest.LogCaptureFixture) -> None:
    run(BGMD(train_metrics_aggr_fn=lambda contents, key: MetricRecord({"n": len(contents)})))
    for text in (
        "Starting BGMD strategy:",
        "Number of rounds: 2",
        "Model: 9 parameters, ",
        "ConfigRecord (train): (empty!)",
        "ConfigRecord (evaluate): (empty!)",
        "Minimum nodes: train (2) | evaluate (2)",
        "train metrics: by the given function",
        "evaluate metrics: the median of the clients' values, not weighted",
    ):
        assert log.text.count(text) == 1, text


# ---------------------------------------------------------------------------- the results


def test_results_are_labeled(log: pytest.LogCaptureFixture) -> None:
    run(GMD(), evaluate_fn=measured)
    assert log.text.count("Initial global evaluation: {'accuracy': 0.0}") == 1
    assert log.text.count("Aggregated train MetricRecord: {'loss': ") == 2
    assert log.text.count("aggregate_evaluate: accepted 4 replies, rejected 0") == 2
    assert log.text.count("Aggregated evaluate MetricRecord: {'loss': ") == 2
    assert log.text.count("Global evaluation: {'accuracy': 0.2}") == 1


def test_long_lists_are_counted_not_printed(log: pytest.LogCaptureFixture) -> None:
    result = run(GMD(), nodes=12, rounds=1)
    assert len(result.train_metrics_clientapp[1]["client-weights"]) == 12
    assert "'client-weights': '[12 values]'" in log.text


def test_a_table_ends_the_run(log: pytest.LogCaptureFixture) -> None:
    result = run(GMD(), evaluate_fn=measured)
    lines = [record.getMessage().strip("\t") for record in log.records]
    last = lines[lines.index("Final results:") :]
    assert "Strategy execution finished in " in log.text
    [start] = [i for i, line in enumerate(last) if line.lstrip().startswith("round  ")]
    assert last[start].split("  ")[-1] == "server accuracy"
    for name in ("train loss", "accepted", "rejected", "evaluate loss"):
        assert f"  {name}" in last[start]
    rows = [line.split() for line in last[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert rows[0][-1] == "0"
    assert rows[0][1] == "-"
    loss = result.evaluate_metrics_clientapp[2]["loss"]
    assert f"{loss:.4g}" in rows[2]


def test_the_table_of_a_long_run_is_short() -> None:
    rounds = {number: MetricRecord({f"m{i}": 1.0 for i in range(30)}) for number in range(1, 501)}
    lines = table(Result(train_metrics_clientapp=rounds))
    assert len(lines) == 1 + 20 + 1
    assert lines[1].split()[0] == "1"
    assert lines[-2].split()[0] == "500"
    assert lines[-1] == "and 18 metrics more"
    assert max(map(len, lines)) < 150


# ------------------------------------------------------------------------- who looks hostile


def app_of(lies: dict[int, float], examples: Any = None) -> ClientApp:
    """Partitions send ``lies`` times an honest update, NaN times it included."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        [model] = message.content["arrays"].to_numpy_ndarrays()
        update = 1 + 0.3 * np.random.default_rng(partition).standard_normal(model.shape)
        record = ArrayRecord([model + lies.get(partition, 1.0) * update])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


def told_of(strategy: RobustStrategy, lies: dict[int, float], log: Any) -> list[str]:
    log.clear()
    grid = InProcessGrid(app_of(lies), 10, {})
    strategy.start(grid, ArrayRecord([np.zeros(20)]), num_rounds=3)
    return [text for r in log.records if "look hostile" in (text := r.getMessage())]


@pytest.mark.parametrize("cls", [GMD, BGMD, CMD])
@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor"])
def test_more_who_look_hostile_than_expected_are_said_once(
    cls: type[RobustStrategy], mixing: str, log: pytest.LogCaptureFixture
) -> None:
    strategy = cls(fraction_evaluate=0.0, mixing=mixing)
    nan = float("nan")
    for lies in ({0: -100, 1: -100, 2: 50, 3: 30}, {0: nan, 1: nan, 2: nan, 3: -100}):
        [told] = told_of(strategy, lies, log)  # a second run says it again
        assert told.startswith("byzantine_fraction is 0.25; 4 of 10 clients look hostile")


def test_as_many_as_expected_are_not_worth_a_word(log: pytest.LogCaptureFixture) -> None:
    assert not told_of(GMD(fraction_evaluate=0.0), {0: -100, 1: float("nan")}, log)
    assert not told_of(GMD(fraction_evaluate=0.0), dict.fromkeys(range(4), 5.0), log)


def test_averaging_expects_nobody(log: pytest.LogCaptureFixture) -> None:
    [told] = told_of(Mean(fraction_evaluate=0.0), {0: -100}, log)
    assert told.startswith("Mean tolerates no hostile client; 1 of 10 clients look hostile")


# ------------------------------------------------------------------------------- the seed


@pytest.mark.parametrize(
    ("strategy", "drawn"),
    [
        (BGMD(seed=7), "blocks"),
        (BGMD(seed=7, selection="uniform", mixing="bucketing"), "blocks and buckets"),
        (GMD(seed=7, mixing="bucketing"), "buckets"),
        (GMD(seed=7, fraction_train=0.9), "nodes"),
    ],
)
def test_a_seed_that_is_given_makes_public_what_it_draws(
    strategy: RobustStrategy, drawn: str, log: pytest.LogCaptureFixture
) -> None:
    run(strategy, nodes=5)
    told = [r.getMessage() for r in log.records if "seed is given" in r.getMessage()]
    assert len(told) == 1
    assert f"foresee the {drawn} that it draws" in told[0]


@pytest.mark.parametrize(
    "strategy", [BGMD(), GMD(seed=7), BGMD(seed=7, selection="top-k"), GMD(mixing="bucketing")]
)
def test_a_seed_that_draws_nothing_or_is_nobodys_is_not_worth_a_word(
    strategy: RobustStrategy, log: pytest.LogCaptureFixture
) -> None:
    run(strategy, nodes=5)
    assert "seed is given" not in log.text


# -------------------------------------------------------------------------- an early end


def stop_after(last: int, seen: list[int]) -> Any:
    def should_stop(number: int, result: Result) -> bool:
        seen.append(number)
        assert number in result.train_metrics_clientapp
        assert number in result.evaluate_metrics_serverapp
        return number == last

    return should_stop


def test_should_stop_ends_the_run_regularly(log: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    result = run(GMD(), rounds=9, evaluate_fn=measured, should_stop=stop_after(3, seen))
    assert seen == [1, 2, 3] == list(result.train_metrics_clientapp)
    assert "should_stop ends the run after round 3 of 9" in log.text
    assert "Final results:" in log.text
    assert result.arrays == run(GMD(), rounds=3).arrays


def test_what_was_stopped_is_kept_and_stays_stopped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=100)
    seen: list[int] = []
    stopped = run(
        GMD(checkpoints=checkpoints, seed=3),
        *(4, 9),
        evaluate_fn=measured,
        should_stop=stop_after(2, seen),
    )
    again = run(
        GMD(checkpoints=checkpoints, seed=3),
        *(4, 9),
        evaluate_fn=measured,
        should_stop=stop_after(2, seen),
    )
    assert seen == [1, 2, 2]
    assert again.arrays == stopped.arrays
    gone_on = run(GMD(checkpoints=checkpoints, seed=3), 4, 3, evaluate_fn=measured)
    assert list(gone_on.train_metrics_clientapp) == [1, 2, 3]


def test_late_replies_are_pulled_by_position() -> None:
    """Flower 1.43 renames the argument: ``message_ids`` takes ``reply_to_message_ids``'s place."""

    class Renamed(InProcessGrid):
        pulled = 0

        def pull_messages(self, ids: Iterable[str], /) -> Iterable[Message]:
            self.pulled += 1
            return super().pull_messages(ids)

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            found = list(super().send_and_receive(messages, timeout=timeout))
            return found[1:]

    grid: Grid = Renamed(regression_app(), 5, {})
    strategy = GMD(fraction_evaluate=0.0)
    strategy.start(grid, regression_model(), num_rounds=2)
    assert isinstance(grid, Renamed)
    assert grid.pulled > 0
