"""The benchmark of a whole run, in small: it measures what it says, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.deployed import PROGRAMS, Watch, _programs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.deployment  # it takes a minute, openssl and ssh-keygen
@pytest.mark.skipif(
    not all(map(shutil.which, ("openssl", "ssh-keygen"))), reason="openssl and ssh-keygen"
)
def test_three_clients_and_their_server_say_what_they_hold(tmp_path: Path) -> None:
    words = ["--clients", "3", "--parameters", "1000000", "--rounds", "1", "--port", "23092"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.deployed", *words, "--folder", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    first, memory = map(json.loads, done.stdout.splitlines())
    assert (first["step"], first["round"], first["accepted"]) == ("round", 1, 3)
    assert first["seconds"] > 0
    assert memory["step"] == "memory"
    for kind in PROGRAMS.values():
        assert 30e6 < memory[f"{kind}-bytes"] < 2e9
    assert memory["server-bytes"] < memory["all-bytes"]
    assert 4 * 900_000 < memory["checkpoint-bytes"] < 4 * 1_000_000 + 100_000
    assert list(tmp_path.iterdir()) == []
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path) in text(path)]
    assert left == []


def text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


HOLDING = """
import sys
held = bytearray(b"1" * 100_000_000)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes as Linux shows them")
def test_what_a_program_holds_is_seen_from_outside(tmp_path: Path) -> None:
    program = tmp_path / "flwr-serverapp"
    program.write_text(HOLDING)
    started = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert started.stdout is not None
    assert started.stdin is not None
    with started:
        assert started.stdout.readline() == b"ready\n"
        assert _programs([os.getpid()]) == {started.pid: "server"}
        assert _programs([started.pid + 2**22]) == {}
        with Watch([os.getpid()], tmp_path / "trace") as watch:
            time.sleep(1)
        started.stdin.close()
    assert 100e6 < watch.peaks["server"] < 150e6
    assert watch.together == watch.peaks["server"]
    assert 100e6 < int((tmp_path / "trace").read_text().split()[-1]) < 150e6
