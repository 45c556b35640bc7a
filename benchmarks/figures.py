"""Accuracies of short runs of every rule, to compare two versions of the code to the last bit.

``python -m benchmarks.figures FILE`` writes them, ``--check FILE`` compares. Bits differ between
machines and versions of torch: compare on one.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from fl_bgmd.aggregators import RULES
from simulations.backends import run
from simulations.config import validate

SHORT = {
    "dataset": "mnist",
    "model": "small-cnn",
    "num-server-rounds": 4,
    "local-steps": 2,
    "batch-size": 16,
    "momentum": 0.0,
    "seed": 3,
    "attack": "bit-flip",
    "byzantine-fraction": 0.3,
    "assumed-byzantine-fraction": 0.3,
}

ROWS = {
    **{name: {"strategy": name} for name in RULES},
    "bgmd+nearest-neighbor": {"strategy": "bgmd+nearest-neighbor"},
    "gmd+bucketing": {"strategy": "gmd+bucketing"},
    "bgmd printed": {"strategy": "bgmd:memory=mean,score=squared-norm"},
    "gmd, alie": {"strategy": "gmd", "attack": "alie"},
    "bgmd, memory-takeover": {"strategy": "bgmd", "attack": "memory-takeover"},
    "cmd, label-shift": {"strategy": "cmd", "attack": "label-shift"},
    "qsgd": {"strategy": "gmd", "compressor": "qsgd"},
    "momentum": {"strategy": "gmd", "server-momentum": 0.9},
}


def main() -> int:
    """Write or compare the figures; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with FILE")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = {}
    for name, row in ROWS.items():
        result = run(validate({**SHORT, **row}), backend="inprocess")
        found[name] = {
            "status": result.status,
            "accuracy": [entry.get("accuracy") for entry in result.rounds],
            "loss": [repr(entry.get("loss")) for entry in result.rounds],
        }
        print(f"{name}: {result.status} {result.final_accuracy:.4f} {result.error}", flush=True)
    if not options.check:
        options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    before = json.loads(options.file.read_text(encoding="utf-8"))
    changed = [name for name in before if before[name] != found.get(name)]
    print(f"changed: {', '.join(changed) or 'none'}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
