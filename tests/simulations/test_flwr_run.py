"""The app under `flwr run`: a SuperLink of its own, and a client somewhere else."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.deployment]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a SuperLink with the simulation runtime; yield the environment of its clients."""
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOG_LEVEL": "INFO",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    control, api = free_port(), free_port()
    neutral = tmp_path / "neutral"
    neutral.mkdir()
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{api}"\n'
        "insecure = true\n"
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(api)]
    command += ["--control-api-address", f"127.0.0.1:{control}"]
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=neutral, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_port(api, process)
        yield environment | {"NEUTRAL": str(neutral)}
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def test_flwr_run_from_a_neutral_directory(superlink: dict[str, str], tmp_path: Path) -> None:
    assert shutil.which("flwr", path=superlink["PATH"])
    results = tmp_path / "results"
    settings = (
        "strategy='fltrust' root-examples=50 attack='bit-flip' byzantine-fraction=0.4 "
        "num-server-rounds=2 num-clients=5 partition='shards:80' dataset='mnist' "
        "model='tiny-cnn' local-steps=1 batch-size=8 "
        f"results-dir='{results}'"
    )
    # All cores for one client: a second actor takes seconds to start.
    resources = f"num-supernodes=5 client-resources-num-cpus={os.cpu_count()}"
    command = ["flwr", "run", str(ROOT), "--stream"]
    command += ["--run-config", settings, "--federation-config", resources]
    done = subprocess.run(
        command,
        cwd=superlink["NEUTRAL"],
        env=superlink,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = done.stdout + done.stderr
    # `flwr run --stream` exits 0 for a failed run too: ask for the status itself.
    listed = subprocess.run(
        ["flwr", "list", "--format", "json"],
        cwd=superlink["NEUTRAL"],
        env=superlink,
        capture_output=True,
        text=True,
        check=True,
    )
    [entry] = json.loads(listed.stdout)["runs"]
    assert entry["status"] == "finished:completed", output
    [folder] = results.iterdir()
    assert (folder / "report.html").is_file()
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["byzantine-fraction"] == 0.4
    assert record["accepted"] == 10
    assert record["status"] == "finished"


def test_the_lines_of_the_docs_run_and_stop_what_they_started(tmp_path: Path) -> None:
    """As they stand there, but for the port, the folders and the size of the run."""
    section = (
        (ROOT / "docs" / "command-line.md").read_text().split("## The same app with `flwr run`")[1]
    )
    lines, port = section.split("```")[1], str(free_port())
    small = "dataset='mnist' num-clients=4 num-server-rounds=1 local-steps=1 "
    small += f"results-dir='{tmp_path / 'results'}'"
    for shown, here in (
        ("39191", port),
        ("$PWD/.venv/bin", str(BIN)),
        ("$PWD/results", str(tmp_path)),
        ("num-supernodes=10", "num-supernodes=4"),
        # All cores for one client: a second actor takes seconds to start.
        ("client-resources-num-cpus=1", f"client-resources-num-cpus={os.cpu_count()}"),
        ("byzantine-fraction=0.4", f"byzantine-fraction=0.4 model='tiny-cnn' {small}"),
        ("flwr list", f"flwr list --format json > {tmp_path / 'list'}"),
    ):
        assert shown in lines
        lines = lines.replace(shown, here)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    # Without the environment's programs, as for whoever has just run `make install`.
    folders = [f for f in environment["PATH"].split(os.pathsep) if not (Path(f) / "flwr").exists()]
    done = subprocess.run(
        ["bash", "-c", lines + '\nwait "$superlink"'],
        cwd=ROOT,
        env=environment | {"PATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (tmp_path / "list").exists(), done.stdout + done.stderr
    [entry] = json.loads((tmp_path / "list").read_text())["runs"]
    assert entry["status"] == "finished:completed", done.stdout + done.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0
    deadline = time.monotonic() + 60
    while left := [p for p in Path("/proc").glob("[0-9]*/environ") if str(tmp_path) in text_of(p)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)


def text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process is gone, or somebody else's
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the SuperLink ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port}")
