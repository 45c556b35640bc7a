"""Grids on Ray's actors and on processes: real workers, which fail in all ways that there are."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fl_bgmd.strategies import GMD
from simulations.config import Config
from simulations.grid import InProcessGrid
from simulations.pooled_grid import MOST_PER_CALL, PooledGrid
from simulations.process_grid import ProcessGrid
from simulations.ray_grid import RayGrid, _room

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

N = 7


def play(message: Message, context: Context) -> Message:
    """Do what the message asks this node for, and count its rounds in the node's state."""
    config = message.content.config_records["config"]
    node, folder = context.node_id, Path(str(config["folder"]))
    (folder / f"asked-{node}-{time.monotonic_ns()}").touch()
    what = str(config.get(f"node-{node}", ""))
    if what == "raise":
        raise RuntimeError(f"node {node} has no data")
    if what == "die" or (what == "die once" and not (folder / "died").exists()):
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(600)
    seen = int(context.state.metric_records.get("seen", MetricRecord({"n": 0}))["n"]) + 1  # type: ignore[call-overload]
    context.state["seen"] = MetricRecord({"n": seen})
    [value] = [array.numpy() for array in message.content.array_records["arrays"].values()]
    told = {"seen": seen, "node": node, "rate": float(context.run_config["rate"])}
    content = {"arrays": ArrayRecord([value + node]), "metrics": MetricRecord(told)}
    return Message(RecordDict(content), reply_to=message)


def build() -> ClientApp:
    app = ClientApp()
    app.train()(play)
    return app


@pytest.fixture(scope="module", params=["ray", "processes"])
def grid(request: pytest.FixtureRequest) -> Iterator[PooledGrid]:
    settings: Config = {"rate": 0.5}
    made = (
        RayGrid(build(), N, settings)
        if request.param == "ray"
        else ProcessGrid(build, N, settings, jobs=2)
    )
    with made:
        yield made


def ask(folder: Path, size: int = 3, **what: str) -> list[Message]:
    orders = {key.replace("_", "-"): value for key, value in what.items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.arange(size, dtype=np.float32)]),
            "config": ConfigRecord({"folder": str(folder), **orders}),
        }
    )
    return [Message(content, node, "train") for node in range(1, N + 1)]


def told(message: Message) -> dict[str, Any]:
    return dict(message.content.metric_records["metrics"])


@pytest.mark.parametrize(
    ("cpus", "gpus", "num_gpus", "expected"),
    [
        (8.0, 0.0, 0.0, 8),
        (8.0, 2.0, 0.25, 8),
        (8.0, 2.0, 0.4, 4),  # two shares on each: what is left of both is no share
        (8.0, 2.0, 0.1, 8),
        (8.0, 4.0, 2.0, 2),
        (8.0, 1.0, 2.0, 0),
    ],
)
def test_workers_that_a_machine_has_room_for(
    cpus: float, gpus: float, num_gpus: float, expected: int
) -> None:
    assert _room({"CPU": cpus, "GPU": gpus}, 1.0, num_gpus) == expected


def test_replies_come_in_the_order_of_the_messages_with_the_clients_own_values(
    grid: PooledGrid, tmp_path: Path
) -> None:
    replies = list(grid.send_and_receive(ask(tmp_path)))
    assert [reply.metadata.src_node_id for reply in replies] == list(range(1, N + 1))
    assert [told(reply)["rate"] for reply in replies] == [0.5] * N
    for node, reply in enumerate(replies, 1):
        [array] = reply.content.array_records["arrays"].values()
        assert type(array) is Array
        assert array.numpy().tolist() == [node, node + 1, node + 2]


def test_what_clients_keep_is_theirs_whoever_plays_them(grid: PooledGrid, tmp_path: Path) -> None:
    before = [told(reply)["seen"] for reply in grid.send_and_receive(ask(tmp_path))]
    saved = grid.state_dict()
    after = [told(reply)["seen"] for reply in grid.send_and_receive(ask(tmp_path))]
    assert after == [count + 1 for count in before]
    grid.load_state_dict(saved)
    again = [told(reply)["seen"] for reply in grid.send_and_receive(ask(tmp_path))]
    assert again == after


def test_an_exception_is_the_reply_of_its_client_alone(grid: PooledGrid, tmp_path: Path) -> None:
    replies = list(grid.send_and_receive(ask(tmp_path, node_3="raise")))
    assert [reply.has_error() for reply in replies] == [node == 3 for node in range(1, N + 1)]
    assert replies[2].error.reason == "RuntimeError: node 3 has no data"


def test_a_dead_worker_is_replaced_and_its_clients_are_asked_again(
    grid: PooledGrid, tmp_path: Path
) -> None:
    replies = list(grid.send_and_receive(ask(tmp_path, node_5="die once")))
    assert [told(reply)["node"] for reply in replies] == list(range(1, N + 1))
    assert len(list(tmp_path.glob("asked-5-*"))) == 2


def test_a_client_that_kills_its_process_each_time_costs_only_itself(
    grid: PooledGrid, tmp_path: Path
) -> None:
    replies = list(grid.send_and_receive(ask(tmp_path, node_2="die")))
    assert replies[1].error.reason.startswith("the client's process died: ")
    assert len(list(tmp_path.glob("asked-2-*"))) == 2
    healthy = [reply for reply in replies if reply.has_content()]
    # Clients in the dead worker's queue were asked again; one of them may have shared its fate.
    assert len(healthy) >= N - 2
    assert all(reply.has_content() for reply in grid.send_and_receive(ask(tmp_path)))


def test_stragglers_are_cut_off_at_the_deadline(grid: PooledGrid, tmp_path: Path) -> None:
    started = time.monotonic()
    replies = list(grid.send_and_receive(ask(tmp_path, node_1="sleep"), timeout=2))
    assert time.monotonic() - started < 200
    assert 1 not in [told(reply)["node"] for reply in replies]
    assert len(list(grid.send_and_receive(ask(tmp_path)))) == N


def test_replies_can_be_pulled_as_they_finish(grid: PooledGrid, tmp_path: Path) -> None:
    numbers = list(grid.push_messages(ask(tmp_path)))
    found: list[Message] = []
    deadline = time.monotonic() + 120
    while len(found) < N and time.monotonic() < deadline:
        found += grid.pull_messages(message_ids=numbers)
        time.sleep(0.01)
    assert {told(reply)["node"] for reply in found} == set(range(1, N + 1))
    assert not list(grid.pull_messages(numbers))


def test_small_clients_share_calls_and_large_ones_do_not(grid: PooledGrid, tmp_path: Path) -> None:
    [small, *_], [large, *_] = ask(tmp_path), ask(tmp_path, size=300_000)
    assert grid.clients_per_call(small.content, 10_000) == MOST_PER_CALL
    assert grid.clients_per_call(large.content, 10_000) == 1
    assert grid.clients_per_call(small.content, 1) == 1


def test_a_pool_of_no_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"jobs is 0; allowed: 1 or more"):
        ProcessGrid(build, N, {}, jobs=0)


def step(message: Message, context: Context) -> Message:
    """Go a step of one's own from the model."""
    [value] = [array.numpy() for array in message.content.array_records["arrays"].values()]
    drawn = np.random.default_rng(context.node_id).standard_normal(value.shape, np.float32)
    content = {"arrays": ArrayRecord([value + drawn]), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@pytest.mark.slow
def test_ten_thousand_clients_of_a_thousand_parameters_on_ray() -> None:
    """Two rounds; the median of what they sent, to the bit as where they are called one by one."""
    many, app = 10_000, ClientApp()
    app.train()(step)
    models = []
    with RayGrid(app, many, {}) as pooled:
        for grid in (pooled, InProcessGrid(app, many, {})):
            strategy = GMD(min_available_nodes=many, fraction_evaluate=0.0)
            model = ArrayRecord([np.zeros(1000, np.float32)])
            result = strategy.start(grid, model, num_rounds=2)
            assert [m["accepted"] for m in result.train_metrics_clientapp.values()] == [many, many]
            models.append(result.arrays.to_numpy_ndarrays()[0])
    np.testing.assert_array_equal(*models)
    center = 2 * np.mean(
        [np.random.default_rng(i + 1).standard_normal(1000, np.float32) for i in range(many)],
        axis=0,
    )
    assert np.abs(models[0] - center).max() < 0.01
