"""How long a study takes: 9 strategies x 10 attacks x 3 seeds of ``mlp``, 300 rounds each.

``python -m benchmarks.study`` runs all 90 cells, one seed of each, for 12 rounds and for 36, on as
many processes as there are cores. What 24 rounds of all cells take more, and what the cells take
besides, add up to what the whole study takes, which it says. ``--whole`` runs that instead. The
setting is that of the laboratory (``simulations/studies/laboratory.toml``), with distances in the
verdicts as by default, and without the attacks that search their strength on the deployed rule: a
round under one of those takes several times as long.
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

from fl_bgmd.data import load
from simulations.config import Value
from simulations.runner import run_cells
from simulations.study import Study, attack_columns, strategy_rows, study_named

STRATEGIES = (
    "mean",
    "gmd",
    "cmd",
    "bgmd",
    "multi-krum",
    "robust-filter",
    "gap-filter",
    "caf+clipping",
    "gmd+nearest-neighbor",
)
ATTACKS = (
    "none",
    "bit-flip",
    "gaussian",
    "sign-flip",
    "label-flip",
    "ipm",
    "alie",
    "mimic",
    "min-max",
    "rop",
)
SEEDS, ROUNDS, EVERY = 3, 300, 12


def seconds_of(rounds: int, seeds: int, jobs: int) -> float:
    """Run every cell; return the seconds on the wall clock."""
    changed: dict[str, Value] = {
        "model": "mlp",
        "num-server-rounds": rounds,
        "evaluate-every": EVERY,
        "verdict-distances": True,
    }
    config = study_named("laboratory").config | changed
    study = Study(strategy_rows(STRATEGIES), attack_columns(ATTACKS), config, seeds=seeds)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        lines = run_cells(study.cells(), Path(folder), jobs=jobs)
        taken = time.perf_counter() - started
    failed = [line for line in lines if line["status"] == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} runs failed:\n{failed}")
    return taken


def main() -> None:
    """Print what the study takes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--whole", action="store_true", help="run all of it")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    load("mnist")  # a download is no part of it
    cells = len(STRATEGIES) * len(ATTACKS)
    runs = f"{SEEDS * cells} runs ({len(STRATEGIES)} x {len(ATTACKS)} x {SEEDS}) of {ROUNDS} rounds"
    if options.whole:
        taken = seconds_of(ROUNDS, SEEDS, options.jobs)
        print(f"{runs}, {options.jobs} at a time: {taken / 60:.0f} minutes")
        return
    short, longer = (seconds_of(rounds, 1, options.jobs) for rounds in (EVERY, 3 * EVERY))
    a_round = (longer - short) / (2 * EVERY)
    besides = short - EVERY * a_round
    print(f"{cells} runs of {EVERY} rounds: {short:.0f} s; of {3 * EVERY}: {longer:.0f} s")
    print(f"a round of a run: {a_round / cells * options.jobs:.3f} s of a core")
    whole = SEEDS * (besides + ROUNDS * a_round)
    print(f"{runs}, {options.jobs} at a time: {whole / 60:.0f} minutes")


if __name__ == "__main__":
    main()
