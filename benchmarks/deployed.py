"""A whole run with a model of any size on one machine: what each process holds, and how long.

``python -m benchmarks.deployed --clients 8 --parameters 350000000 --folder /data`` starts a
SuperLink with TLS and node authentication and that many SuperNodes (``examples/deployment``), and
runs an app whose clients send a transformer's arrays back moved a little, one of them far away. It
prints JSON lines: each round, and of the server, the SuperLink, SuperNodes and clients the peak of
anonymous memory, in bytes. SuperNodes take turns (``benchmarks/one_machine``): on one machine
there is no room for all of their models at once. All of it ends, and the files go, when the run
does, after ``--most-seconds``, and where less than ``--least-available`` bytes of memory are left.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measure import Watching, held_bytes

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "examples" / "deployment" / "deploy.sh"
APP = ROOT / "benchmarks" / "deployed_app"
TOGETHER = ROOT / "benchmarks" / "one_machine"

PROGRAMS = {
    "flwr-serverapp": "server",
    "flower-superlink": "superlink",
    "flower-supernode": "supernode",
    "flwr-clientapp": "client",
}
"""The programs whose memory counts, and what they are called in the output."""


class Watch(Watching):
    """The anonymous memory of programs that are descendants of some processes, while a block runs.

    Attributes
    ----------
    peaks : Counter
        The highest of any one process of each kind, in bytes.
    together : int
        The highest of all at a time.
    least_available : int
        The lowest of the machine's available memory.
    """

    def __init__(self, roots: list[int], trace: Path | None) -> None:
        self.peaks: Counter[str] = Counter()
        self.together, self.least_available = 0, _available()
        self._roots, self._trace = roots, trace

    def look(self) -> None:
        """Look twenty times a second."""
        kinds: dict[int, str] = {}
        began, lines, looks = time.monotonic(), [], 0
        while not self.done.wait(0.05):
            if looks % 10 == 0:
                kinds = _programs(self._roots)
                self.least_available = min(self.least_available, _available())
            looks += 1
            held = {pid: _anonymous(pid) for pid in kinds}
            self.together = max(self.together, sum(held.values()))
            for pid, kind in kinds.items():
                self.peaks[kind] = max(self.peaks[kind], held[pid])
            if self._trace is not None:
                server = [held[pid] for pid, kind in kinds.items() if kind == "server"]
                lines.append(f"{time.monotonic() - began:.2f} {sum(server)} {sum(held.values())}\n")
        if self._trace is not None:
            self._trace.write_text("".join(lines))


def _anonymous(pid: int) -> int:
    """Return a process's anonymous memory in bytes, 0 once it is gone."""
    try:
        return held_bytes("RssAnon", Path(f"/proc/{pid}/status"))
    except (OSError, ValueError):  # one that has ended has no such line
        return 0


def _available() -> int:
    """Return the machine's available memory in bytes."""
    return held_bytes("MemAvailable", Path("/proc/meminfo"))


def _programs(roots: list[int]) -> dict[int, str]:
    """Return the kind of each process that counts, of the descendants of some."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found, ours = {}, set(roots)
    for pid in sorted(parents):
        line, above = [], pid
        while above in parents and above not in ours:
            line.append(above)
            above = parents[above]
        if above not in ours:
            continue
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:2]
        except OSError:
            continue
        for word in words:
            if (kind := PROGRAMS.get(Path(word).name)) is not None:
                found[pid] = kind
    return found


class Deployment:
    """A SuperLink and its SuperNodes in a folder, by ``examples/deployment/deploy.sh``."""

    def __init__(self, folder: Path, clients: int, port: int) -> None:
        self.folder, self.clients = folder, clients
        self.environment = os.environ | {
            "DEPLOYMENT": str(folder / "deployment"),
            "SUPERLINK": f"127.0.0.1:{port}",
            "RUNTIME_PORT": str(port + 1),
            "NUM_PARTITIONS": str(clients),
            "BIN": str(Path(sys.executable).parent),
            "TURN": str(folder / "turn"),
            "PYTHONPATH": os.pathsep.join([str(TOGETHER), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "FLWR_LOG_LEVEL": "INFO",  # the script reads in the logs that something has started
            # Freed memory goes back to the system, of which there is one for all of these machines.
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
            "GPU": "none",
        }

    def deploy(self, *words: str) -> None:
        """Run a command of the script."""
        subprocess.run([DEPLOY, *words], env=self.environment, check=True, stdout=subprocess.PIPE)

    def start(self) -> list[int]:
        """Start all; return their process ids."""
        names = [f"supernode-{number}" for number in range(self.clients)]
        self.deploy("certificates", "127.0.0.1")
        self.deploy("connection", "bench")
        for number in range(self.clients):
            self.deploy("key", str(number))
        self.deploy("start", "superlink")
        keys = self.folder / "deployment" / "keys"
        self.deploy("register", *(str(keys / f"{name}.pub") for name in names))
        self.deploy("start", *names)
        pids = self.folder / "deployment" / "run"
        return [int((pids / f"{name}.pid").read_text()) for name in ("superlink", *names)]

    def run(self, config: str) -> "subprocess.Popen[bytes]":
        """Start the run, its log in a file."""
        words = [DEPLOY, "flwr", "run", APP, "bench", "--stream", "--run-config", config]
        with (self.folder / "run.log").open("wb") as log:
            return subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run all in a folder, and print."""
    deployment = Deployment(folder, options.clients, options.port)
    shape = {name: getattr(options, name) for name in ("clients", "parameters", "dtype")}
    shape["strategy"] = options.strategy
    config = {
        **{key: value for key, value in shape.items() if key != "clients"},
        "num-clients": options.clients,
        "num-server-rounds": options.rounds,
        "round-timeout": options.round_timeout,
        "rows": options.rows,
        "folder": str(folder),
    }
    try:
        roots = deployment.start()
        with Watch(roots, options.trace) as watch:
            run = deployment.run(" ".join(f"{key}={json.dumps(config[key])}" for key in config))
            deadline = time.monotonic() + options.most_seconds
            while run.poll() is None and time.monotonic() < deadline:
                if watch.least_available < options.least_available:
                    run.kill()
                    raise SystemExit(f"{watch.least_available:,} bytes of memory are available")
                time.sleep(0.5)
            run.kill()
        _report(folder, shape, watch)
    finally:
        deployment.deploy("stop")


def _report(folder: Path, shape: dict[str, Any], watch: Watch) -> None:
    """Print what a run came to."""
    if not (folder / "result.json").exists():
        raise SystemExit("the run has failed:\n" + (folder / "run.log").read_text()[-8000:])
    result = json.loads((folder / "result.json").read_text())
    for number, metrics in enumerate(result["rounds"], start=1):
        figures = {
            name: round(metrics[name], 1)
            for name in ("waiting-seconds", "screening-seconds", "rule-seconds")
            if name in metrics
        }
        line = {"step": "round", "round": number, **shape, "seconds": result["seconds"][number - 1]}
        line |= {"accepted": metrics.get("accepted"), **figures}
        print(json.dumps(line), flush=True)
    sizes = [path.stat().st_size for path in (folder / "checkpoints").glob("*.safetensors")]
    line = {"step": "memory", **shape, "rounds": len(result["rounds"])}
    line |= {f"{kind}-bytes": watch.peaks[kind] for kind in PROGRAMS.values()}
    line |= {"all-bytes": watch.together, "checkpoint-bytes": max(sizes, default=0)}
    line["least-available-bytes"] = watch.least_available
    print(json.dumps(line), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=350_000_000)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--strategy", default="gmd", help="spec of a rule")
    parser.add_argument("--rows", choices=["auto", "memory", "file"], default="file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-timeout", type=float, default=7200.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--port", type=int, default=21092, help="and one more for each client")
    parser.add_argument("--least-available", type=int, default=2_000_000_000)
    parser.add_argument("--most-seconds", type=float, default=86400.0, help="the run ends then")
    parser.add_argument("--trace", type=Path, help="file for the server's memory as time goes on")
    parser.add_argument("--keep", action="store_true", help="leave the files")
    options = parser.parse_args()
    # Where memory runs out the kernel is to end this and what it has started, nobody else.
    Path("/proc/self/oom_score_adj").write_text("1000")
    folder = Path(tempfile.mkdtemp(prefix="deployed-", dir=options.folder.resolve()))
    try:
        measure(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
