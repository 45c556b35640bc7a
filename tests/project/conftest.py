"""What several of these tests look at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [*pip, "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    [built] = folder.glob("*.whl")
    return built
