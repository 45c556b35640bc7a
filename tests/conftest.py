"""Settings of the whole suite: Flower and Ray keep quiet, torch uses the machine's two cores."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers give way to everybody else: beside other tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
# Those that it starts before anybody asks have not imported what actors need, and end unused.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

# The helper modules beside the tests, and tests that others build on.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *sorted({str(test.parent) for test in HERE.glob("*/**/test_*.py")})]


# Modules and collected tests stay: going through them again and again took 6 % of the time.
gc.disable()


def pytest_collection_finish() -> None:
    """Have the garbage collector look at what comes from here on."""
    gc.freeze()
    gc.set_threshold(50_000)  # tests are short: what they leave can wait
    gc.enable()


@pytest.fixture(autouse=True)
def flowers_log() -> Iterator[None]:
    """Leave Flower's log as loud as it was: the command line turns it off."""
    log = logging.getLogger("flwr")
    before = log.level
    yield
    log.setLevel(before)
