"""The benchmark of what does not fit, in small: who finishes with less memory than the matrix."""

from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.measure import STATUS

N, D = 20, 400_000
LIMIT = 2 * N * D
"""Bytes: half of the matrix."""


@pytest.mark.slow  # what a process may hold beyond its libraries differs from machine to machine
@pytest.mark.skipif(not STATUS.exists(), reason="memory limits of Linux")
@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("fl-bgmd gmd", "done"),
        ("fl-bgmd robust-filter+nearest-neighbor", "done"),
        ("flower FedAvg", "out of memory"),
        ("flower FedMedian", "out of memory"),
    ],
)
def test_who_finishes_in_half_of_the_matrix(
    name: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(Path(__file__).parents[2])
    assert peers.tried(name, N, D, tmp_path, LIMIT, 600.0)["result"] == result


def test_without_byzfl_its_rules_are_left_out_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    first = next(peers.measured(3, 10, tmp_path, 1, 1.0))
    assert first == {"step": "byzfl", "result": "skipped: byzfl is not installed"}
