"""Settings of the whole suite: Flower and Ray keep quiet, torch uses the machine's two cores."""

import os
import sys
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# The helper modules beside the tests.
sys.path.insert(0, str(Path(__file__).parent))
