"""Runs that nothing stops or bends: empty rounds, missing nodes, late replies, the bench."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.strategies import (
    BGMD,
    GMD,
    EmptyRoundsError,
    Krum,
    Mean,
    MissingNodesError,
    MultiKrum,
    RobustStrategy,
    Round,
)
from simulations.grid import InProcessGrid

SIZE = 12


def app_with(update: Any, examples: Any = lambda partition: 1) -> ClientApp:
    """Return a client that moves the model by ``update(round, partition)``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        partition = int(context.node_config["partition-id"])
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        [model] = arrays.to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": examples(partition), "partition-id": partition})
        moved = ArrayRecord([model + update(number, partition)])
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return app


def honest(number: int, partition: int) -> Any:
    """Return an update around (1, ..., 1)."""
    return 1 + 0.3 * np.random.default_rng([number, partition]).standard_normal(SIZE)


def start(strategy: RobustStrategy, grid: InProcessGrid, rounds: int) -> Any:
    return strategy.start(grid, ArrayRecord([np.zeros(SIZE)]), num_rounds=rounds)


def nothing_but_nan(first: int, last: int) -> Any:
    return lambda n, p: np.full(SIZE, np.nan) if first <= n <= last else honest(n, p)


# ---------------------------------------------------------------------------------- empty rounds


def test_too_many_empty_rounds_end_the_run_and_say_why() -> None:
    grid = InProcessGrid(app_with(nothing_but_nan(3, 99)), 4, {})
    with pytest.raises(EmptyRoundsError) as error:
        start(GMD(max_empty_rounds=3, fraction_evaluate=0.0), grid, 20)
    assert str(error.value) == (
        "3 rounds in a row had fewer than 3 valid replies; in round 5: 4 nodes asked, 0 replies "
        "accepted, rejected: non-finite 4 (array '0' leads to a non-finite update)"
    )
    result = error.value.result
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]
    [model] = result.arrays.to_numpy_ndarrays()
    assert np.isfinite(model).all()


def test_a_round_that_moves_starts_the_count_anew() -> None:
    def update(number: int, partition: int) -> Any:
        return np.full(SIZE, np.nan) if number % 3 else honest(number, partition)

    grid = InProcessGrid(app_with(update), 4, {})
    result = start(GMD(max_empty_rounds=3, fraction_evaluate=0.0), grid, 9)
    assert list(result.train_metrics_clientapp) == list(range(1, 10))


def raising(number: int, partition: int) -> Any:
    raise ValueError("x" * 1000 + "\n\x1b[31mno such file: data.csv\x1b[0m")


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_in_which_nothing_was_accepted_fails_at_its_end(rounds: int) -> None:
    evaluated: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        evaluated.append(number)
        return MetricRecord({"number": number})

    strategy = GMD(fraction_evaluate=0.0)
    with pytest.raises(EmptyRoundsError) as error:
        strategy.start(
            InProcessGrid(app_with(raising), 4, {}),
            ArrayRecord([np.zeros(SIZE)]),
            num_rounds=rounds,
            evaluate_fn=evaluate,
        )
    message = str(error.value)
    assert message.startswith(
        f"none of {rounds} rounds moved the model; in round {rounds}: 4 nodes asked, 0 replies "
        "accepted, rejected: error 4 (..."
    )
    assert message.endswith("xxx no such file: data.csv)")
    assert len(message) < 500
    assert evaluated == list(range(rounds + 1))
    assert list(error.value.result.train_metrics_clientapp) == list(range(1, rounds + 1))
    assert error.value.metrics["rejected-error"] == 4


def test_the_log_shows_the_end_of_a_clients_error(caplog: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(app_with(raising), 4, {})
    with pytest.raises(EmptyRoundsError):
        start(GMD(fraction_evaluate=0.0), grid, 1)
    told = [r.getMessage() for r in caplog.records if "rejected the reply" in r.getMessage()]
    assert len(told) == 4
    assert all(line.endswith("x no such file: data.csv") for line in told)


def test_one_round_that_moves_is_enough() -> None:
    result = start(
        GMD(fraction_evaluate=0.0), InProcessGrid(app_with(nothing_but_nan(2, 9)), 4, {}), 5
    )
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]


def test_rounds_that_were_all_undone_are_nothing_either() -> None:
    """The replies are finite, but the step of each round leaves the range of float64."""
    grid = InProcessGrid(app_with(lambda number, partition: np.full(SIZE, -1e308)), 4, {})
    with pytest.raises(EmptyRoundsError, match=r"4 replies accepted.*the new one is not finite"):
        start(Mean(fraction_evaluate=0.0, server_learning_rate=10.0), grid, 2)


def test_no_rounds_and_evaluation_only_are_no_failures() -> None:
    grid = InProcessGrid(app_with(raising), 4, {})
    start(GMD(fraction_evaluate=0.0), grid, 0)
    start(GMD(fraction_train=0.0, fraction_evaluate=0.0), grid, 2)


def test_a_resumed_run_counts_what_it_moved_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0}
    start(GMD(**options), InProcessGrid(app_with(honest), 4, {}), 2)
    start(GMD(**options), InProcessGrid(app_with(raising), 4, {}), 4)


def test_a_resumed_run_that_has_moved_nothing_fails_as_well(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0}
    for rounds in (2, 2, 3):
        with pytest.raises(EmptyRoundsError, match=f"none of {rounds} rounds moved the model"):
            start(GMD(**options), InProcessGrid(app_with(raising), 4, {}), rounds)
    start(GMD(**options), InProcessGrid(app_with(honest), 4, {}), 4)


class Failing(GMD):
    """A rule with a bug."""

    def aggregate(self, current: Round) -> Aggregate:
        raise ValueError("operands could not be broadcast together")


class Scalar(GMD):
    """A rule that returns no vector."""

    def aggregate(self, current: Round) -> Aggregate:
        return Aggregate(current.updates.sum(), weights=None)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Failing, "the rule failed: operands could not be broadcast together"),
        (Scalar, r"the rule failed: its vector has shape \(\); allowed: \(12,\)"),
    ],
)
def test_a_rule_that_fails_in_every_round_ends_the_run(cls: type[GMD], why: str) -> None:
    grid = InProcessGrid(app_with(honest), 4, {})
    with pytest.raises(EmptyRoundsError, match=f"3 rounds in a row came to nothing.*{why}") as e:
        start(cls(max_empty_rounds=3, fraction_evaluate=0.0), grid, 20)
    assert list(e.value.result.train_metrics_clientapp) == [1, 2, 3]


def test_a_model_that_would_not_be_finite_in_every_round_ends_the_run() -> None:
    grid = InProcessGrid(app_with(lambda n, p: 10 * honest(n, p)), 4, {})
    strategy = GMD(server_learning_rate=1e308, max_empty_rounds=3, fraction_evaluate=0.0)
    why = "3 rounds in a row came to nothing.*the new one is not finite"
    with pytest.raises(EmptyRoundsError, match=why) as e:
        start(strategy, grid, 20)
    assert list(e.value.result.train_metrics_clientapp) == [1, 2, 3]
    [model] = e.value.result.arrays.to_numpy_ndarrays()
    assert not model.any()


@pytest.mark.parametrize("step", [float("nan"), -1.0, float("inf")])
def test_an_impossible_learning_rate_of_a_round_is_an_error(step: float) -> None:
    strategy = GMD(server_learning_rate=lambda number: step if number > 1 else 1.0)
    with pytest.raises(ValueError, match=rf"server_learning_rate is {step} in round 2; allowed: 0"):
        start(strategy, InProcessGrid(app_with(honest), 4, {}), 3)


def test_a_round_in_which_the_hostile_may_be_the_majority_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def update(number: int, partition: int) -> Any:
        if number == 2 and partition > 3:
            raise RuntimeError("no disk")
        return honest(number, partition) * (np.nan if number == 3 and partition > 7 else 1)

    grid = InProcessGrid(app_with(update), 10, {})
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        start(GMD(byzantine_fraction=0.2, fraction_evaluate=0.0), grid, 3)
    told = [r.getMessage() for r in caplog.records if "may be hostile" in r.getMessage()]
    [line] = told
    assert line.startswith("round 2: 4 valid replies of 10 asked, of which 2 may be hostile")


@pytest.mark.parametrize("cls", [MultiKrum, GMD, BGMD])
def test_too_few_replies_to_tell_who_lies_are_logged_once(
    cls: type[RobustStrategy], caplog: pytest.LogCaptureFixture
) -> None:
    grid = InProcessGrid(app_with(honest), 2, {})
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        start(cls(fraction_evaluate=0.0, min_valid_replies=1), grid, 3)
    told = "round 1 has 2 valid replies: of fewer than 3 a hostile one cannot be told"
    assert caplog.text.count("a hostile one cannot be told") == caplog.text.count(told) == 1


# -------------------------------------------------------------- what a run leaves and what it takes


class OwnMessages(GMD):
    """Builds its messages by itself, as strategies of one's own may."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.open_round(server_round, arrays, config)
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return (Message(content, node, "train") for node in grid.get_node_ids())


def test_replies_to_messages_of_a_subclass_are_taken() -> None:
    result = start(OwnMessages(fraction_evaluate=0.0), InProcessGrid(app_with(honest), 4, {}), 3)
    rounds = list(result.train_metrics_clientapp.values())
    assert [(m["accepted"], m["rejected"], m["missing"]) for m in rounds] == [(4, 0, 0)] * 3


def test_the_users_configuration_is_left_alone() -> None:
    given = ConfigRecord({"lr": 0.1})
    strategy = GMD(compressor="top-k:0.5", fraction_evaluate=0.0)
    grid = InProcessGrid(app_with(honest), 4, {})
    strategy.start(grid, ArrayRecord([np.zeros(SIZE)]), num_rounds=1, train_config=given)
    assert dict(given) == {"lr": 0.1}


def test_metrics_with_the_servers_names_are_dropped_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = Mean(
        fraction_evaluate=0.0,
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"gap": 9.0, "mine": 1.0}),
    )
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        result = start(strategy, InProcessGrid(app_with(honest), 4, {}), 3)
    metrics = result.train_metrics_clientapp[3]
    assert "gap" not in metrics
    assert metrics["mine"] == 1.0
    assert caplog.text.count("the clients' metrics ['gap'] are dropped") == 1


# --------------------------------------------------------------------------------- missing nodes


def test_too_few_nodes_end_the_run_at_the_deadline() -> None:
    grid = InProcessGrid(app_with(honest), 3, {})
    strategy = GMD(min_available_nodes=5, node_wait_timeout=0.05, fraction_evaluate=0.0)
    with pytest.raises(MissingNodesError, match=r"3 nodes are connected after 0.05 s and 5 are"):
        start(strategy, grid, 1)


def test_or_the_run_continues_with_those_that_are_there(caplog: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(app_with(honest), 3, {})
    strategy = GMD(
        min_available_nodes=5, node_wait_timeout=0.05, too_few_nodes="go-on", fraction_evaluate=0.0
    )
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        result = start(strategy, grid, 2)
    assert [m["accepted"] for m in result.train_metrics_clientapp.values()] == [3, 3]
    assert "3 nodes are connected after 0.05 s and 5 are needed" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_empty_rounds", 0),
        ("node_wait_timeout", 0.0),
        ("too_few_nodes", "wait"),
        ("bench_after", -1),
        ("bench_rounds", 0),
    ],
)
def test_impossible_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed: "):
        GMD(**{name: value})


# ---------------------------------------------------------------------------------- late replies


class SlowGrid(InProcessGrid):
    """Node 1's replies stay away past each round's deadline."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        ids = self.push_messages(sent)
        on_time = {m.metadata.message_id for m in sent if m.metadata.dst_node_id != 1}
        return self.pull_messages([key for key in ids if key in on_time])


def test_late_replies_are_counted_and_enter_no_later_round() -> None:
    """Node 1 alone would move the model by a thousand."""

    def update(number: int, partition: int) -> Any:
        return honest(number, partition) if partition else np.full(SIZE, 1000.0)

    strategy = Mean(fraction_evaluate=0.0)
    result = start(strategy, SlowGrid(app_with(update), 5, {}), 3)
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["accepted"] for m in rounds] == [4, 4, 4]
    assert [m["missing"] for m in rounds] == [1, 1, 1]
    assert [m.get("late", 0) for m in rounds] == [0, 1, 1]
    [model] = result.arrays.to_numpy_ndarrays()
    assert np.abs(model).max() < 10


class ReplayingGrid(InProcessGrid):
    """Hands last round's replies in once more, before this round's."""

    kept: tuple[Message, ...] = ()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if not replies:  # nobody was asked to evaluate
            return []
        before, self.kept = self.kept, tuple(replies)
        return [*before, *replies]


def test_replies_to_another_round_are_rejected() -> None:
    plain = start(Mean(fraction_evaluate=0.0), InProcessGrid(app_with(honest), 3, {}), 3)
    replayed = start(Mean(fraction_evaluate=0.0), ReplayingGrid(app_with(honest), 3, {}), 3)
    assert replayed.arrays == plain.arrays
    rounds = list(replayed.train_metrics_clientapp.values())
    assert [m.get("rejected-unasked", 0) for m in rounds] == [0, 3, 3]


# -------------------------------------------------------------------------------------- the bench

N, HOSTILE = 10, 4


def attack(name: str, who: Any) -> Any:
    """``who(round)`` names the hostile partitions; they send what ``name`` says."""

    def update(number: int, partition: int) -> Any:
        if partition not in who(number):
            return honest(number, partition)
        return {
            "huge": np.full(SIZE, -1e6),
            "nan": np.full(SIZE, np.nan),
            # All on the point that the honest surround: the median's weight is theirs alone.
            "hub": np.ones(SIZE),
            "zero": np.zeros(SIZE),
            # With the client that is copied they are half of all: the median is there.
            "mimic": honest(number, N - 1),
        }[name]

    return update


def fixed(number: int) -> set[int]:
    return set(range(HOSTILE))


def redrawn(number: int) -> set[int]:
    return set(np.random.default_rng(number).choice(N, HOSTILE, replace=False).tolist())


def bench_run(cls: type[RobustStrategy], update: Any, rounds: int, **options: Any) -> Any:
    strategy = cls(
        byzantine_fraction=0.4,
        bench_after=4,
        seed=0,
        bench_rounds=5,
        fraction_evaluate=0.0,
        # A block of one coordinate would have one row at its median, with all the weight.
        **({"block_fraction": 0.5} if cls is BGMD else {}),
        **options,
    )
    return start(strategy, InProcessGrid(app_with(update), N, {}), rounds)


@pytest.mark.parametrize("name", ["huge", "nan"])
@pytest.mark.parametrize("cls", [GMD, BGMD])
def test_those_who_lie_again_and_again_sit_out(
    cls: type[RobustStrategy], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        result = bench_run(cls, attack(name, fixed), 12)
    rounds = list(result.train_metrics_clientapp.values())
    replies = [m["accepted"] + m["rejected"] for m in rounds]
    # Four bad rounds, five on the bench, and they are back for the next four.
    assert replies == [N] * 4 + [N - HOSTILE] * 5 + [N] * 3
    assert [m.get("benched", 0) for m in rounds[3:9]] == [HOSTILE] * 5 + [0]
    for node in range(1, HOSTILE + 1):
        assert f"node {node} sits out 5 rounds: in its last 4 its replies" in caplog.text
    assert f"node {HOSTILE + 1} sits" not in caplog.text


@pytest.mark.parametrize("name", ["huge", "nan", "hub", "zero", "mimic"])
@pytest.mark.parametrize("cls", [GMD, BGMD])
def test_a_mobile_adversary_gets_nobody_honest_benched(
    cls: type[RobustStrategy], name: str
) -> None:
    """Whoever sits out has been hostile in each of its last four rounds."""
    who = redrawn
    result = bench_run(cls, attack(name, who), 60)
    replies = [m["accepted"] + m["rejected"] for m in list(result.train_metrics_clientapp.values())]
    guilty = [
        number
        for number in range(4, 61)
        if set.intersection(*(who(n) for n in range(number - 3, number + 1)))
    ]
    if not guilty:
        assert replies == [N] * 60
    assert sum(N - count for count in replies) <= 5 * len(guilty)


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor"])
@pytest.mark.parametrize("name", ["hub", "zero", "mimic"])
@pytest.mark.parametrize("cls", [GMD, BGMD])
def test_a_fixed_minority_cannot_talk_honest_weights_down(
    cls: type[RobustStrategy], name: str, mixing: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        bench_run(cls, attack(name, fixed), 30, mixing=mixing)
    for node in range(HOSTILE + 1, N + 1):
        assert f"node {node} sits" not in caplog.text


@pytest.mark.parametrize("cls", [Krum, MultiKrum])
def test_rules_that_leave_out_honest_clients_accuse_nobody(cls: type[RobustStrategy]) -> None:
    result = bench_run(cls, lambda n, p: honest(n, p), 20)
    assert all(m["accepted"] == N for m in result.train_metrics_clientapp.values())


def test_the_bench_has_room_for_the_assumed_fraction_only() -> None:
    """Six of ten send NaN: more than four are never out at a time."""
    result = bench_run(GMD, attack("nan", lambda n: set(range(6))), 20)
    rounds = result.train_metrics_clientapp.values()
    assert min(m["accepted"] + m["rejected"] for m in rounds) == N - HOSTILE


def test_the_bench_leaves_enough_for_a_round() -> None:
    """Two of three would be too few for one; so would seven of ten where eight are wanted."""
    grid = InProcessGrid(app_with(attack("nan", lambda n: {0} if n % 3 else set())), 3, {})
    strategy = GMD(byzantine_fraction=0.4, bench_after=1, bench_rounds=5, fraction_evaluate=0.0)
    rounds = list(start(strategy, grid, 6).train_metrics_clientapp.values())
    assert [m["accepted"] + m["rejected"] for m in rounds] == [3] * 6
    update = attack("nan", lambda n: {0, 1, 2} if n < 5 else set())
    result = bench_run(GMD, update, 8, min_valid_replies=N - 2)
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["accepted"] for m in rounds] == [N - 3] * 4 + [N - 2] * 4


def test_those_who_sit_out_count_toward_the_room() -> None:
    """Two send NaN from the first round, two more from the third: there is room for four."""
    update = attack("nan", lambda n: set(range(2 if n < 3 else 4)))
    result = bench_run(GMD, update, 8)
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["accepted"] + m["rejected"] for m in rounds] == [N] * 4 + [N - 2] * 2 + [N - 4] * 2


def test_few_examples_or_rare_data_put_nobody_on_the_bench() -> None:
    def update(number: int, partition: int) -> Any:
        return honest(number, partition) + (2.0 if partition == 9 else 0.0)

    app = app_with(update, lambda partition: 20 if partition == 8 else 600)
    for options in ({"weighting": "examples"}, {"mixing": "nearest-neighbor"}):
        strategy = GMD(
            byzantine_fraction=0.4, bench_after=4, seed=0, fraction_evaluate=0.0, **options
        )
        result = start(strategy, InProcessGrid(app, N, {}), 12)
        assert all(m["accepted"] == N for m in result.train_metrics_clientapp.values())


def test_it_is_off_by_default() -> None:
    grid = InProcessGrid(app_with(attack("nan", fixed)), N, {})
    result = start(GMD(fraction_evaluate=0.0), grid, 20)
    assert all(m["rejected"] == HOSTILE for m in result.train_metrics_clientapp.values())
