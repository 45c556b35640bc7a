"""Real Ray, real Flower processes: the same run everywhere."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.simulation import run_simulation

from fl_bgmd.strategies import Mean
from simulations.backends import ClientResources, run
from simulations.config import Config, ConfigError, validate

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL: Config = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "num-server-rounds": 2,
    "num-clients": 4,
    "local-steps": 2,
    "batch-size": 16,
    # One that the grid plays, one that runs on the client and needs the client's state.
    "attack": "ipm+delayed",
    "byzantine-fraction": 0.5,
    "byzantine-selection": "fixed",
    "assumed-byzantine-fraction": 0.25,
    "evaluate-every": 2,
    "fraction-evaluate": 1.0,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("backend", "jobs"), [("ray", 1), ("flower", 1), ("inprocess", 2)])
def test_runs_agree_to_the_bit_wherever_their_clients_are(backend: str, jobs: int) -> None:
    config = validate(SMALL)
    ray = run(config, backend=backend, resources=ClientResources(num_cpus=1.0), jobs=jobs)
    here = run(config, backend="inprocess")
    assert ray.status == here.status == "finished", ray.error
    phases = ("aggregation", "screening", "rule", "waiting", "evaluation")
    timings = {"seconds", *(f"{phase}-seconds" for phase in phases)}
    for there, local in zip(ray.rounds, here.rounds, strict=True):
        assert {k: v for k, v in there.items() if k not in timings} == {
            k: v for k, v in local.items() if k not in timings
        }
    assert ray.rounds[-1]["accepted"] == 4
    assert ray.played == here.played == {"ipm": 2, "delayed": 1}


def test_several_jobs_inside_a_run_are_for_clients_of_this_machine() -> None:
    for backend in ("ray", "flower", "vectorized"):
        with pytest.raises(ConfigError, match=rf"jobs is 2 with backend {backend}; allowed: 1, "):
            run(SMALL, backend=backend, jobs=2)


def test_more_resources_than_the_machine_has_are_refused() -> None:
    gpus = torch.cuda.device_count()
    with pytest.raises(
        ConfigError, match=rf"client-resources-num-gpus is 64; allowed: 0 to {gpus}"
    ):
        ClientResources(num_gpus=64)
    with pytest.raises(ConfigError, match=r"client-resources-num-cpus is 0; allowed: 1 to"):
        ClientResources(num_cpus=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_clients_and_server_use_the_gpu() -> None:
    resources = ClientResources(num_gpus=0.25)
    assert resources.to_backend_config()["client_resources"]["num_gpus"] == 0.25
    result = run(validate(SMALL | {"device": "cuda"}), backend="ray", resources=resources)
    assert result.status == "finished", result.error
    assert result.rounds[-1]["accepted"] == 4


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


def test_nobody_is_told_to_stop_what_is_not_theirs() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*")]
    for page in (page for page in pages if page.is_file() and page.suffix != ".npz"):
        text = page.read_text(errors="replace")
        assert "pkill" not in text, page
        assert "killall" not in text, page


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_client_slower_than_the_deadline_is_counted_and_stays_out() -> None:
    """In round 2 client 0 sleeps past the deadline; its model of thousands comes later."""
    app, server = ClientApp(), ServerApp()
    results: list[Result] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])
        [sent] = message.content.array_records.values()
        step = 0.01
        if context.node_config["partition-id"] == 0 and number == 2:
            time.sleep(30)
            step = 1000.0
        elif number > 2:
            time.sleep(3)  # there must be rounds left when the late reply comes
        model = ArrayRecord({key: Array(value.numpy() + step) for key, value in sent.items()})
        content = {"arrays": model, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Mean(fraction_evaluate=0.0, min_available_nodes=3)
        arrays = ArrayRecord({"w": Array(np.zeros(5, np.float32))})
        results.append(strategy.start(grid, arrays, num_rounds=6, timeout=20))

    run_simulation(
        server,
        app,
        num_supernodes=3,
        backend_config={
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        },
    )
    [result] = results
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["missing"] for m in rounds] == [0, 1, 0, 0, 0, 0]
    assert [m["accepted"] for m in rounds] == [3, 2, 3, 3, 3, 3]
    assert sum(m.get("late", 0) for m in rounds) == 1
    [model] = result.arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(model, 0.06, rtol=1e-5)
