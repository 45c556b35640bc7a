"""Examples of the server's own in the app (key root-examples): whose they are, what it trains."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fl_bgmd import training
from fl_bgmd.data import held_out, load, partitions, root_examples
from fl_bgmd.models import build
from fl_bgmd.training import Job
from simulations.backends import run
from simulations.config import validate
from simulations.root import RootTraining

GIVEN = {
    **{"dataset": "mnist", "model": "mlp", "partition": "iid", "device": "cpu", "seed": 3},
    **{"num-clients": 5, "num-server-rounds": 3, "local-steps": 3, "batch-size": 16},
    **{"root-examples": 60, "evaluate-every": 3},
}


def test_root_examples_are_nobody_elses() -> None:
    dataset = load("mnist")
    own = root_examples(dataset, 100, seed=3, validation=0.1)
    assert len(own) == 100
    withheld = held_out(dataset, 0.1)
    shares = partitions(dataset, 10, scheme="iid", seed=3, validation=0.1, root=100)
    everything = np.sort(np.concatenate([withheld, own, *shares]))
    assert np.array_equal(everything, np.arange(60000))
    assert not np.array_equal(own, root_examples(dataset, 100, seed=4, validation=0.1))
    assert sum(map(len, partitions(dataset, 10, scheme="iid", seed=3))) == 60000


@pytest.fixture
def model() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(build("mlp", input_shape=(1, 28, 28)).state_dict())


def test_the_server_trains_as_its_clients_do(model: ArrayRecord) -> None:
    """By hand: plain SGD with momentum over as many batches of its examples, shuffled."""
    config = validate({**GIVEN, "strategy": "fltrust", "lr-schedule": "cosine"})
    dataset = load("mnist")
    trained = RootTraining(config, dataset)
    own = root_examples(dataset, 60, seed=3)
    draw = np.random.SeedSequence([3, 2, 0, 2]).generate_state(1)[0]
    order = np.random.default_rng(int(draw)).permutation(own)[:48].reshape(3, 16)
    net = build("mlp", input_shape=(1, 28, 28))
    net.load_state_dict(model.to_torch_state_dict())
    rate = 0.05 * 0.5 * (1 + np.cos(np.pi / 3))  # the second of three rounds
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    for batch in order:
        images = torch.from_numpy(dataset.train_images[batch].astype(np.float32))[:, None]
        scores = net((images / 255 - 0.1307) / 0.3081)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            scores, torch.from_numpy(dataset.train_labels[batch])
        ).backward()
        optimizer.step()
    found = trained(model, 2).to_torch_state_dict()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found[key], value)
    assert not torch.equal(found["1.weight"], trained(model, 1).to_torch_state_dict()["1.weight"])


def test_clients_train_on_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.int64]] = []

    def train(job: Job) -> Any:
        seen.append(job.indices)
        return training.train(job)

    monkeypatch.setattr("clients.client_app.train", train)
    run({**GIVEN, "strategy": "fltrust", "num-server-rounds": 1})
    assert len(seen) == 5
    assert not np.isin(root_examples(load("mnist"), 60, seed=3), np.concatenate(seen)).any()


@pytest.mark.parametrize("backend", ["inprocess", "vectorized"])
def test_fltrust_stands_against_a_majority(backend: str) -> None:
    hostile = {"attack": "bit-flip", "byzantine-fraction": 0.8, "num-server-rounds": 8}
    result = run({**GIVEN, **hostile, "strategy": "fltrust"}, backend=backend)
    assert result.status == "finished", result.error
    assert result.final_accuracy > 0.5
    other = run({**GIVEN, **hostile, "strategy": "gmd"}, backend=backend)
    assert other.final_accuracy < 0.3


def test_rules_that_ask_for_no_root_run_beside_it_on_the_same_shares() -> None:
    with_root = run({**GIVEN, "strategy": "gmd"})
    assert with_root.status == "finished"
    without = run({**GIVEN, "strategy": "gmd", "root-examples": 0})
    assert with_root.rounds[-1]["accuracy"] != without.rounds[-1]["accuracy"]
