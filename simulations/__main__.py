"""``python -m simulations``: see ``--help``."""

import os
import signal
import sys
from types import FrameType

# Read by Flower and Ray when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _end(number: int, frame: FrameType | None) -> None:
    """End the process where it stands: imports may take an exception for one of their own."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    # Some seconds of imports. Where interrupts are ignored, as in a background job, they stay so.
    if interruptible := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from simulations.cli import EXIT_INTERRUPTED, main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if status == EXIT_INTERRUPTED:  # what threads of Flower and Ray still wait for is not wanted
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
