"""Real Ray, real Flower processes: the same run everywhere."""

import os
import time

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


DEAD = "127.0.0.1:9"
"""A cluster that does not answer."""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("backend", "jobs"), [("ray", 1), ("flower", 1), ("inprocess", 2)])
def test_runs_agree_to_the_bit_wherever_their_clients_are(
    backend: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", DEAD)  # no run has anything to do with it
    config = validate(SMALL)
    # All cores for one client of Flower's engine: a second actor takes seconds to start.
    cores = float(os.cpu_count() or 1) if backend == "flower" else 1.0
    ray = run(config, backend=backend, resources=ClientResources(num_cpus=cores), jobs=jobs)
    here = run(config, backend="inprocess")
    assert ray.status == here.status == "finished", ray.error
    for there, local in zip(ray.rounds, here.rounds, strict=True):
        assert {k: v for k, v in there.items() if not k.endswith("seconds")} == {
            k: v for k, v in local.items() if not k.endswith("seconds")
        }
        assert "cpu-seconds" not in there  # other processes compute
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
        backend_config=ClientResources().to_backend_config(),
    )
    [result] = results
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["missing"] for m in rounds] == [0, 1, 0, 0, 0, 0]
    assert [m["accepted"] for m in rounds] == [3, 2, 3, 3, 3, 3]
    assert sum(m.get("late", 0) for m in rounds) == 1
    [model] = result.arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(model, 0.06, rtol=1e-5)
