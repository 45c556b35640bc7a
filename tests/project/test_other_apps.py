"""Other shapes of Flower apps: subclasses, loops of their own, mods, models that are no arrays."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import regression_app, regression_error, regression_model
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fl_bgmd.mods import ByzantineMod
from fl_bgmd.strategies import BGMD, GMD
from simulations.grid import InProcessGrid

NODES = 10


def grid_of(app: ClientApp) -> InProcessGrid:
    return InProcessGrid(app, NODES, {})


def attacked(attack: str = "bit-flip") -> InProcessGrid:
    return grid_of(regression_app([ByzantineMod(attack=attack, fraction=0.3)]))


class SavesTheBest(GMD):
    """An app's subclass with a loop of its own, as of Flower's advanced examples."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.best: tuple[float, ArrayRecord] | None = None
        self.seen: list[int] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self.seen.append(len(replies))
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            metrics["rounds-so-far"] = server_round
        return arrays, metrics

    def run(self, grid: Grid, arrays: ArrayRecord, rounds: int) -> list[MetricRecord]:
        found = []
        for number in range(1, rounds + 1):
            asked = self.configure_train(number, arrays, ConfigRecord({"lr": 0.1}), grid)
            replies = grid.send_and_receive(asked, timeout=60)
            new, metrics = self.aggregate_train(number, replies)
            assert metrics is not None
            found.append(metrics)
            if new is not None:
                arrays = new
            asked = self.configure_evaluate(number, arrays, ConfigRecord({}), grid)
            told = self.aggregate_evaluate(number, grid.send_and_receive(asked, timeout=60))
            assert told is not None
            loss = float(told["loss"])  # type: ignore[arg-type]
            if self.best is None or loss < self.best[0]:
                self.best = loss, arrays
        return found


def test_a_subclass_with_a_loop_of_its_own_learns_under_attack() -> None:
    strategy = SavesTheBest(min_train_nodes=NODES, min_available_nodes=NODES, seed=1)
    metrics = strategy.run(attacked(), regression_model(), 40)
    assert strategy.seen == [NODES] * 40
    assert [each["rounds-so-far"] for each in metrics] == [*range(1, 41)]
    assert strategy.best is not None
    assert regression_error(strategy.best[1]) < 0.1 * regression_error(regression_model())


def test_the_same_subclass_under_flower_s_own_loop() -> None:
    strategy = SavesTheBest(min_train_nodes=NODES, min_available_nodes=NODES, seed=1)
    result = strategy.start(grid=attacked(), initial_arrays=regression_model(), num_rounds=40)
    assert [m["rounds-so-far"] for m in result.train_metrics_clientapp.values()] == [*range(1, 41)]
    assert regression_error(result.arrays) < 0.1 * regression_error(regression_model())


def test_mods_of_an_app_s_own_around_ours() -> None:
    seen: list[float] = []

    def clips(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Clip what the client learned, as private training does, and note its length."""
        [sent] = message.content.array_records.values()
        before = {key: array.numpy() for key, array in sent.items()}
        reply = call_next(message, context)
        [(name, got)] = reply.content.array_records.items()
        change = {key: array.numpy() - before[key] for key, array in got.items()}
        norm = float(np.sqrt(sum(np.square(part).sum() for part in change.values())))
        seen.append(norm)
        factor = np.float32(min(1.0, 0.5 / max(norm, 1e-12)))
        clipped = {key: before[key] + factor * part for key, part in change.items()}
        reply.content[name] = ArrayRecord({key: _array(value) for key, value in clipped.items()})
        return reply

    app = regression_app([ByzantineMod(attack="bit-flip", fraction=0.3), clips])
    strategy = BGMD(min_train_nodes=NODES, min_available_nodes=NODES, fraction_evaluate=0.0, seed=1)
    result = strategy.start(grid=grid_of(app), initial_arrays=regression_model(), num_rounds=60)
    assert len(seen) == 60 * NODES
    assert regression_error(result.arrays) < 0.2 * regression_error(regression_model())


@pytest.mark.filterwarnings("ignore")
def test_private_training_with_opacus() -> None:
    opacus = pytest.importorskip(
        "opacus", reason="opacus is not installed: make test-peers trains with it"
    )
    true = torch.tensor([[1.0, -2.0, 0.5]])
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=0.3)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.manual_seed(int(context.node_config["partition-id"]))
        inputs = torch.randn(64, 3)
        model = nn.Linear(3, 1, bias=False)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        private, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
            data_loader=DataLoader(TensorDataset(inputs, inputs @ true.T), batch_size=16),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
        )
        for batch, targets in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(private(batch), targets).backward()
            optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 64}),
        }
        return Message(RecordDict(content), reply_to=message)

    strategy = GMD(min_train_nodes=NODES, min_available_nodes=NODES, fraction_evaluate=0.0, seed=1)
    initial = ArrayRecord({"weight": torch.zeros(1, 3)})
    result = strategy.start(grid=grid_of(app), initial_arrays=initial, num_rounds=20)
    found = result.arrays.to_torch_state_dict()["weight"]
    assert float((found - true).norm()) < 0.2 * float(true.norm())


def _array(value: Any) -> Array:
    return Array(np.asarray(value, np.float32))


@pytest.mark.parametrize("first", [b"", b'{"learner": {}}'])
def test_tree_models_have_no_parameters_to_average(first: bytes) -> None:
    trees = ArrayRecord([np.frombuffer(first, np.uint8)])
    strategy = BGMD(min_train_nodes=NODES, min_available_nodes=NODES)
    with pytest.raises(ValueError, match=r"no floating-point array.*uint8.*tree models"):
        strategy.start(grid=attacked(), initial_arrays=trees, num_rounds=1)


def test_what_secure_aggregation_hides_is_no_update() -> None:
    """Masked updates are vectors of integers: each alone is noise, and is refused as such."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        masked = np.random.default_rng(context.node_id).integers(0, 2**22, 10)
        content = {"arrays": ArrayRecord([masked]), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    strategy = GMD(
        min_train_nodes=NODES,
        min_available_nodes=NODES,
        fraction_evaluate=0.0,
        max_empty_rounds=1,
    )
    with pytest.raises(RuntimeError, match="valid replies"):
        strategy.start(grid=grid_of(app), initial_arrays=regression_model(), num_rounds=1)
