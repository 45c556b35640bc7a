"""The ClientApp: load the partition, train, evaluate; lie when the attack says so."""

from copy import deepcopy
from functools import lru_cache

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from clients.training import (
    Corrupt,
    LocalTraining,
    evaluate,
    scheduled_learning_rate,
    threads,
    train,
)
from fl_bgmd.attacks import ATTACKS, AttackPlan
from fl_bgmd.data import Dataset, load, partition
from fl_bgmd.models import build
from fl_bgmd.mods import ByzantineMod, CompressionMod, mark, role, server_round
from fl_bgmd.strategies import resolve_device

# Hostile clients adhere to the compression: Option I of Ghosh et al.
app = ClientApp(mods=[CompressionMod(), ByzantineMod()])


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train the received model on this client's partition."""
    config = context.run_config
    partition_id = int(context.node_config["partition-id"])
    number = server_round(message)
    seed = np.random.SeedSequence([int(config["seed"]), number, partition_id, 1])
    dataset, model, device = _prepare(message, context)
    indices = _partitions(
        dataset,
        int(context.node_config["num-partitions"]),
        str(config["partition"]),
        int(config["num-shards"]),
        float(config["alpha"]),
        int(config["seed"]),
    )[partition_id]
    settings = LocalTraining(
        steps=int(config["local-steps"]),
        epochs=int(config["local-epochs"]),
        batch_size=int(config["batch-size"]),
        learning_rate=scheduled_learning_rate(
            float(config["learning-rate"]),
            str(config["lr-schedule"]),
            number,
            int(config["num-server-rounds"]),
            period=int(config["lr-period"]),
            decay=float(config["lr-decay"]),
        ),
        momentum=float(config["momentum"]),
        weight_decay=float(config["weight-decay"]),
    )
    attack, corrupt = _data_attack(message, context, dataset)
    with threads(int(config["client-threads"])):
        loss = train(
            model, dataset, indices, settings, int(seed.generate_state(1)[0]), device, corrupt
        )
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": len(indices),
        "train-loss": loss,
        "partition-id": partition_id,
    }
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    reply = Message(content, reply_to=message)
    if attack is not None:
        mark(reply, attack)
    return reply


@app.evaluate()
def handle_evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this client's even share of the test examples."""
    dataset, model, device = _prepare(message, context)
    partition_id = int(context.node_config["partition-id"])
    shares = np.array_split(
        np.arange(len(dataset.test_labels)), int(context.node_config["num-partitions"])
    )
    with threads(int(context.run_config["client-threads"])):
        found = evaluate(model, dataset, shares[partition_id], device)
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": found.count,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "partition-id": partition_id,
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _data_attack(
    message: Message, context: Context, dataset: Dataset
) -> tuple[str | None, Corrupt | None]:
    """Return the data attack that this client plays in this round, and what it does to a batch."""
    plan = AttackPlan.from_config(context.run_config)
    name = role(plan, message, context)
    corrupt = None if name is None else ATTACKS[name].corrupt
    if name is None or corrupt is None:
        return None, None
    partition_id = int(context.node_config["partition-id"])
    rng = np.random.default_rng(plan.client_seed(server_round(message), partition_id))
    strength, classes = plan.value(name), dataset.num_classes
    return name, lambda images, labels: corrupt(images, labels, strength, classes, rng)


@lru_cache(maxsize=4)
def _partitions(
    dataset: Dataset, count: int, scheme: str, num_shards: int, alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    """Partition the training examples: once per process, not in each round of each client."""
    return partition(
        dataset.train_labels,
        count,
        scheme=scheme,
        num_shards=num_shards,
        alpha=alpha,
        seed=seed,
    )


@lru_cache(maxsize=4)
def _skeleton(name: str, dataset: Dataset) -> nn.Module:
    """Build a model without weights, once per process: no client draws any that it replaces."""
    with torch.device("meta"):
        return build(name, input_shape=dataset.input_shape, num_classes=dataset.num_classes)


def _prepare(message: Message, context: Context) -> tuple[Dataset, nn.Module, torch.device]:
    """Load what both phases need: the data (once per process), the model as received, a device."""
    config = context.run_config
    dataset = load(str(config["dataset"]), str(config["data-dir"]) or None)
    model = deepcopy(_skeleton(str(config["model"]), dataset))
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    model.load_state_dict(arrays.to_torch_state_dict(), assign=True)
    return dataset, model, resolve_device(str(config["device"]))
