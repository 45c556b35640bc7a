"""Rules on rows that do not fit into memory: time, and what they hold of their own.

``python -m benchmarks.scale --clients 100 --parameters 100000000 --folder /data`` puts the rows of
a round into a file there (40 GB), applies the rules, and prints JSON lines: seconds, also in
multiples of reading the file once, and the peak of anonymous memory, in bytes. What the system
keeps of the file in memory it takes back when it needs it; it does not count. ``--shards ray``
sends the columns to the machines of a Ray cluster first, in the seconds of each rule. ``--peers``
lets ByzFL and Flower try afterwards (``pip install --no-deps byzfl seaborn``), each in a process
that may hold ``--limit`` bytes of its own.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import Watching, held_bytes
from fl_bgmd.aggregators import Rule, build_rule
from fl_bgmd.aggregators.rows import has_cheap_gram
from fl_bgmd.mapped import mapped
from fl_bgmd.shards import Crew

PASSES = {
    "gmd": "2 reads: Gram matrix, weighted sum",
    "cmd": "1 read",
    "bgmd": "5 reads: norms, scores, block, sketch, weighted sum",
    "robust-filter+nearest-neighbor": "4 reads, 1 write: Gram matrix and means, twice",
}
"""What each rule does with the file."""

MANY_ROWS = {"gmd": "1 read for a start, 3 to 9 until the gap is certified"}
"""The same of so many rows that the median needs no Gram matrix."""

HOSTILE = 0.2
_PIECE = 2**22


def fill(rows: Tensor) -> None:
    """Write rows like those of clients that train on different data; a fifth of them lie."""
    n, d = rows.shape
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(2 * _PIECE + d % _PIECE, np.float32)
    hostile = int(HOSTILE * n)
    for i, row in enumerate(rows.numpy()):
        size = np.float32(-5 if i < hostile else 1)
        for start in range(0, d, _PIECE):
            part = row[start : start + _PIECE]
            common, own = draw.integers(0, _PIECE, 2) * (0, 1) + (start // _PIECE % 64, 0)
            np.add(pool[common:][: len(part)], pool[own:][: len(part)], out=part)
            part *= size


def read(rows: Tensor) -> float:
    """Read all rows once, as fast as one thread does; return their sum."""
    return sum(float(np.add.reduce(row)) for row in rows.numpy())


class Peak(Watching):
    """The highest anonymous memory of this process while a block runs."""

    bytes = 0

    def look(self) -> None:
        """Look fifty times a second."""
        while True:
            self.bytes = max(self.bytes, held_bytes("RssAnon"))
            if self.done.wait(0.02):
                return


def timed(function: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that a call took, and the peak of anonymous memory."""
    with Peak() as peak:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started, peak.bytes


def apply(rule: Rule, rows: Tensor, crew: Crew | None) -> None:
    """Apply a rule; on shards it begins with sending them."""
    with nullcontext(rows) if crew is None else crew.holding(rows) as given:
        rule(given, overwrite=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rules", nargs="+", default=list(PASSES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shards", choices=["none", "ray"], default="none")
    parser.add_argument("--shards-address", default="", help="HOST:PORT of a Ray cluster")
    parser.add_argument("--peers", action="store_true", help="ByzFL and Flower, too")
    parser.add_argument("--limit", type=int, default=0, help="of a peer, in bytes; 0: half of all")
    parser.add_argument("--most-seconds", type=float, default=600.0, help="of a peer")
    options = parser.parse_args()
    measure(options)
    if options.peers:
        shape = options.clients, options.parameters
        for line in peers.measured(*shape, options.folder, options.limit, options.most_seconds):
            print(json.dumps(line), flush=True)


def measure(options: argparse.Namespace) -> None:
    """Measure this project's rules and print."""
    torch.set_num_threads(options.threads)
    n, d = options.clients, options.parameters
    rows = mapped((n, d), torch.float32, options.folder)
    shape = {"n": n, "d": d, "file-bytes": 4 * n * d, "threads": options.threads}
    crew = None
    if options.shards == "ray":
        from fl_bgmd.ray_shards import RayCrew

        crew = RayCrew(options.shards_address)
        shape["machines"] = len(crew.pids())
    seconds, _ = timed(lambda: fill(rows))
    print(json.dumps({"step": "fill", **shape, "seconds": round(seconds, 2)}), flush=True)
    once, held = timed(lambda: read(rows))
    line = {"step": "read", **shape, "seconds": round(once, 2), "anonymous-bytes": held}
    print(json.dumps(line), flush=True)
    passes = PASSES if has_cheap_gram(n, d) else PASSES | MANY_ROWS
    for spec in options.rules:
        rule = build_rule(spec, generator=torch.Generator().manual_seed(0))
        # Mixings write into the file: such a rule comes last.
        seconds, held = timed(lambda rule=rule: apply(rule, rows, crew))
        line = {
            "step": spec,
            **shape,
            "seconds": round(seconds, 2),
            "reads": round(seconds / once, 2),
            "passes": passes.get(spec, ""),
            "anonymous-bytes": held,
        }
        print(json.dumps(line), flush=True)
    if crew is not None:
        crew.close()


if __name__ == "__main__":
    main()
