"""The benchmark of what does not fit, in small: who finishes with less memory than the matrix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers

N, D = 20, 400_000
LIMIT = 2 * N * D
"""Bytes: half of the matrix."""


@pytest.mark.slow  # what a process may hold beyond its libraries differs from machine to machine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory limits of Linux")
@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("fl-bgmd gmd", "done"),
        ("fl-bgmd robust-filter+nearest-neighbor", "done"),
        ("flower FedAvg", "out of memory"),
        ("flower FedMedian", "out of memory"),
    ],
)
def test_who_finishes_in_half_of_the_matrix(name: str, result: str, tmp_path: Path) -> None:
    code = [sys.executable, "-m", "benchmarks.peers", name, f"{N}", f"{D}"]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [*code, str(tmp_path), f"{LIMIT}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=own,
    )
    assert f'"result": "{result}"' in found.stdout


def test_without_byzfl_its_rules_are_left_out_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    first = next(peers.measured(3, 10, tmp_path, 1, 1.0))
    assert first == {"step": "byzfl", "result": "skipped: byzfl is not installed"}
