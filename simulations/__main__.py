"""The command ``fl-bgmd``: what must happen before the seconds that importing the rest takes."""

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # Read by Flower and Ray when they are imported.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Read by NumPy and torch. Threads that spin until the next small step cost more than the step:
    # with both, models of 100,000 parameters take half the time, others as much as before.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Where interrupts are ignored, as in a background job, they stay so.
    if interruptible := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    # Rules and attacks of your own, in the current folder: `python -m` has it first. Last, so that
    # no folder there hides a package.
    sys.path.append(os.getcwd())
    # What is imported stays: going through it again and again is a sixth of the time it takes.
    gc.disable()
    from . import cli

    gc.freeze()
    gc.enable()
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = cli.main(program=_program())
    if status == cli.EXIT_INTERRUPTED:
        # What threads of Flower and Ray still wait for is not wanted.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process where it stands: imports may take an exception for one of their own."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _program() -> str:
    """Return how this process was started: ``fl-bgmd``, or ``python -m fl_bgmd``."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


if __name__ == "__main__":
    main()
