"""The last updates of clients that are not asked: who has one, for how long, and what it is for."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    regression_app,
    regression_error,
    regression_model,
    same_bits,
    to_numpy,
    to_record,
)
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import Tensor

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.mods import CompressionMod
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import GMD, Mean, RobustStrategy, Round, TrimmedMean
from simulations.config import validate
from simulations.grid import InProcessGrid
from strategies.stale import StaleUpdates, heard

Call = Callable[[Message, Context], Message]
SIZE = 6


def update_of(number: int, partition: int) -> Any:
    """Return an update that names its round and client."""
    return np.full(SIZE, 100.0 * number + partition)


def app_with(update: Any = update_of) -> ClientApp:
    """Return a client that moves each of its arrays by the negative of an update."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        partition = int(context.node_config["partition-id"])
        moved = {
            key: value - update(number, partition)
            for key, value in to_numpy(message.content["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": 10 + partition, "partition-id": partition})
        return Message(
            RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message
        )

    return app


class Recording(Mean):
    """Keeps what its rule is given, and stays where it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[Round] = []

    def aggregate(self, current: Round) -> Aggregate:
        self.seen.append(copy.deepcopy(current))
        return Aggregate(torch.zeros(current.updates.shape[1], dtype=torch.float64))


class Noting(RobustStrategy):
    """A rule of one's own that weights do not leave out."""

    weightable = True

    def aggregate(self, current: Round) -> Aggregate:
        self.weights = current.weights
        return Aggregate(torch.zeros(current.updates.shape[1], dtype=torch.float64))


def zeros(*keys: str) -> ArrayRecord:
    return to_record({key: np.zeros(SIZE) for key in keys or ("w",)})


def start(
    strategy: RobustStrategy,
    app: ClientApp | None = None,
    rounds: int = 6,
    nodes: int = 8,
    model: ArrayRecord | None = None,
    **options: Any,
) -> Result:
    grid = InProcessGrid(app or app_with(), nodes, {})
    return strategy.start(grid, model or zeros(), num_rounds=rounds, **options)


SAMPLED: dict[str, Any] = {"fraction_train": 0.25, "fraction_evaluate": 0.0, "seed": 3}


# ------------------------------------------------------------------------- what the rule is given


def test_rows_are_the_fresh_ones_and_the_last_ones_of_the_others() -> None:
    strategy = Recording(stale_updates=100, **SAMPLED)
    result = start(strategy)
    last: dict[int, float] = {}
    for number, current in enumerate(strategy.seen, start=1):
        fresh, others = current.nodes[:2], current.nodes[2:]
        assert others == [node for node in last if node not in fresh]
        assert len(set(current.nodes)) == len(current.nodes)
        for node in fresh:
            last.pop(node, None)  # to the end: heard of most recently
            last[node] = 100 * number + node - 1
        assert current.updates.tolist() == [[last[node]] * SIZE for node in current.nodes]
        reported = result.train_metrics_clientapp[number].get("stale-updates", 0)
        assert reported == len(others)
    assert len(last) > 4  # or nothing was tried


def test_without_it_there_are_the_fresh_ones_alone_and_nothing_is_kept() -> None:
    strategy = Recording(**SAMPLED)
    result = start(strategy)
    assert [len(current.nodes) for current in strategy.seen] == [2] * 6
    assert not strategy.state_dict()["stale"]["row"]
    assert all("stale-updates" not in m for m in result.train_metrics_clientapp.values())


def test_an_update_stays_for_its_rounds() -> None:
    strategy = Recording(stale_updates=2, **SAMPLED)
    start(strategy, rounds=12)
    heard_in: dict[int, int] = {}
    for number, current in enumerate(strategy.seen, start=1):
        usable = {node for node, when in heard_in.items() if number - when <= 2}
        assert set(current.nodes[2:]) == usable - set(current.nodes[:2])
        heard_in |= dict.fromkeys(current.nodes[:2], number)


def test_the_rule_may_overwrite_its_rows() -> None:
    """Mixings work in place: what is kept must be what came."""
    strategy = Recording(stale_updates=100, mixing="nearest-neighbor", **SAMPLED)
    start(strategy)
    kept = strategy.state_dict()["stale"]
    for node, number, row in zip(kept["node"], kept["round"], kept["row"], strict=True):
        assert row.tolist() == update_of(number, node - 1).tolist()


def test_examples_weight_all_rows_and_are_capped_at_the_median_of_all() -> None:
    strategy = Noting(stale_updates=100, weighting="examples", min_valid_replies=1, **SAMPLED)
    start(strategy)
    nodes = strategy.state_dict()["stale"]["node"]
    assert strategy.weights is not None
    assert len(strategy.weights) == len(nodes) > 4
    counts = sorted(9 + node for node in nodes)
    assert float(strategy.weights.max()) == counts[(len(counts) - 1) // 2]


# ----------------------------------------------------------------------------- who has no row


def test_rejected_and_benched_nodes_have_no_row() -> None:
    """Node 1 lies well at first: what it sent then is gone with the first reply that is refused."""

    def update(number: int, partition: int) -> Any:
        bad = partition == 0 and number > 2
        return np.full(SIZE, np.nan) if bad else update_of(number, partition)

    kept: list[list[int]] = []
    strategy = Recording(
        stale_updates=9, fraction_evaluate=0.0, bench_after=2, bench_rounds=3, seed=0
    )

    def keep(number: int, result: Result) -> bool:
        kept.append(strategy.state_dict()["stale"]["node"])
        return False

    start(strategy, app_with(update), rounds=6, nodes=4, should_stop=keep)
    assert kept == [[1, 2, 3, 4]] * 2 + [[2, 3, 4]] * 4
    assert [current.nodes for current in strategy.seen[2:]] == [[2, 3, 4]] * 4


def test_a_node_that_does_not_reply_is_there_by_what_it_sent_before() -> None:
    class Losing(InProcessGrid):
        """Loses the replies of node 2 from the second round on."""

        def pull_messages(self, *args: Any, **keywords: Any) -> Any:
            replies = super().pull_messages(*args, **keywords)
            return [
                reply
                for reply in replies
                if reply.metadata.src_node_id != 2 or strategy.state_dict()["round"] == 0
            ]

    strategy = Recording(stale_updates=9, fraction_evaluate=0.0)
    strategy.start(Losing(app_with(), 4, {}), zeros(), num_rounds=3)
    assert [current.nodes for current in strategy.seen] == [[1, 2, 3, 4], *[[1, 3, 4, 2]] * 2]
    assert strategy.seen[-1].updates[-1].tolist() == update_of(1, 1).tolist()


class Failing(Recording):
    """Fails in the second round."""

    def aggregate(self, current: Round) -> Aggregate:
        result = super().aggregate(current)
        if len(self.seen) == 2:
            raise ValueError("no")
        return result


def test_a_round_that_fails_leaves_what_was_kept() -> None:
    strategy, states = Failing(stale_updates=9, **SAMPLED), []

    def keep(number: int, result: Result) -> bool:
        states.append(strategy.state_dict()["stale"])
        return False

    start(strategy, rounds=3, should_stop=keep)
    assert states[0]["round"] == [1, 1]
    assert states[1]["node"] == states[0]["node"]
    assert states[1]["round"] == [1, 1]
    assert set(states[2]["round"]) == {1, 3} or states[2]["round"] == [3, 3]


# ------------------------------------------------------------------------------------- bounds


def test_it_takes_no_more_than_its_bytes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    row = SIZE * 8
    strategy = Recording(stale_updates=100, stale_bytes=3 * row + row // 2, **SAMPLED)
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        start(strategy, rounds=8)
    kept = strategy.state_dict()["stale"]
    assert sum(r.numel() * r.element_size() for r in kept["row"]) == 3 * row
    assert kept["node"] == [*strategy.seen[-1].nodes[3:], *strategy.seen[-1].nodes[:2]][-3:]
    said = [r.getMessage() for r in caplog.records if "stale_bytes" in r.getMessage()]
    assert said == [
        f"stale_bytes is {3 * row + row // 2}, with room for the last updates of 3 of 4 clients: "
        "the oldest are dropped"
    ]


def test_the_least_recently_heard_go_first() -> None:
    def of(number: int, *nodes: int) -> Any:
        return heard(number, torch.ones(len(nodes), 2), nodes, [1.0] * len(nodes), None)

    stale = StaleUpdates().after(of(1, 1, 2, 3), 24).after(of(2, 2), 24)
    assert [h.node for h in stale.heard] == [1, 3, 2]
    assert [h.node for h in stale.after(of(3, 4, 5), 24).heard] == [2, 4, 5]
    assert [h.node for h in stale.after(of(3, 4, 5, 6, 7), 24).heard] == [5, 6, 7]
    assert not stale.after(of(3, 4), 7).heard  # room for none
    assert [h.node for h in stale.usable(3, 1).heard] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stale_updates": -1}, r"stale_updates is -1; allowed: a whole number, 0 or more"),
        ({"stale_bytes": 0}, r"stale_bytes is 0; allowed: a whole number, 1 or more"),
        (
            {"stale_updates": 3, "shared_coordinates": True, "compressor": "rand-k:0.5"},
            r"shared_coordinates is True with stale_updates 3; allowed: False, since stale updates "
            r"are of other coordinates",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GMD(**options)


def test_it_is_a_key_of_a_run() -> None:
    config = validate({"stale-updates": 20, "stale-bytes": 1000})
    assert (config["stale-updates"], config["stale-bytes"]) == (20, 1000)


# ---------------------------------------------------------------------- ties and compression


def test_rows_follow_the_ties_that_come_and_go() -> None:
    """Two arrays are trained alike but in the third round: each row is one array wide, or two."""

    def rows(number: int, partition: int) -> tuple[Any, Any]:
        first = np.full(SIZE, 0.5 * partition + 1)
        return first, first + (1.0 if number == 3 else 0.0)

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        partition = int(context.node_config["partition-id"])
        arrays = to_numpy(message.content["arrays"])
        moved = {
            key: arrays[key] - row for key, row in zip(arrays, rows(number, partition), strict=True)
        }
        metrics = MetricRecord({"num-examples": 1, "partition-id": partition})
        return Message(
            RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message
        )

    strategy = Recording(stale_updates=100, **SAMPLED)
    start(strategy, app, rounds=4, model=zeros("a", "b"))
    widths = [current.updates.shape[1] for current in strategy.seen]
    assert widths == [SIZE, SIZE, 2 * SIZE, SIZE]
    kept = {}
    for number, current in enumerate(strategy.seen, start=1):
        for node in current.nodes[:2]:
            kept[node] = rows(number, node - 1)
        for node, row in zip(current.nodes, current.updates.numpy(), strict=True):
            first, second = kept[node]
            expected = np.concatenate([first, second]) if number == 3 else first
            np.testing.assert_array_equal(row, expected)


def test_rows_are_decoded_updates() -> None:
    """Of ``top-k`` the server gets a sixth of each update: that is what is kept."""
    app = ClientApp(mods=[CompressionMod()])
    app.train()(_train_increasing)
    strategy = Recording(
        stale_updates=100, compressor="top-k:0.17", error_feedback=False, **SAMPLED
    )
    start(strategy, app)
    for current in strategy.seen:
        for node, row in zip(current.nodes, current.updates.numpy(), strict=True):
            assert row.tolist() == pytest.approx([0.0] * (SIZE - 1) + [SIZE + node - 1.0])
    assert len(strategy.seen[-1].nodes) > 4


def _train_increasing(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    moved = {
        key: value - (np.arange(SIZE) + 1.0 + partition)
        for key, value in to_numpy(message.content["arrays"]).items()
    }
    metrics = MetricRecord({"num-examples": 1, "partition-id": partition})
    return Message(RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message)


# ----------------------------------------------------------------------------- what it is for


def lie(message: Message, context: Context, call_next: Call) -> Message:
    """Nodes 1 to 20 of a hundred send -1000 times their update."""
    reply = call_next(message, context)
    if message.metadata.message_type == "train" and context.node_id <= 20:
        sent, found = to_numpy(message.content["arrays"]), to_numpy(reply.content["arrays"])
        reply.content["arrays"] = to_record(
            {key: sent[key] - np.float32(1000) * (found[key] - sent[key]) for key in sent}
        )
    return reply


def attacked(seed: int, rounds: int = 50, checkpoints: Path | None = None, **options: Any) -> Any:
    """Return the model and the distance to the true one after each round."""
    errors: list[float] = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        errors.append(regression_error(arrays))

    strategy = TrimmedMean(
        byzantine_fraction=0.3,
        fraction_train=0.1,
        fraction_evaluate=0.0,
        seed=seed,
        checkpoints=checkpoints,
        **options,
    )
    app = regression_app([lie])
    grid = InProcessGrid(app, 100, {})
    result = strategy.start(grid, regression_model(), num_rounds=rounds, evaluate_fn=evaluate)
    return result.arrays, errors


@pytest.mark.parametrize("seed", [0, 2])
def test_a_fifth_of_hostile_clients_of_whom_a_tenth_is_asked(seed: int) -> None:
    """Three lies in ten are too many for no rule, four are for this one."""
    _, without = attacked(seed)
    assert without[-1] > 100
    _, errors = attacked(seed, stale_updates=40)
    assert errors[-1] < 0.2 < errors[0]
    assert max(errors) == errors[0]


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, _ = attacked(0, rounds=9, stale_updates=40)
    attacked(0, rounds=5, stale_updates=40, checkpoints=tmp_path)
    resumed, _ = attacked(0, rounds=9, stale_updates=40, checkpoints=tmp_path)
    assert same_bits(resumed, whole)
    # Control: what is kept matters.
    strategy = TrimmedMean(byzantine_fraction=0.3, seed=0, stale_updates=40)
    assert not same_bits(attacked(0, rounds=9)[0], whole)
    assert not strategy.state_dict()["stale"]["row"]


def test_a_preview_has_the_rows_behind() -> None:
    strategy = Mean(stale_updates=100, **SAMPLED)
    start(strategy, rounds=4)
    kept = strategy.state_dict()["stale"]
    nodes = [*sorted(set(range(1, 9)) - set(kept["node"]))[:1], kept["node"][0]]
    updates = torch.full((2, SIZE), -7.0, dtype=torch.float64)
    rows: dict[int, Tensor] = dict(zip(kept["node"], kept["row"], strict=True))
    rows |= dict(zip(nodes, updates, strict=True))
    expected = 2 * torch.stack(list(rows.values())).mean(dim=0)
    found = strategy.preview(updates, nodes, [1.0, 1.0], 2)
    torch.testing.assert_close(found, expected)
