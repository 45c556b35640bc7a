"""The grid of this process: isolation, errors, state, reproducibility, and what runs on it."""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    reply_with,
    same_bits,
    sent_arrays,
    to_record,
    train_message,
)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run

import clients.client_app
import simulations.experiment
from fl_bgmd.attacks import AttackPlan, build_attacks
from fl_bgmd.data import Dataset
from fl_bgmd.held import HeldArray
from fl_bgmd.mods import ByzantineMod
from fl_bgmd.strategies import BGMD, GMD, CenteredClipping, RobustStrategy
from simulations import backends, server_app
from simulations.adversary import AdversarialGrid
from simulations.backends import ConfiguredClientApp
from simulations.config import Config, validate
from simulations.experiment import RunResult
from simulations.grid import CLIENT_FAILED, InProcessGrid


def app_of(handle: Any) -> ClientApp:
    """Return a ClientApp with one train handler."""
    app = ClientApp()
    app.train()(handle)
    return app


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def send(grid: InProcessGrid, model: ArrayRecord | None = None, **config: Any) -> list[Message]:
    """Send one message to every node, all with the same content, as strategies do."""
    first = train_message(plain_model() if model is None else model, 1, config)
    messages = [
        Message(first.content, dst_node_id=node, message_type=MessageType.TRAIN)
        for node in grid.get_node_ids()
    ]
    return list(grid.send_and_receive(messages))


# ------------------------------------------------------------------------------- messages


def test_nodes_partitions_and_configuration() -> None:
    seen = []

    def handle(message: Message, context: Context) -> Message:
        seen.append((context.node_id, dict(context.node_config), dict(context.run_config)))
        return echo(message, context)

    grid = InProcessGrid(app_of(handle), 3, {"seed": 4, "strategy": "bgmd"})
    assert list(grid.get_node_ids()) == [1, 2, 3]
    replies = send(grid)
    assert seen == [
        (
            node,
            {"partition-id": node - 1, "num-partitions": 3},
            {"seed": 4, "strategy": "bgmd"},
        )
        for node in (1, 2, 3)
    ]
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]


def test_replies_answer_their_messages() -> None:
    grid = InProcessGrid(app_of(echo), 2, {})
    message = grid.create_message(RecordDict(), MessageType.TRAIN, 2, "round-1", ttl=60.0)
    [message_id] = grid.push_messages([message])
    assert list(grid.pull_messages(["unknown"])) == []
    [reply] = grid.pull_messages([message_id])
    assert reply.metadata.reply_to_message_id == message_id
    assert reply.metadata.src_node_id == 2
    assert reply.metadata.group_id == "round-1"
    assert list(grid.pull_messages([message_id])) == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_replies_are_pulled_under_either_name_of_the_ids(wrapped: bool) -> None:
    inner = InProcessGrid(app_of(echo), 2, {})
    plan = AttackPlan.from_config(validate({}))
    grid = AdversarialGrid(inner, plan, 2) if wrapped else inner
    for name in ("reply_to_message_ids", "message_ids"):
        message = grid.create_message(RecordDict(), MessageType.TRAIN, 2, "", ttl=60.0)
        [message_id] = grid.push_messages([message])
        # Flower marks a message that it could not push by None, from 1.43 on by "".
        [reply] = grid.pull_messages(**{name: ["", message_id]})
        assert reply.metadata.reply_to_message_id == message_id
    for given in ({}, {"reply_to_message_ids": [], "message_ids": []}):
        with pytest.raises(TypeError, match=r"pull_messages was given .*; allowed: one of them"):
            grid.pull_messages(**given)


class LossyGrid(InProcessGrid):
    """It fails to send the first message of each round, as Flower's may."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        return ["" for _ in sent[:1]] + list(super().push_messages(sent[1:]))


def test_a_message_that_was_not_sent_is_missing_and_nobody_answers_it() -> None:
    forged: list[Message] = []

    class Forged(LossyGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            sent = list(messages)
            replies = list(super().send_and_receive(sent))
            if sent:
                forged.append(echo(sent[0], self._contexts[1]))
            return [*replies, *forged[-1:]]

    for cls, unasked in ((LossyGrid, 0), (Forged, 1)):
        strategy = GMD(min_available_nodes=4, fraction_evaluate=0.0, seed=0)
        result = strategy.start(cls(regression_app(), 4, {}), regression_model(), num_rounds=3)
        for metrics in result.train_metrics_clientapp.values():
            assert metrics["accepted"] == 3
            assert metrics.get("rejected-unasked", 0) == unasked
            assert metrics["missing"] == 1 - unasked


def test_message_ids_are_never_used_twice() -> None:
    grid = InProcessGrid(app_of(echo), 5, {})
    ids = [reply.metadata.reply_to_message_id for _ in range(3) for reply in send(grid)]
    assert len(set(ids)) == 15


def test_a_generator_of_messages_will_do() -> None:
    grid = InProcessGrid(app_of(echo), 3, {})
    messages = (train_message(plain_model(), node) for node in grid.get_node_ids())
    assert len(list(grid.send_and_receive(messages, timeout=1.0))) == 3
    assert list(grid.send_and_receive([])) == []


def test_the_run_can_be_set() -> None:
    grid = InProcessGrid(app_of(echo), 1, {})
    assert grid.run.run_id == 1
    run = Run.create_empty(run_id=9)
    grid.set_run(run)
    assert grid.run is run


@pytest.mark.parametrize("count", [0, -1])
def test_a_grid_without_clients_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_clients is {count}; allowed: 1 or more"):
        InProcessGrid(app_of(echo), count, {})


# --------------------------------------------------------------------------------- errors


def raises(message: Message, context: Context) -> Message:
    raise ZeroDivisionError("of the client")


def leaves(message: Message, context: Context) -> Message:
    sys.exit(3)


def replies_nothing(message: Message, context: Context) -> Any:
    return None


def replies_a_record(message: Message, context: Context) -> Any:
    return message.content


@pytest.mark.parametrize("handle", [raises, leaves, replies_nothing, replies_a_record])
def test_whatever_goes_wrong_in_a_client_becomes_an_error_reply(handle: Any) -> None:
    def some_fail(message: Message, context: Context) -> Any:
        return handle(message, context) if context.node_id == 2 else echo(message, context)

    replies = send(InProcessGrid(app_of(some_fail), 3, {}))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == CLIENT_FAILED
    assert replies[1].metadata.src_node_id == 2


def test_the_error_says_what_happened() -> None:
    [reply] = send(InProcessGrid(app_of(raises), 1, {}))
    assert reply.error.reason == "ZeroDivisionError: of the client"


def test_a_message_without_handler_becomes_an_error_reply() -> None:
    [reply] = send(InProcessGrid(ClientApp(), 1, {}))
    assert "No train function registered" in reply.error.reason


def test_an_interrupt_of_the_user_is_not_swallowed() -> None:
    def interrupt(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        send(InProcessGrid(app_of(interrupt), 1, {}))


def test_a_run_outlives_failing_clients() -> None:
    inner = regression_app()

    def some_fail(message: Message, context: Context) -> Message:
        return raises(message, context) if context.node_id <= 3 else inner(message, context)

    strategy = GMD(fraction_evaluate=0.0, device="cpu")
    result = strategy.start(
        InProcessGrid(app_of(some_fail), 10, {}), regression_model(), num_rounds=30
    )
    assert regression_error(result.arrays) < 0.2 * regression_error(regression_model())
    for metrics in result.train_metrics_clientapp.values():
        assert (metrics["accepted"], metrics["rejected-error"]) == (7, 3)


# ------------------------------------------------------------------------------ isolation


def spoil(message: Message, context: Context) -> Message:
    """Change everything that was received, in place, after noting what it was."""
    content = message.content
    [arrays], [config] = content.array_records.values(), content.config_records.values()
    found = MetricRecord(
        {
            "numbers": list(config["numbers"]),
            "values": [float(v) for v in arrays["weight"].numpy().ravel()],
            "keys": len(arrays) * 100 + len(config) * 10 + len(content),
        }
    )
    config["numbers"].append(context.node_id)
    config["numbers"][0] = -1
    config["server-round"] = 99
    config["new"] = 1
    arrays["weight"].data = b"spoiled"
    arrays["weight"].shape = (7,)
    arrays["new"] = arrays["bias"]
    del arrays["bias"]
    content["new"] = MetricRecord({"a": 1})
    context.node_config["partition-id"] = 77
    context.run_config["seed"] = 77
    return Message(RecordDict({"found": found}), reply_to=message)


def test_clients_share_nothing_they_can_change() -> None:
    run_config: Config = {"seed": 1}
    grid = InProcessGrid(app_of(spoil), 4, run_config)
    model, config = plain_model(), ConfigRecord({"server-round": 1, "numbers": [1, 2, 3]})
    content = RecordDict({"arrays": model, "config": config})
    train_message(model)  # sets the identity that messages need
    messages = [
        Message(content, dst_node_id=node, message_type=MessageType.TRAIN)
        for node in grid.get_node_ids()
    ]
    replies = list(grid.send_and_receive(messages))
    assert not any(reply.has_error() for reply in replies)
    first = replies[0].content["found"]
    assert first["numbers"] == [1, 2, 3]
    for reply in replies[1:]:
        assert reply.content["found"] == first
    # Nor does anything reach the server.
    assert same_bits(model, plain_model())
    assert dict(config) == {"server-round": 1, "numbers": [1, 2, 3]}
    assert set(content) == {"arrays", "config"}
    assert run_config == {"seed": 1}


def test_metric_lists_are_not_shared_either() -> None:
    def append(message: Message, context: Context) -> Message:
        message.content["m"]["list"].append(context.node_id)
        return echo(message, context)

    grid = InProcessGrid(app_of(append), 3, {})
    content = RecordDict({"m": MetricRecord({"list": [7]})})
    train_message(plain_model())
    messages = [
        Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in (1, 2, 3)
    ]
    replies = list(grid.send_and_receive(messages))
    assert [reply.content["m"]["list"] for reply in replies] == [[7, 1], [7, 2], [7, 3]]
    assert content["m"]["list"] == [7]


def test_a_reply_is_the_servers_own() -> None:
    """A client that keeps what it sent, and changes it later, changes nothing."""
    kept: list[ArrayRecord] = []

    def keep(message: Message, context: Context) -> Message:
        if kept:
            kept[0]["weight"].data = b"spoiled"
        reply = honest_reply(message, random_update(plain_model(), context.node_id))
        kept.append(sent_arrays(reply))
        return reply

    replies = send(InProcessGrid(app_of(keep), 2, {}))
    assert sent_arrays(replies[0])["weight"].numpy().shape == (4, 3)


def test_arrays_are_not_copied_on_the_way_to_a_thousand_clients() -> None:
    model = to_record({"weight": np.zeros(1_000_000, np.float32)})
    replies = send(InProcessGrid(app_of(echo), 3, {}), model)
    assert all(sent_arrays(reply)["weight"].data is model["weight"].data for reply in replies)


# ---------------------------------------------------------------------------------- state


def count_calls(message: Message, context: Context) -> Message:
    calls = int(context.state["calls"]["n"]) if "calls" in context.state else 0
    context.state["calls"] = MetricRecord({"n": calls + 1})
    return reply_with(message, sent_arrays(message), {"n": calls + 1, "node": context.node_id})


def count_calls_in_a_new_state(message: Message, context: Context) -> Message:
    """Replace the state rather than change it: Flower keeps that, too."""
    calls = int(context.state["calls"]["n"]) if "calls" in context.state else 0
    context.state = RecordDict({"calls": MetricRecord({"n": calls + 1})})
    return reply_with(message, sent_arrays(message), {"n": calls + 1, "node": context.node_id})


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("handle", [count_calls, count_calls_in_a_new_state])
def test_the_state_of_a_node_persists_and_is_its_own(handle: Any, configured: bool) -> None:
    app = app_of(handle)
    if configured:
        app = ConfiguredClientApp(app, {"seed": 1})
    grid = InProcessGrid(app, 3, {})
    for expected in (1, 2, 3):
        assert [int(r.content["metrics"]["n"]) for r in send(grid)] == [expected] * 3
    [reply] = grid.send_and_receive([train_message(plain_model(), 2)])
    assert reply.content["metrics"] == {"n": 4, "node": 2}
    other = InProcessGrid(app, 1, {})
    assert [int(r.content["metrics"]["n"]) for r in send(other)] == [1]


def test_a_configured_app_sees_its_configuration() -> None:
    seen = []

    def handle(message: Message, context: Context) -> Message:
        seen.append((dict(context.run_config), context.node_id, dict(context.node_config)))
        return echo(message, context)

    send(InProcessGrid(ConfiguredClientApp(app_of(handle), {"seed": 5}), 2, {"seed": 1}))
    assert seen == [
        ({"seed": 5}, node, {"partition-id": node - 1, "num-partitions": 2}) for node in (1, 2)
    ]


# ---------------------------------------------------------------------------- experiments


def test_flowers_own_strategy_runs_on_it() -> None:
    result = FedAvg().start(InProcessGrid(regression_app(), 10, {}), regression_model(), 40)
    assert regression_error(result.arrays) < 0.1 * regression_error(regression_model())
    losses = [result.evaluate_metrics_clientapp[i]["loss"] for i in (1, 40)]
    assert losses[1] < 0.1 * losses[0]


def small_run(strategy: RobustStrategy) -> Any:
    mod = ByzantineMod(attack="gaussian", fraction=0.3, seed=3)
    grid = InProcessGrid(regression_app([mod]), 10, {})
    return strategy.start(grid, regression_model(), num_rounds=8)


def without_seconds(metrics: dict[int, MetricRecord]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.endswith("seconds")}
        for record in metrics.values()
    ]


@pytest.mark.parametrize("mixing", ["none", "nearest-neighbor", "bucketing"])
def test_two_identical_runs_are_bit_identical(mixing: str) -> None:
    options = {"mixing": mixing, "fraction_train": 0.7, "server_momentum": 0.5, "seed": 4}
    first, second = (small_run(BGMD(**options, device="cpu")) for _ in range(2))
    assert same_bits(first.arrays, second.arrays)
    assert without_seconds(first.train_metrics_clientapp) == without_seconds(
        second.train_metrics_clientapp
    )
    assert first.evaluate_metrics_clientapp == second.evaluate_metrics_clientapp
    third = small_run(BGMD(**{**options, "seed": 5}, device="cpu"))
    assert not same_bits(first.arrays, third.arrays)


# ------------------------------------------------------------------ what a server would do

TARGET = np.random.default_rng(0).normal(size=5000).astype(np.float32)


def quadratic_app() -> ClientApp:
    """Return an app that covers a tenth of its way to a noisy target, under two tied keys."""

    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        model = message.content["arrays"]["left"].numpy()
        noise = np.random.default_rng([partition, number]).normal(size=TARGET.size)
        goal = TARGET + 0.3 * noise.astype(np.float32)
        trained = Array(model - np.float32(0.1) * (model - goal))
        metrics = MetricRecord({"num-examples": 1 + partition, "partition-id": partition})
        arrays = ArrayRecord(dict.fromkeys(message.content["arrays"], trained))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app_of(train)


def quadratic_model(*keys: str) -> ArrayRecord:
    start = np.random.default_rng(1).normal(size=TARGET.size).astype(np.float32)
    return ArrayRecord({key: Array(start) for key in keys})


class ForeseeingGrid(InProcessGrid):
    """Asks the strategy in each round what it would make of the replies, before it gets them."""

    strategy: RobustStrategy
    foreseen: list[Any]
    models: list[Any]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        sent = list(messages)
        if not sent:  # nobody evaluates
            return []
        model = flat(sent[0].content["arrays"])
        replies = list(super().send_and_receive(sent, timeout=timeout))
        rows = torch.from_numpy(np.stack([model - flat(r.content["arrays"]) for r in replies]))
        before = rows.clone()
        nodes = [reply.metadata.src_node_id for reply in replies]
        examples = [float(r.content["metrics"]["num-examples"]) for r in replies]
        self.strategy.preview(rows, nodes, examples, 3)
        self.foreseen.append(self.strategy.preview(rows, nodes, examples, 1).numpy())
        assert torch.equal(rows, before)
        self.models.append(model)
        return replies


def flat(arrays: ArrayRecord) -> Any:
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


@pytest.mark.parametrize("keys", [("left",), ("left", "right")])
@pytest.mark.parametrize(
    ("rule", "given"),
    [
        (BGMD, {}),
        (BGMD, {"memory": "per-client"}),
        (BGMD, {"memory": "mean", "mixing": "bucketing"}),
        (BGMD, {"mixing": "nearest-neighbor", "byzantine_fraction": 0.2}),
        (CenteredClipping, {}),
        (GMD, {"weighting": "examples"}),
        (GMD, {"compressor": "rand-k:0.5", "shared_coordinates": True}),
    ],
)
def test_a_preview_is_what_happens_and_leaves_no_trace(
    rule: Any, given: dict[str, Any], keys: tuple[str, ...]
) -> None:
    options = {"seed": 1, "device": "cpu", "fraction_evaluate": 0.0, "bench_after": 2, **given}
    plain = rule(**options)
    expected = plain.start(InProcessGrid(quadratic_app(), 7, {}), quadratic_model(*keys), 4)
    strategy = rule(**options)
    grid = ForeseeingGrid(quadratic_app(), 7, {})
    grid.strategy, grid.foreseen, grid.models = strategy, [], []
    result = strategy.start(grid, quadratic_model(*keys), 4)
    assert same_bits(result.arrays, expected.arrays)
    assert without_seconds(result.train_metrics_clientapp) == without_seconds(
        expected.train_metrics_clientapp
    )
    moved = -np.diff(np.stack([*grid.models, flat(result.arrays)]), axis=0)
    # Ties are known from the second round on.
    for actual, foreseen in list(zip(moved, grid.foreseen, strict=True))[len(keys) - 1 :]:
        np.testing.assert_allclose(actual, foreseen, rtol=1e-3, atol=1e-5)
    # The second run of a strategy still begins like its first.
    again = strategy.start(InProcessGrid(quadratic_app(), 7, {}), quadratic_model(*keys), 4)
    assert same_bits(again.arrays, expected.arrays)


class Counting(GMD):
    """Counts its calls, and the rounds in what it remembers; fails on the third."""

    def __init__(self, *, remembers: bool) -> None:
        super().__init__(seed=1, device="cpu")
        self.calls, self.remembers = 0, remembers

    def aggregate(self, current: Any) -> Any:
        self.calls += 1
        if current.memory == 2:
            raise ValueError("not again")
        memory = (current.memory or 0) + 1 if self.remembers else None
        return replace(super().aggregate(current), memory=memory)


def test_a_preview_of_rounds_that_come_to_nothing() -> None:
    model, rows = quadratic_model("left"), torch.ones(5, TARGET.size)
    strategy = Counting(remembers=True)
    with pytest.raises(RuntimeError, match="before configure_train"):
        strategy.preview(rows, [1, 2, 3, 4, 5], [1.0] * 5, 1)
    strategy.open_round(1, model, ConfigRecord())
    assert strategy.preview(rows, [1, 2, 3, 4, 5], [1.0] * 5, 6)[0] == pytest.approx(2.0)
    assert not strategy.preview(rows[:2], [1, 2], [1.0] * 2, 1).any()
    for wrong in ((rows[:, 1:], [1, 2, 3, 4, 5], 1), (rows, [1], 1), (rows, [1, 2, 3, 4, 5], 0)):
        with pytest.raises(ValueError, match="allowed"):
            strategy.preview(wrong[0], wrong[1], [1.0] * 5, wrong[2])


@pytest.mark.parametrize(("remembers", "calls"), [(False, 1), (True, 2)])
def test_a_preview_asks_a_rule_that_remembers_nothing_once(remembers: bool, calls: int) -> None:
    strategy = Counting(remembers=remembers)
    strategy.open_round(1, quadratic_model("left"), ConfigRecord())
    rows = torch.rand(5, TARGET.size, generator=torch.Generator().manual_seed(0))
    one = strategy.preview(rows, [1, 2, 3, 4, 5], [1.0] * 5, 1)
    strategy.calls = 0
    assert torch.equal(strategy.preview(rows, [1, 2, 3, 4, 5], [1.0] * 5, 2), one + one)
    assert strategy.calls == calls


@pytest.mark.parametrize("attack", ["memory-takeover", "memory-consistent", "fang"])
def test_attacks_that_know_the_rule_find_what_the_printed_memory_lets_in(attack: str) -> None:
    """The default memory ends about where the geometric median does, which has none to enter."""

    def distance(rule: Any, **given: Any) -> float:
        plan = AttackPlan(build_attacks(attack), fraction=0.4, selection="fixed", seed=3)
        strategy = rule(
            seed=1, byzantine_fraction=0.4, fraction_evaluate=0.0, device="cpu", **given
        )
        inner = InProcessGrid(quadratic_app(), 10, {})
        grid = AdversarialGrid(inner, plan, 10, strategy.preview)
        result = strategy.start(grid, quadratic_model("left"), num_rounds=40)
        assert grid.played == {attack: 160}
        off = result.arrays["left"].numpy() - TARGET
        return float(np.linalg.norm(off) / np.linalg.norm(TARGET))

    median, robust, printed = distance(GMD), distance(BGMD), distance(BGMD, memory="mean")
    assert robust < 1.1 * median
    assert printed > 1.5 * robust
    if attack != "fang":
        assert printed > 1000


def test_a_thousand_clients_take_a_moment() -> None:
    model = to_record({"weight": np.zeros(1000, np.float32)})
    strategy = BGMD(fraction_evaluate=0.0, device="cpu", byzantine_fraction=0.4)

    def train(message: Message, context: Context) -> Message:
        return reply_with(message, sent_arrays(message), {"num-examples": 1})

    grid = InProcessGrid(app_of(train), 1000, {})
    started = time.perf_counter()
    replies = send(grid, model)
    seconds = time.perf_counter() - started
    assert len(replies) == 1000
    assert seconds < 2
    result = strategy.start(grid, model, num_rounds=1)
    assert result.train_metrics_clientapp[1]["accepted"] == 1000
    assert same_bits(result.arrays, model)


# --------------------------------------------------------------- the project's own ClientApp

SMALL: Config = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "partition": "iid",
    "num-clients": 5,
    "num-server-rounds": 3,
    "local-steps": 2,
    "batch-size": 8,
    "evaluate-every": 2,
    "fraction-evaluate": 1.0,
    "device": "cpu",
    "assumed-byzantine-fraction": 0.2,
}


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the real data, which unit tests cannot count on, by two kinds of noise."""
    draw = np.random.default_rng(0)

    def images(labels: Any) -> Any:
        noise = draw.integers(0, 128, size=(len(labels), 28, 28))
        return (noise + 100 * (labels % 2)[:, None, None]).astype(np.uint8)

    train, test = np.arange(100) % 10, np.arange(50) % 10
    dataset = Dataset("mnist", images(train), train, images(test), test, 10)

    def load(name: str, data_dir: str | None) -> Dataset:
        assert (name, data_dir) == ("mnist", None)
        return dataset

    monkeypatch.setattr(clients.client_app, "load", load)
    monkeypatch.setattr(simulations.experiment, "load", load)


def run_small(**given: Any) -> RunResult:
    config = validate({**SMALL, **{key.replace("_", "-"): value for key, value in given.items()}})
    return backends.run(config, backend="inprocess")


def history(result: RunResult) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not key.endswith("seconds")}
        for entry in result.rounds
    ]


@pytest.mark.usefixtures("synthetic")
@pytest.mark.parametrize("attack", ["none", "bit-flip", "gaussian"])
def test_two_identical_experiments_are_bit_identical(attack: str) -> None:
    fraction = 0.0 if attack == "none" else 0.2
    first, second = (run_small(attack=attack, byzantine_fraction=fraction) for _ in range(2))
    assert first.error == ""
    assert first.status == "finished"
    assert history(first) == history(second)
    assert [entry["round"] for entry in first.rounds] == [0, 1, 2, 3]
    assert list(first.accuracies) == [0, 2, 3]
    for entry in first.rounds[1:]:
        assert (entry["accepted"], entry["rejected"], entry["missing"]) == (5, 0, 0)
        assert 0 <= entry["clients-accuracy"] <= 1
    assert history(run_small(seed=1)) != history(first)


@pytest.mark.usefixtures("synthetic")
@pytest.mark.parametrize("attack", ["none", "bit-flip", "alie"])
def test_no_array_becomes_bytes_in_a_run(attack: str) -> None:
    kept: list[Message] = []

    class Keeping(InProcessGrid):
        def pull_messages(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
            kept.extend(found := list(super().pull_messages(*args, **kwargs)))
            return found

    hostile = {"attack": attack, "byzantine-fraction": 0.0 if attack == "none" else 0.4}
    assumed = {"assumed-byzantine-fraction": 0.4}
    config = validate({**SMALL, "fraction-evaluate": 0.0, **hostile, **assumed})
    grid = Keeping(clients.client_app.app, 5, config)
    result = simulations.experiment.run_experiment(grid, config)
    assert result.error == ""
    assert result.total("accepted") == len(kept) == 15
    for reply in kept:
        for array in sent_arrays(reply).values():
            assert isinstance(array, HeldArray)
            assert array.values is not None
            assert array.__dict__["_bytes"] is None


@pytest.mark.usefixtures("synthetic")
def test_every_client_works_on_its_partition_and_on_its_share_of_the_test() -> None:
    grid = InProcessGrid(clients.client_app.app, 3, validate({**SMALL, "num-clients": 3}))
    model = ArrayRecord(simulations.experiment.build("tiny-cnn").state_dict())
    train = send(grid, model)
    counts = [int(reply.content["metrics"]["num-examples"]) for reply in train]
    assert sum(counts) == 100
    assert [reply.content["metrics"]["partition-id"] for reply in train] == [0, 1, 2]
    messages = [train_message(model, node, message_type="evaluate") for node in (1, 2, 3)]
    replies = list(grid.send_and_receive(messages))
    assert [int(reply.content["metrics"]["num-examples"]) for reply in replies] == [17, 17, 16]
    for reply in replies:
        assert set(reply.content["metrics"]) == {"num-examples", "loss", "accuracy", "partition-id"}
        assert len(reply.content.array_records) == 0


@pytest.mark.usefixtures("synthetic")
def test_every_client_and_every_round_draws_its_own_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients with the same examples, too: their updates must not be copies of each other."""
    monkeypatch.setattr(
        clients.client_app, "partitions", lambda *_, **__: [np.arange(100)] * 3, raising=True
    )
    grid = InProcessGrid(clients.client_app.app, 3, validate({**SMALL, "num-clients": 3}))
    model = ArrayRecord(simulations.experiment.build("tiny-cnn").state_dict())

    def trained(server_round: int) -> list[bytes]:
        replies = send(grid, model, **{"server-round": server_round})
        return [next(iter(sent_arrays(reply).values())).data for reply in replies]

    first, second = trained(1), trained(2)
    assert len({*first, *second}) == 6
    assert trained(1) == first


@pytest.mark.usefixtures("synthetic")
def test_every_round_is_reported() -> None:
    seen = []
    config = validate(SMALL)
    backends.run(
        config,
        backend="inprocess",
        on_round=lambda number, accuracy: seen.append((number, accuracy)),
    )
    assert [number for number, _ in seen] == [0, 1, 2, 3]
    assert [accuracy is None for _, accuracy in seen] == [False, True, False, False]


@pytest.mark.usefixtures("synthetic")
def test_a_diverging_run_says_so_and_a_robust_one_does_not() -> None:
    options = {
        "attack": "bit-flip:1e30",
        "byzantine-fraction": 0.2,
        "num-server-rounds": 4,
    }
    assert run_small(**options, strategy="mean").status == "diverged"
    robust = run_small(**options, strategy="gmd")
    assert robust.status == "finished"
    assert all(np.isfinite(entry.get("loss", 0.0)) for entry in robust.rounds)


def test_a_failed_run_is_a_result_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, data_dir: str | None) -> Dataset:
        raise OSError("no data here")

    monkeypatch.setattr(simulations.experiment, "load", load)
    result = run_small()
    assert (result.status, result.error) == ("failed", "OSError: no data here")
    assert result.config == validate(SMALL)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cloud'; allowed: "):
        backends.run(validate(SMALL), backend="cloud")


@pytest.mark.usefixtures("synthetic")
def test_a_run_in_which_every_client_fails_has_failed() -> None:
    config = validate(SMALL | {"num-server-rounds": 2})
    app = app_of(raising)
    result = simulations.experiment.run_experiment(InProcessGrid(app, 5, config), config)
    assert result.status == "failed"
    assert result.error == (
        "EmptyRoundsError: none of 2 rounds moved the model; in round 2: 5 nodes asked, 0 replies "
        "accepted, rejected: error 5 (RuntimeError: never)"
    )
    assert [entry["round"] for entry in result.rounds] == [0, 1, 2]


@pytest.mark.usefixtures("synthetic")
def test_a_run_whose_first_replies_were_not_finite_has_failed() -> None:
    result = run_small(**{"learning-rate": 1e30, "num-server-rounds": 2, "attack": "none"})
    assert result.status == "failed"
    assert "none of 2 rounds moved the model" in result.error
    assert "non-finite" in result.error


@pytest.mark.usefixtures("synthetic")
def test_the_server_app_raises_what_every_client_raised(tmp_path: Path) -> None:
    config = SMALL | {"num-server-rounds": 2, "results-dir": str(tmp_path)}
    grid = InProcessGrid(app_of(raising), 5, validate(config))
    context = Context(1, 0, {}, RecordDict(), validate(config))
    with pytest.raises(RuntimeError, match=r"none of 2 rounds moved .*RuntimeError: never"):
        server_app.app(grid, context)
    [written] = tmp_path.glob("*/run.json")
    assert json.loads(written.read_text())["status"] == "failed"


@pytest.mark.usefixtures("synthetic")
@pytest.mark.parametrize("plotly", [True, False])
def test_the_server_app_leaves_a_report_beside_its_models(
    plotly: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("simulations.report.page.has_plotly", lambda: plotly)
    config = SMALL | {"strategy": "gap-filter", "results-dir": str(tmp_path)}
    grid = InProcessGrid(clients.app, 5, validate(config))
    server_app.app(grid, Context(1, 0, {}, RecordDict(), validate(config)))
    [folder] = tmp_path.iterdir()
    files = {path.name for path in folder.iterdir()}
    assert files >= {"run.json", "final.safetensors", "best.safetensors"}
    assert ("report.html" in files) == plotly
    assert ("pip install 'fl-bgmd[plots]'" in caplog.text) != plotly
    if plotly:
        text = (folder / "report.html").read_text()
        assert "<title>gap-filter under none</title>" in text


def raising(message: Message, context: Context) -> Message:
    raise RuntimeError("never")


@pytest.mark.usefixtures("synthetic")
def test_a_partition_that_cannot_be_is_refused_before_the_first_round() -> None:
    result = backends.run(validate(SMALL | {"partition": "shards:40000"}), backend="inprocess")
    assert result.status == "failed"
    assert "num-shards is 40000; allowed: a multiple of" in result.error
    assert not result.rounds


class LeavingGrid(InProcessGrid):
    """Its last node is gone after three messages were sent to it."""

    pushes = 0

    def push_messages(self, messages: Any) -> Any:
        self.pushes += 1
        return super().push_messages(messages)

    def get_node_ids(self) -> list[int]:
        nodes = list(super().get_node_ids())
        return nodes[:-1] if self.pushes >= 3 else nodes


@pytest.mark.usefixtures("synthetic")
def test_a_run_that_ends_for_want_of_nodes_keeps_its_history() -> None:
    config = validate(
        SMALL | {"num-server-rounds": 9, "evaluate-every": 9, "node-wait-timeout": 0.1}
    )
    grid = LeavingGrid(clients.client_app.app, 5, config)
    result = simulations.experiment.run_experiment(grid, config)
    assert result.status == "failed"
    assert "4 nodes are connected" in result.error
    assert len(result.rounds) > 1
    assert "accuracy" in result.rounds[-1]  # also between evaluations


def test_a_second_run_of_a_strategy_starts_like_the_first() -> None:
    strategy = BGMD(server_momentum=0.9, min_available_nodes=4, fraction_evaluate=0.0, seed=0)
    models = [
        strategy.start(InProcessGrid(regression_app(), 4, {}), regression_model(), num_rounds=4)
        for _ in range(2)
    ]
    assert same_bits(models[0].arrays, models[1].arrays)
    state = strategy.state_dict()
    strategy.load_state_dict(state)
    third = strategy.start(InProcessGrid(regression_app(), 4, {}), regression_model(), num_rounds=4)
    assert not same_bits(models[0].arrays, third.arrays)


def test_metrics_functions_may_return_nothing() -> None:
    strategy = GMD(
        min_available_nodes=4,
        fraction_evaluate=0.0,
        train_metrics_aggr_fn=lambda contents, key: None,
    )
    grid = InProcessGrid(regression_app(), 4, {})
    result = strategy.start(grid, regression_model(), num_rounds=2)
    assert result.train_metrics_clientapp[2]["accepted"] == 4
