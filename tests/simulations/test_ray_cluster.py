"""A Ray cluster of two nodes, each with processes of its own: the clients run on both."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from ray.cluster_utils import Cluster
from test_flwr_run import free_port
from test_pooled_grid import N, ask, build

from clients.client_app import handle_train
from simulations import backends, ray_grid
from simulations.backends import ClientResources
from simulations.cli import main
from simulations.config import Config, ConfigError, validate
from simulations.ray_grid import RayGrid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

RAY = Path(sys.executable).parent / "ray"
RATE: Config = {"rate": 0.5}
SMALL: Config = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "num-server-rounds": 2,
    "num-clients": 8,
    "local-steps": 2,
    "batch-size": 16,
    "evaluate-every": 2,
}


@dataclass(frozen=True)
class RecordNode:
    """A mod that notes on which Ray node a client runs."""

    folder: str

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        node = ray.get_runtime_context().get_node_id()
        (Path(self.folder) / f"{context.node_config['partition-id']}-{node}").touch()
        time.sleep(0.5)  # long enough that one node cannot take all the messages
        return call_next(message, context)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a head and a second node with one CPU each; yield the cluster's address."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    address = f"127.0.0.1:{free_port()}"
    common = ["--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
    head = ["--head", f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}"]
    nodes = []
    try:
        for role in ([*head, "--include-dashboard=false"], [f"--address={address}"]):
            with (Path(folder) / "start.log").open("a") as log:
                nodes.append(
                    subprocess.Popen(
                        [str(RAY), "start", *role, *common],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
            wait_for_nodes(address, len(nodes), Path(folder) / "start.log")
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=20)
        for pid in leftovers(folder):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(address: str, count: int, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError):
            if len(backends.cluster_machines(address)) == count:
                return
        time.sleep(1)
    raise AssertionError(f"no {count} Ray nodes at {address}: {log.read_text()}")


def leftovers(folder: str) -> list[int]:
    """Return the pids of processes whose command line names the cluster's folder."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


def test_clients_run_on_both_nodes(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = ClientApp(mods=[RecordNode(str(tmp_path))])
    watched.train()(handle_train)
    monkeypatch.setattr(backends, "client_app", watched)
    config = validate(SMALL | {"ray-address": cluster})
    result = backends.run(config, backend="ray", resources=ClientResources(ray_address=cluster))
    assert result.status == "finished", result.error
    assert result.total("accepted") == 16
    partitions, nodes = zip(*(path.name.split("-") for path in tmp_path.iterdir()), strict=True)
    assert set(map(int, partitions)) == set(range(8))
    ray.init(address=cluster, log_to_driver=False)
    try:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    finally:
        ray.shutdown()
    assert set(nodes) == alive
    assert len(alive) == 2


def test_cluster_and_in_process_runs_agree(cluster: str) -> None:
    there = backends.run(SMALL, ray_address=cluster, backend="ray")
    here = backends.run(validate(SMALL), backend="inprocess")
    assert there.status == here.status == "finished", there.error
    assert there.accuracies == here.accuracies


def test_more_than_a_machine_of_the_cluster_has_is_refused(cluster: str) -> None:
    """Two nodes with one CPU each hold no client that wants two."""
    with pytest.raises(ConfigError, match=r"num-cpus is 2; allowed: 1 to 1, what a machine of the"):
        ClientResources(num_cpus=2, ray_address=cluster)


def test_command_line_refuses_an_address_without_a_cluster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert main(["run", "--dataset", "mnist", "--ray-address", nowhere]) == 2
    assert f"ray-address is '{nowhere}'" in capsys.readouterr().err


def test_other_forms_of_address_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ray-address is 'auto' \(it is no HOST:PORT\)"):
        validate({"ray-address": "auto"})


@contextlib.contextmanager
def nodes_with(*cpus: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """Start a cluster with a node for each number of CPUs, in processes of its own."""
    made = Cluster()
    try:
        yield made, [made.add_node(num_cpus=count) for count in cpus]
    finally:
        ray.shutdown()
        made.shutdown()


def test_a_run_begins_with_the_workers_that_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_grid, "PATIENCE", 2.0)
    with (
        nodes_with(2) as (made, _),
        holding_a_cpu(made.address),
        RayGrid(build(), N, RATE, address=made.address) as grid,
    ):
        assert len(list(grid.send_and_receive(ask(tmp_path), timeout=60))) == N


@contextlib.contextmanager
def holding_a_cpu(address: str) -> Iterator[None]:
    """Have another program, a process of its own, use a CPU of a cluster."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, address], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        yield
    finally:
        other.kill()
        other.wait()


OTHER = """
import ray, sys, time
ray.init(address=sys.argv[1])
@ray.remote(num_cpus=1)
class Held:
    def here(self):
        return "here"
held = Held.remote()
print(ray.get(held.here.remote()), flush=True)
time.sleep(600)
"""


def test_clients_of_a_machine_that_is_lost_are_played_by_the_others(tmp_path: Path) -> None:
    with (
        nodes_with(1, 2) as (made, [_, second]),
        RayGrid(build(), N, RATE, address=made.address) as grid,
    ):
        assert len(list(grid.send_and_receive(ask(tmp_path), timeout=60))) == N
        made.remove_node(second)
        # The first round may find out; the next ones lose nothing and wait for nobody.
        list(grid.send_and_receive(ask(tmp_path), timeout=60))
        began = time.monotonic()
        replies = list(grid.send_and_receive(ask(tmp_path), timeout=60))
        assert [reply.has_error() for reply in replies] == [False] * N
        assert time.monotonic() - began < 30  # not the deadline
