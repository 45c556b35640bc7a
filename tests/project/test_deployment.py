"""Several hosts on one machine: network namespaces joined by a bridge, real Flower, TLS, keys.

The scripts of ``examples/deployment`` start and stop everything. Needs Linux, root, ``ip`` and
``openssl``; ``make test-deployment`` runs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile_node.sitecustomize import BREAKAGES

from clients.client_app import app as client_app
from fl_bgmd.data import load
from simulations.config import Config, validate
from simulations.experiment import run_experiment
from simulations.grid import InProcessGrid

pytestmark = pytest.mark.deployment

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DEPLOY = ROOT / "examples" / "deployment" / "deploy.sh"
BIN = Path(sys.executable).parent

LINK, SUPERLINK, PORT = "link", "10.77.0.1", 9092
HONEST, KILLED, SLOW, FLIPPED, MALFORMED = range(5)
HOSTILE = {FLIPPED: "bit-flip", MALFORMED: "malformed"}
NUM_NODES, ROUNDS, DEADLINE = 5, 6, 75
KILLED_IN_ROUND, LINK_KILLED_IN_ROUND = 2, 4
DELAY, LOSS = 0.1, 0.05  # of the slow node's cable, each way

CONFIG: Config = {
    "dataset": "mnist",
    "model": "small-cnn",
    "partition": "iid",
    "strategy": "gmd",
    "num-clients": NUM_NODES,
    "min-available-clients": 3,
    "min-valid-replies": 3,  # with one node hostile
    "num-server-rounds": ROUNDS,
    "local-steps": 30,
    "learning-rate": 0.1,
    "client-momentum": 0.2,  # more, and a node that falls silent costs a run as short as this one
    "round-timeout": float(DEADLINE),
}


def why_not() -> str:
    """Return why this machine cannot hold the hosts, empty if it can."""
    missing = [name for name in ("ip", "openssl", "ssh-keygen", "setsid") if not shutil.which(name)]
    if missing:
        return f"missing: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"fl-bgmd-{os.getpid()}-probe"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    cables = subprocess.run(
        ["ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two"],
        capture_output=True,
        text=True,
        check=False,
    )
    ip("netns", "del", probe)
    return f"no virtual cables: {cables.stderr.strip()}" if cables.returncode else ""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A machine: a network namespace with an address and a folder."""

    name: str
    namespace: str
    address: str
    folder: Path

    def command(self, *words: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]

    def deploy(
        self, *words: str | Path, fails: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the deployment script on this host; its status must be what ``fails`` says."""
        done = subprocess.run(
            self.command(DEPLOY, *words),
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {
            "DEPLOYMENT": str(self.folder),
            "SUPERLINK": f"{SUPERLINK}:{PORT}",
            "NUM_PARTITIONS": str(NUM_NODES),
            "BIN": str(BIN),
            "FLWR_LOG_LEVEL": "INFO",
            **more,
        }

    def log(self, service: str) -> str:
        path = self.folder / "log" / f"{service}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def lose_power(self) -> None:
        for pid in self.pids():
            os.kill(pid, 9)


class Network:
    """A switch with hosts on cables, one of them bad."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"fl-bgmd-{os.getpid()}-"
        self.namespaces: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.switch = self._namespace("switch")
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def host(self, name: str, number: int) -> Host:
        """Add a host; its end of the cable is ``eth``, the switch's ``to-NAME``."""
        namespace, address = self._namespace(name), f"10.77.0.{number}"
        cable = ["eth", "netns", namespace, "type", "veth"]
        ip("link", "add", *cable, "peer", "name", f"to-{name}", "netns", self.switch)
        ip("-n", self.switch, "link", "set", f"to-{name}", "master", "br0", "up")
        ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth")
        ip("-n", namespace, "link", "set", "eth", "up")
        (self.folder / name).mkdir()
        return Host(name, namespace, address, self.folder / name)

    def impair(self, host: Host) -> str:
        """Make a host's cable slow and lossy both ways; return what does it."""
        netem = ["netem", "delay", f"{DELAY * 1000:.0f}ms", "loss", f"{LOSS:.0%}"]
        port = f"to-{host.name}"
        ends = ((host.namespace, "eth"), (self.switch, port))
        rules = [
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "add", "dev", end, "root", *netem],
                capture_output=True,
                check=False,
            )
            for namespace, end in ends
            if shutil.which("tc")
        ]
        if rules and not any(rule.returncode for rule in rules):
            return "tc netem"
        # This kernel has no netem: unplug the host from the switch, put a relay in between.
        ip("-n", self.switch, "link", "set", port, "nomaster")
        ip("-n", self.switch, "link", "add", "relay", "type", "veth", "peer", "name", "relayed")
        ip("-n", self.switch, "link", "set", "relayed", "master", "br0", "up")
        ip("-n", self.switch, "link", "set", "relay", "up")
        for namespace, end in (*ends, (self.switch, "relay"), (self.switch, "relayed")):
            ip("-n", namespace, "link", "set", end, "gso_max_segs", "1")
        command = ["ip", "netns", "exec", self.switch, sys.executable]
        command += [str(TESTS / "impaired_link.py"), port, "relay", str(DELAY), str(LOSS)]
        self.processes.append(subprocess.Popen(command))
        return "tests/impaired_link.py (no tc netem in this kernel)"

    def remove(self) -> None:
        """Kill what runs in the namespaces, then remove them with all their cables."""
        for process in self.processes:
            process.kill()
            process.wait()
        for namespace in self.namespaces:
            for pid in ip("netns", "pids", namespace).split():
                os.kill(int(pid), 9)
            ip("netns", "del", namespace)

    def _namespace(self, name: str) -> str:
        namespace = self.prefix + name
        ip("netns", "add", namespace)
        self.namespaces.append(namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        return namespace


@dataclass(frozen=True)
class Federation:
    """A SuperLink, its operator and its SuperNodes, all running."""

    network: Network
    link: Host
    operator: Host
    nodes: list[Host]
    node_ids: list[int]
    impairment: str


@dataclass(frozen=True)
class Outcome:
    """What a run left behind, before and after the SuperLink's crash."""

    before: str
    after: str
    statuses: list[str]
    restart: str
    record: dict[str, Any]
    rounds: list[dict[str, Any]]
    seconds: float

    @property
    def output(self) -> str:
        return self.before + self.after


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    if reason := why_not():
        pytest.skip(reason)
    load("mnist")  # the hosts have no way out to fetch it
    network = Network(tmp_path_factory.mktemp("hosts"))
    try:
        link = network.host(LINK, 1)
        operator = network.host("operator", 2)
        nodes = [network.host(f"node{i}", 10 + i) for i in range(NUM_NODES)]
        impairment = network.impair(nodes[SLOW])
        link.deploy("certificates", "superlink.test", SUPERLINK)
        for host in (operator, *nodes):
            copy_ca(link, host)
        link.deploy("start", "superlink")
        operator.deploy("connection", "lan")
        ids = [register(operator, node, i) for i, node in enumerate(nodes)]
        for i, node in enumerate(nodes):
            hostile = {}
            if i in HOSTILE:
                hostile = {"PYTHONPATH": str(TESTS / "hostile_node"), "HOSTILE": HOSTILE[i]}
                hostile["KEPT"] = str(node.folder / "kept")
            node.deploy("start", f"supernode-{i}", **hostile)
        yield Federation(network, link, operator, nodes, ids, impairment)
    finally:
        network.remove()


@pytest.fixture(scope="module")
def outcome(federation: Federation) -> Outcome:
    """Run the app; a node and later the SuperLink lose power in a round and come back."""
    operator, link = federation.operator, federation.link
    killed, service = federation.nodes[KILLED], f"supernode-{KILLED}"
    config = CONFIG | {"checkpoint-dir": str(link.folder / "checkpoints")}
    settings = " ".join(f"{key}={value!r}" for key, value in config.items())
    started = time.monotonic()

    first = Run(operator, settings, "first.log")
    try:
        first.wait_until(lambda: trains(killed, service, KILLED_IN_ROUND))
        killed.lose_power()
        restart = killed.deploy("start", service, START_TIMEOUT="150").stderr
        honest = federation.nodes[HONEST], f"supernode-{HONEST}"
        first.wait_until(lambda: trains(*honest, LINK_KILLED_IN_ROUND))
        link.lose_power()
    finally:
        first.end()
    link.deploy("start", "superlink")
    again = Run(operator, settings, "again.log")
    try:
        again.process.wait(timeout=400)
    finally:
        again.end()

    listed = json.loads(operator.deploy("flwr", "list", "--format", "json").stdout)["runs"]
    [folder] = (link.folder / "work" / "results").iterdir()
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return Outcome(
        first.output(),
        again.output(),
        sorted(entry["status"] for entry in listed),
        restart,
        json.loads((folder / "run.json").read_text()),
        [json.loads(line) for line in lines],
        time.monotonic() - started,
    )


class Run:
    """`flwr run` by the operator."""

    def __init__(self, operator: Host, settings: str, log: str) -> None:
        words = ["flwr", "run", ROOT, "lan", "--stream", "--run-config", settings]
        self.path = operator.folder / log
        with self.path.open("w") as stream:
            self.process = subprocess.Popen(
                operator.command(DEPLOY, *words),
                env=operator.environment(),
                stdout=stream,
                stderr=stream,
            )

    def wait_until(self, holds: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"waited {seconds} s in vain: {self.output()}"
            time.sleep(0.1)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def output(self) -> str:
        return self.path.read_text(errors="replace")


def trains(host: Host, service: str, number: int) -> bool:
    """Return whether a node is at work on its ``number``-th message."""
    received = host.log(service).count("Receiving: train message")
    return received >= number and any("clientapp" in words for words in commands(host))


def copy_ca(link: Host, host: Host) -> None:
    """Take the SuperLink's CA certificate, and nothing else of its, to another host."""
    (host.folder / "certificates").mkdir()
    shutil.copy(link.folder / "certificates" / "ca.crt", host.folder / "certificates")


def register(operator: Host, node: Host, index: int) -> int:
    """Make a node's key on the node, register its public half; return the node's id."""
    node.deploy("key", str(index))
    public = node.folder / "keys" / f"supernode-{index}.pub"
    found = re.search(r"SuperNode (\d+) registered", operator.deploy("register", public).stdout)
    assert found
    return int(found[1])


def commands(host: Host) -> list[str]:
    """Return the command lines of a host's processes."""
    lines = []
    for pid in host.pids():
        path = Path(f"/proc/{pid}/cmdline")
        if path.exists():
            lines.append(path.read_bytes().replace(b"\0", b" ").decode())
    return lines


def honest_accuracy() -> float:
    """Return what the honest nodes reach on their own, without a network."""

    class HonestNodes(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return [i + 1 for i in (HONEST, KILLED, SLOW)]

    config = validate(CONFIG)
    return run_experiment(HonestNodes(client_app, NUM_NODES, config), config).final_accuracy


def test_unregistered_node_is_refused(federation: Federation) -> None:
    stranger = federation.network.host("stranger", 99)
    copy_ca(federation.link, stranger)
    stranger.deploy("key", "0")
    refused = stranger.deploy("start", "supernode-0", fails=True, START_TIMEOUT="15")
    assert "refused: not registered" in refused.stderr
    assert "Failed to activate SuperNode" in stranger.log("supernode-0")
    assert "Exit Code: 305" in stranger.log("supernode-0")
    assert not stranger.pids()


def test_wrong_key_is_refused(federation: Federation) -> None:
    """A node that names a registered public key and signs with a key of its own."""
    thief = federation.network.host("thief", 98)
    copy_ca(federation.link, thief)
    thief.deploy("key", "0")
    stolen = federation.nodes[HONEST].folder / "keys" / f"supernode-{HONEST}.pub"
    code = f"""
from pathlib import Path
from cryptography.hazmat.primitives import serialization as s
from flwr.supernode.fleet_http_connection import http_request_response
own = Path({str(thief.folder / "keys" / "supernode-0")!r})
private = s.load_ssh_private_key(own.read_bytes(), None)
public = s.load_ssh_public_key(Path({str(stolen)!r}).read_bytes())
ca = {str(thief.folder / "certificates" / "ca.crt")!r}
with http_request_response("{SUPERLINK}:{PORT}", False, ca, (private, public), 0) as connection:
    print("let in as", connection[0])
"""
    done = subprocess.run(
        thief.command(sys.executable, "-c", code),
        env=thief.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "let in" not in done.stdout
    assert "401 Unauthorized" in done.stderr
    assert 'activate-node HTTP/1.1" 401' in federation.link.log("superlink")


def test_superlink_with_a_foreign_certificate_is_refused(federation: Federation) -> None:
    lonely = federation.network.host("lonely", 97)
    lonely.deploy("certificates", "elsewhere.test")  # a CA of its own
    lonely.deploy("key", "0")
    lonely.deploy("start", "supernode-0", fails=True, START_TIMEOUT="10")
    assert "CERTIFICATE_VERIFY_FAILED" in lonely.log("supernode-0")


def test_slow_node_is_slow(federation: Federation) -> None:
    """The impairment is in effect, before anything is concluded from it."""
    code = (
        "import socket, time; t = time.monotonic(); "
        f"socket.create_connection(('{SUPERLINK}', {PORT})); print(time.monotonic() - t)"
    )
    command = federation.nodes[SLOW].command(sys.executable, "-c", code)
    assert float(subprocess.check_output(command)) >= 2 * DELAY


def test_run_outlives_hostile_malformed_killed_and_slow_nodes(
    federation: Federation, outcome: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print("\n" + summary(federation, outcome))
    assert "finished:completed" in outcome.statuses, outcome.output
    assert outcome.record["status"] == "finished"
    first, last = outcome.rounds[1], outcome.rounds[-1]
    assert len(outcome.rounds) == ROUNDS + 1
    # All but the malformed one count at first, and again when the killed one is back.
    assert first["accepted"] == last["accepted"] == NUM_NODES - 1


def test_run_resumes_from_its_checkpoint_after_the_superlink_was_killed(outcome: Outcome) -> None:
    done = LINK_KILLED_IN_ROUND - 1
    assert len(outcome.statuses) == 2  # the crash ends a run; submitting it again makes a new one
    assert f"resumed from the checkpoint of round {done} " in outcome.after
    assert f"[ROUND {done}/{ROUNDS}]" in outcome.before
    assert f"[ROUND {done}/{ROUNDS}]" not in outcome.after
    assert f"[ROUND {LINK_KILLED_IN_ROUND}/{ROUNDS}]" in outcome.after
    assert [entry["round"] for entry in outcome.rounds] == list(range(ROUNDS + 1))


def test_momentum_is_kept_on_the_node_and_starts_anew_with_a_run(
    federation: Federation, outcome: Outcome
) -> None:
    lines = (federation.nodes[FLIPPED].folder / "kept").read_text().splitlines()
    assert outcome.record["config"]["client-momentum"] == CONFIG["client-momentum"]
    begun = [int(line) for line in lines if " " not in line]  # with nothing that was kept
    assert begun == [1, LINK_KILLED_IN_ROUND]
    assert len(lines) >= ROUNDS
    assert {line.partition(" ")[2] for line in lines} == {"", "fl-bgmd.momentum"}


def test_accuracy_is_that_of_the_honest_nodes(outcome: Outcome) -> None:
    assert outcome.record["final-accuracy"] >= honest_accuracy() - 0.03


def test_hostile_node_has_no_say(outcome: Outcome) -> None:
    for entry in outcome.rounds[1:]:
        if entry["accepted"] == NUM_NODES - 1:
            assert entry["client-weights"][FLIPPED] < 0.02


def test_malformed_replies_are_rejected_by_name(federation: Federation, outcome: Outcome) -> None:
    node = federation.node_ids[MALFORMED]
    for entry, reason in zip(outcome.rounds[1:-1], BREAKAGES[:-1], strict=True):
        assert entry[f"rejected-{reason}"] == 1
        assert f"rejected the reply of node {node} ({reason})" in outcome.output


def test_killed_node_is_named_and_comes_back(federation: Federation, outcome: Outcome) -> None:
    entry = outcome.rounds[KILLED_IN_ROUND]
    # Flower reports it dead after a minute at the latest; until then only the deadline helps.
    assert entry["missing"] + entry.get("rejected-error", 0) == 1
    assert entry["accepted"] == NUM_NODES - 2
    node = federation.node_ids[KILLED]
    assert f"round {KILLED_IN_ROUND}: no reply from node {node}" in outcome.output
    assert "still taken for alive" in outcome.restart
    assert f"round {ROUNDS}: no reply from node {node}" not in outcome.output


def test_silent_node_costs_the_deadline_and_is_named(
    federation: Federation, outcome: Outcome
) -> None:
    assert BREAKAGES[ROUNDS - 1] == "silence"
    assert outcome.rounds[ROUNDS]["missing"] == 1
    node = federation.node_ids[MALFORMED]
    assert f"round {ROUNDS}: no reply from node {node}" in outcome.output


def test_stop_leaves_no_process_behind(federation: Federation) -> None:
    for host in (*federation.nodes, federation.operator, federation.link):
        assert host.pids() or host is federation.operator
        host.deploy("stop")
        assert not host.pids(), commands(host)


def summary(federation: Federation, outcome: Outcome) -> str:
    """Return a table of what happened, for the reader."""
    lines = [f"slow node: {2 * DELAY:g} s, {LOSS:.0%} loss each way by {federation.impairment}"]
    titles = ("round", "accuracy", "seconds", "accepted", "missing")
    lines.append(" ".join(f"{title:>8}" for title in titles) + "  rejected")
    for entry in outcome.rounds[1:]:
        reasons = [key for key in entry if key.startswith("rejected-")]
        lines.append(
            f"{entry['round']:>8} {entry['accuracy']:>8.2%} {entry['seconds']:>8.1f} "
            f"{entry['accepted']:>8} {entry['missing']:>8}  "
            + ", ".join(key.removeprefix("rejected-") for key in reasons)
        )
    weights = ", ".join(f"{weight:.4f}" for weight in outcome.rounds[-1]["client-weights"])
    lines.append(f"weights of the accepted nodes in the last round: {weights}")
    lines.append(f"runs: {', '.join(outcome.statuses)}; {outcome.seconds:.0f} s in all")
    return "\n".join(lines)
