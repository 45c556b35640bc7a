"""What ByzFL and Flower do with rows that do not fit: each in a process that may hold so much.

Part of ``python -m benchmarks.scale --peers``. ByzFL's rules are given the rows in a file, which do
not count, as this project's are; Flower's strategies get replies, as they always do.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flower

from benchmarks.measure import held_bytes
from benchmarks.server_peak import ARRAYS, Clients
from fl_bgmd.aggregators import build_rule
from fl_bgmd.mapped import mapped
from strategies.storage import available_memory

OWN = ("gmd", "robust-filter+nearest-neighbor")

BYZFL = {"GeometricMedian": 0, "Median": 0, "TrMean": 1, "NNM": 1, "CAF": 1}
"""ByzFL's rules and whether they are told how many clients are hostile."""

FLOWER = ("FedAvg", "FedMedian", "FedTrimmedAvg", "MultiKrum", "Bulyan")
"""Strategies of Flower's."""

_SHARE = 5  # one client in so many is hostile


def measured(n: int, d: int, folder: Path, limit: int, most: float) -> Iterator[dict[str, Any]]:
    """Yield what became of each peer, as lines of the benchmark.

    Parameters
    ----------
    n, d : int
        Rows and their length, float32.
    folder : Path
        Where the rows of ByzFL's rules go.
    limit : int
        Bytes that a process may take beyond what it holds once its libraries are loaded; 0 for half
        of the memory that is available.
    most : float
        Seconds that each may take.
    """
    limit = limit or (available_memory() or 0) // 2
    names = [f"fl-bgmd {name}" for name in OWN] + [f"flower {name}" for name in FLOWER]
    if importlib.util.find_spec("byzfl") is None:
        yield {"step": "byzfl", "result": "skipped: byzfl is not installed"}
    else:
        names += [f"byzfl {name}" for name in BYZFL]
    shape = {"n": n, "d": d, "matrix-bytes": 4 * n * d, "limit-bytes": limit}
    for name in names:
        yield {"step": name, **shape, **tried(name, n, d, folder, limit, most)}


def tried(name: str, n: int, d: int, folder: Path, limit: int, most: float) -> dict[str, Any]:
    """Return what became of a peer in a process of its own; see :func:`measured`."""
    code = [sys.executable, "-m", "benchmarks.peers", name, f"{n}", f"{d}", str(folder), f"{limit}"]
    try:
        found = subprocess.run(code, capture_output=True, text=True, timeout=most, check=False)
    except subprocess.TimeoutExpired:
        return {"result": f"more than {most:g} seconds"}
    if found.returncode < 0:  # an allocation that nobody looked at
        return {"result": f"out of memory (signal {-found.returncode})"}
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["failed"])[-1][:200]
        no_stack = "Thread creation failed" in last  # which is memory, too
        return {"result": f"out of memory ({last})" if no_stack else last}
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def one(name: str, n: int, d: int, folder: Path, limit: int) -> dict[str, Any]:
    """Return the seconds that a peer takes, or that it ran out of memory."""
    whose, kind = name.split()
    work = _flower(kind, n, d) if whose == "flower" else _on_rows(whose, kind, n, d, folder)
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes("VmData") + limit, -1))
    started = time.perf_counter()
    try:
        work()
    except MemoryError:
        return {"result": "out of memory"}
    except RuntimeError as error:  # torch has no error of its own for this
        if "memory" not in str(error):
            raise
        return {"result": "out of memory"}
    return {"result": "done", "seconds": round(time.perf_counter() - started, 2)}


def _on_rows(whose: str, kind: str, n: int, d: int, folder: Path) -> Callable[[], Any]:
    rule: Callable[..., Any]
    if whose == "fl-bgmd":
        rule = partial(build_rule(kind, byzantine_fraction=1 / _SHARE), overwrite=True)
    else:
        made = getattr(importlib.import_module("byzfl"), kind)
        rule = made(f=n // _SHARE) if BYZFL[kind] else made()
    rows = mapped((n, d), torch.float32, folder)
    draw = np.random.default_rng(0)
    for row in rows.numpy():
        draw.standard_normal(out=row, dtype=np.float32)
    rule(rows[:, :100].clone())  # what it loads
    return lambda: rule(rows)


def _flower(kind: str, n: int, d: int) -> Callable[[], Any]:
    sizes = np.diff(np.linspace(0, d, ARRAYS + 1).astype(int))
    model = ArrayRecord({f"{i}": Array(np.zeros(size, np.float32)) for i, size in enumerate(sizes)})
    options: dict[str, Any] = {"min_train_nodes": n, "min_available_nodes": n}
    hostile = n // _SHARE
    if kind in ("MultiKrum", "Bulyan"):
        options["num_malicious_nodes"] = hostile
    if kind == "MultiKrum":
        options["num_nodes_to_select"] = n - hostile
    own, grid = getattr(flower, kind)(**options), Clients(n)
    messages = list(own.configure_train(1, model, ConfigRecord(), grid))

    def round_of() -> None:
        arrays, _ = own.aggregate_train(1, list(grid.send_and_receive(messages)))
        if arrays is None:
            raise ValueError("no model came of it")

    return round_of


if __name__ == "__main__":
    given, count, size, where, most_bytes = sys.argv[1:]
    print(json.dumps(one(given, int(count), int(size), Path(where), int(most_bytes))))
