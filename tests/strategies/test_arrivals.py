"""Replies as they arrive: screened alone and released, the same result whatever the order."""

import gc
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    MALFORMED,
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_model,
    same_bits,
    train_message,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_bgmd.arrivals import Arrivals, arriving, as_they_arrive
from fl_bgmd.attacks import AttackPlan, build_attacks
from fl_bgmd.strategies import BGMD, GMD, Mean, RobustStrategy
from simulations.adversary import AdversarialGrid
from simulations.grid import InProcessGrid
from strategies.intake import move_rows

NODES = 7


def hostile_app(events: list[str] | None = None, hostile: Iterable[int] = ()) -> ClientApp:
    """Return a client of a small model; some send NaN, and who trains is noted."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if events is not None:
            events.append(f"trained {context.node_id}")
        if partition in hostile:
            reply = MALFORMED["nan"].build(message)
            reply.content["metrics"]["partition-id"] = partition  # type: ignore[index]
            return reply
        update = random_update(plain_model(), partition)
        return honest_reply(message, update, partition=partition)

    return app


class PolledGrid(Grid):
    """Flower's push and pull over clients of this process: replies come in some order.

    Parameters
    ----------
    order : sequence of int
        Node ids, as their replies come; nodes that are not named never reply.
    a_look : int
        How many come between two looks.
    """

    pull_interval = 0.001

    def __init__(self, app: ClientApp, order: Iterable[int], a_look: int = 1) -> None:
        self.inner = InProcessGrid(app, NODES, {})
        self.order, self.a_look = list(order), a_look
        self.sent: dict[int, str] = {}
        self.looks = 0
        self.asked: list[list[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        numbers = list(self.inner.push_messages(sent))
        self.sent |= {m.metadata.dst_node_id: key for m, key in zip(sent, numbers, strict=True)}
        self.looks = 0
        return numbers

    def pull_messages(self, ids: Iterable[str], /) -> Iterable[Message]:
        asked = list(ids)
        self.asked.append(asked)
        self.looks += 1
        there = [self.sent[node] for node in self.order[: self.looks * self.a_look]]
        return self.inner.pull_messages([key for key in there if key in asked])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise AssertionError("replies are pulled")

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        return self.inner.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()


def run(
    grid: Grid, strategy: RobustStrategy | None = None, rounds: int = 2, **options: Any
) -> tuple[ArrayRecord, list[dict[str, Any]]]:
    """Return a run's model and its rounds' metrics but for the time they took."""
    own = strategy or BGMD(seed=3, fraction_evaluate=0.0, min_available_nodes=NODES)
    result = own.start(grid, plain_model(), num_rounds=rounds, **options)
    return result.arrays, [
        {key: value for key, value in metrics.items() if not key.endswith("-seconds")}
        for metrics in result.train_metrics_clientapp.values()
    ]


@pytest.mark.parametrize("hostile", [(), (0, 4)])
@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1], [4, 1, 7, 2, 6]])
def test_the_order_of_arrival_changes_no_bit(order: list[int], hostile: tuple[int, ...]) -> None:
    """Against all replies at once, handed over as a list, and a grid that is asked for all."""

    class AllAtOnce(InProcessGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            replies = super().send_and_receive(messages, timeout=timeout)
            return [r for r in replies if r.metadata.src_node_id in order][::-1]

    expected, figures = run(AllAtOnce(hostile_app(hostile=hostile), NODES, {}))
    for a_look in (1, 3):
        grid = PolledGrid(hostile_app(hostile=hostile), order, a_look)
        arrays, metrics = run(grid, timeout=60.0 if len(order) == NODES else 0.05)
        assert same_bits(arrays, expected)
        assert metrics == figures


def test_one_reply_is_screened_before_the_next_client_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The work of early replies is done while late clients train: they run when pulled."""
    events: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("rejected the reply"):
                events.append(f"screened {record.args[0]}")  # type: ignore[index]

    log, handler = logging.getLogger("flwr.fl_bgmd"), Noting()
    log.addHandler(handler)
    try:
        grid = InProcessGrid(hostile_app(events, hostile=(0, 2, 6)), NODES, {})
        run(grid, rounds=1)
    finally:
        log.removeHandler(handler)
    assert events == [
        *("trained 1", "screened 1", "trained 2", "trained 3", "screened 3"),
        *("trained 4", "trained 5", "trained 6", "trained 7", "screened 7"),
    ]


@pytest.mark.parametrize("polled", [False, True])
def test_a_reply_is_released_before_the_next_one_is_made(polled: bool) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        reply = honest_reply(message, random_update(plain_model(), context.node_id))
        return reply

    class Watched(InProcessGrid):
        def _deliver(self, message: Message) -> Message:
            reply = super()._deliver(message)
            made.append(weakref.ref(reply.content))
            return reply

    grid: Any = Watched(app, NODES, {})
    if polled:
        inner, grid = grid, PolledGrid(app, range(1, NODES + 1))
        grid.inner = inner
    keeping = GMD(
        fraction_evaluate=0.0,
        min_available_nodes=NODES,
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"n": len(contents)}),
    )
    _, [figures] = run(grid, keeping, rounds=1)
    assert figures["n"] == NODES
    # What a pull brings is handed on one by one; models this small come together.
    assert alive == [0] * NODES if not polled else max(alive) <= 1


def test_large_replies_are_pulled_one_by_one_and_small_ones_together() -> None:
    small = PolledGrid(hostile_app(), range(1, NODES + 1), NODES)
    run(small, rounds=1)
    assert [len(asked) for asked in small.asked[:1]] == [NODES]
    large = PolledGrid(ClientApp(), [], 0)
    model = ArrayRecord([np.zeros(5_000_000, np.float32)])
    messages = [train_message(model, node) for node in large.get_node_ids()]
    assert list(arriving(large, messages, timeout=0.0)) == []
    assert [len(asked) for asked in large.asked] == [1] * NODES


def test_who_never_answers_is_waited_for_until_the_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = PolledGrid(hostile_app(), [2, 3, 4, 5])
    with caplog.at_level(logging.WARNING, "flwr.fl_bgmd"):
        _, [first, second] = run(grid, timeout=0.05)
    assert (first["accepted"], first["missing"]) == (4, 3)
    assert "round 1: no reply from node 7" in caplog.text
    # Next time they are there: those of the first round are late, and thrown away.
    grid = PolledGrid(hostile_app(), [2, 3, 4, 5])

    def all_come(number: int, result: Any) -> bool:
        grid.order = list(range(1, NODES + 1))
        grid.looks = NODES
        return False

    _, [first, second] = run(grid, timeout=0.05, should_stop=all_come)
    assert (first["accepted"], second["accepted"], second["late"]) == (4, NODES, 3)


def test_what_was_there_at_the_deadline_counts() -> None:
    grid = PolledGrid(hostile_app(), range(1, NODES + 1), NODES)
    assert run(grid, timeout=0.0, rounds=1)[1][0]["accepted"] == NODES


def test_a_grid_without_push_and_pull_is_asked_for_all() -> None:
    class Whole(PolledGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            raise NotImplementedError

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            return self.inner.send_and_receive(messages, timeout=timeout)

    expected, _ = run(InProcessGrid(hostile_app(), NODES, {}))
    arrays, _ = run(Whole(hostile_app(), []))
    assert same_bits(arrays, expected)


def test_a_subclass_with_an_own_aggregate_train_is_given_a_list() -> None:
    given: list[type] = []

    class Twice(Mean):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            given.append(type(replies))
            assert len(list(replies)) == len(list(replies)) == NODES
            return super().aggregate_train(server_round, replies)

    class Once(Mean):
        @as_they_arrive
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            given.append(type(replies))
            return super().aggregate_train(server_round, replies)

    for cls in (Twice, Once):
        strategy = cls(fraction_evaluate=0.0, min_available_nodes=NODES)
        arrays, _ = run(InProcessGrid(hostile_app(), NODES, {}), strategy)
        plain = Mean(fraction_evaluate=0.0, min_available_nodes=NODES)
        assert same_bits(arrays, run(InProcessGrid(hostile_app(), NODES, {}), plain)[0])
    assert given == [list, list, Arrivals, Arrivals]


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_replies_of_a_node_the_first_in_order_counts(backwards: bool) -> None:
    """As if they had been sorted before anybody looked at them."""
    model, found = plain_model(), []
    for as_list in (True, False):
        strategy = GMD(seed=1, min_available_nodes=4, fraction_evaluate=0.0)
        grid = InProcessGrid(ClientApp(), 4, {})
        messages = list(strategy.configure_train(1, model, ConfigRecord(), grid))
        list(grid.push_messages(messages))
        replies = [
            honest_reply(message, random_update(model, [node, claim]), partition=claim)
            for node, message in enumerate(messages)
            for claim in (node, 7 - node)
        ]
        replies.append(MALFORMED["nan"].build(messages[1]))  # names no partition: the last
        replies = replies[::-1] if backwards else replies
        arrivals = replies if as_list else Arrivals(4, iter(replies))
        arrays, metrics = strategy.aggregate_train(1, arrivals)
        assert arrays is not None
        assert metrics is not None
        assert metrics["accepted"] == 4
        assert metrics["rejected-duplicate"] == 5
        found.append(arrays)
    assert same_bits(*found)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_moved_in_place(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(9, 5))
    sources = draw.permutation(9)[: draw.integers(0, 10)].tolist()
    expected = rows[sources]
    move_rows(rows, sources)
    np.testing.assert_array_equal(rows[: len(sources)], expected)


@pytest.mark.parametrize("attack", ["ipm", "bit-flip:5"])
def test_attackers_lie_to_who_pulls_as_to_who_waits(attack: str) -> None:
    """Those who look at others' updates send theirs once all have come."""
    plan = AttackPlan(build_attacks(attack), fraction=0.4, seed=3)

    def made() -> AdversarialGrid:
        return AdversarialGrid(InProcessGrid(hostile_app(), NODES, {}), plan, NODES)

    def sent(grid: Grid) -> list[Message]:
        return [train_message(plain_model(), node) for node in grid.get_node_ids()]

    whole = made()
    expected = [reply.content["arrays"] for reply in whole.send_and_receive(sent(whole))]
    pulled = made()
    numbers = list(pulled.push_messages(sent(pulled)))
    found = [reply for number in numbers for reply in pulled.pull_messages([number])]
    streamed = made()
    for replies in (found, list(streamed.stream(sent(streamed)))):
        assert all(set(reply.content) == {"arrays", "metrics"} for reply in replies)
        for reply, arrays in zip(replies, expected, strict=True):
            assert same_bits(reply.content["arrays"], arrays)  # type: ignore[arg-type]
    assert whole.played == pulled.played == streamed.played


def test_evaluation_is_pulled_as_well() -> None:
    grid = PolledGrid(regression_app(), [3, 1, 2, 7, 6, 5, 4])
    strategy = GMD(min_available_nodes=NODES)
    result = strategy.start(grid, regression_model(), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["loss"] > 0
