"""The ClientApp: load the partition, train, evaluate; lie when the attack says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor, nn

from fl_bgmd.attacks import AttackPlan, Bound
from fl_bgmd.data import Dataset, load, normalize, partitions
from fl_bgmd.devices import repeatable, resolve_device
from fl_bgmd.evaluation import evaluate
from fl_bgmd.held import answer, tensors_of
from fl_bgmd.models import build
from fl_bgmd.mods import ByzantineMod, CompressionMod, MomentumMod, role
from fl_bgmd.training import Corrupt, Job, LocalTraining, Trained, train, train_together
from fl_bgmd.wire import EXAMPLES, PARTITION, mark, server_round

# Hostile clients adhere to the compression (Option I of Ghosh et al.) or send anything (Option II),
# as compress-lies says. Momentum is that of honest updates, or of lies too: one of the two is at
# work, as client-momentum-of-lies says.
app = ClientApp(
    mods=[
        ByzantineMod(compressed=False),
        CompressionMod(),
        MomentumMod(lies=True),
        ByzantineMod(compressed=True),
        MomentumMod(lies=False),
    ]
)


_prepared: dict[tuple[int, int], tuple[Job, Bound | None, Trained]] = {}
"""What :func:`prepare_together` did and no client has fetched yet, by round and partition."""


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train the received model on this client's partition."""
    prepared = _prepared.pop(_key(message, context), None)
    if prepared is None:
        dataset = _dataset(context)
        model = _received(message, context, dataset)
        job, attack = _training_job(message, context, model, dataset)
        with repeatable(int(context.run_config["client-threads"])):
            trained = train(job)
    else:
        job, attack, trained = prepared
    metrics: dict[str, int | float | list[int] | list[float]] = {
        EXAMPLES: len(job.indices),
        "train-loss": trained.loss,
        PARTITION: int(context.node_config[PARTITION]),
    }
    received = message.content["arrays"]
    assert isinstance(received, ArrayRecord)
    arrays = answer(received, trained.state)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    reply = Message(content, reply_to=message)
    if attack is not None:
        mark(reply, str(attack))
    return reply


def prepare_together(messages: Sequence[tuple[Message, Context]]) -> None:
    """Train the clients of a round together, ahead of :func:`handle_train`.

    Messages that carry another model than the first are left to it.
    """
    _prepared.clear()
    asked = [pair for pair in messages if pair[0].metadata.message_type == MessageType.TRAIN]
    if not asked:
        return
    first, config = asked[0][0].content["arrays"], asked[0][1].run_config
    asked = [pair for pair in asked if pair[0].content["arrays"] is first]
    dataset = _dataset(asked[0][1])
    model = _received(*asked[0], dataset)
    work = [_training_job(*pair, model, dataset) for pair in asked]
    with repeatable(int(config["client-threads"])):
        results = train_together(model, [job for job, _ in work])
    for pair, (job, attack), trained in zip(asked, work, results, strict=True):
        _prepared[_key(*pair)] = (job, attack, trained)


def _training_job(
    message: Message, context: Context, model: nn.Module, dataset: Dataset
) -> tuple[Job, Bound | None]:
    """Return what this client is to do with the model, and the data attack it plays at it."""
    config = context.run_config
    number, partition_id = _key(message, context)
    seed = np.random.SeedSequence([int(config["seed"]), number, partition_id, 1])
    shares = partitions(
        dataset,
        int(context.node_config["num-partitions"]),
        scheme=str(config["partition"]),
        seed=int(config["seed"]),
        validation=float(config["validation-fraction"]),
        root=int(config["root-examples"]),
    )
    settings = LocalTraining.from_config(config, number)
    attack, corrupt = _data_attack(message, context, dataset)
    device = resolve_device(str(config["device"]))
    drawn = int(seed.generate_state(1)[0])
    return Job(model, dataset, shares[partition_id], settings, drawn, device, corrupt), attack


def _key(message: Message, context: Context) -> tuple[int, int]:
    """Return the round and the partition that a message is about."""
    return server_round(message), int(context.node_config[PARTITION])


@app.evaluate()
def handle_evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this client's even share of the test examples."""
    dataset = _dataset(context)
    model = _received(message, context, dataset)
    device = resolve_device(str(context.run_config["device"]))
    partition_id = int(context.node_config[PARTITION])
    shares = np.array_split(
        np.arange(len(dataset.test_labels)), int(context.node_config["num-partitions"])
    )
    with repeatable(int(context.run_config["client-threads"])):
        found = evaluate(model, dataset, shares[partition_id], device)
    metrics: dict[str, int | float | list[int] | list[float]] = {
        EXAMPLES: found.count,
        "loss": found.loss,
        "accuracy": found.accuracy,
        PARTITION: partition_id,
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _data_attack(
    message: Message, context: Context, dataset: Dataset
) -> tuple[Bound | None, Corrupt | None]:
    """Return the data attack that this client plays in this round, and what it does to a batch."""
    plan = AttackPlan.from_config(context.run_config)
    bound = role(plan, message, context)
    if bound is None or bound.attack.place != "data":
        return None, None
    partition_id = int(context.node_config[PARTITION])
    number, count = server_round(message), int(context.node_config["num-partitions"])
    rng = np.random.default_rng(plan.client_seed(number, partition_id))
    player = plan.player(count, number, partition_id)

    def corrupt(images: NDArray[Any], labels: NDArray[np.int64]) -> Any:
        if bound.is_normalized:
            images = normalize(images, dataset).numpy()
        return bound.corrupt(images, labels, dataset.num_classes, rng, player)

    return bound, corrupt


@dataclass(frozen=True, eq=False)
class _Skeleton:
    """A model whose weights every message brings: built once per process.

    Attributes
    ----------
    model : nn.Module
        The one that all clients of the process work with, one after the other.
    tensors : dict of Tensor
        Its parameters and buffers, by their keys in a ``state_dict``.
    """

    model: nn.Module
    tensors: dict[str, Tensor]

    def load(self, state: dict[str, Tensor]) -> nn.Module:
        """Return the model with these weights, not copied, and copies of these buffers."""
        fits = state.keys() == self.tensors.keys() and all(
            value.shape == self.tensors[key].shape and value.dtype == self.tensors[key].dtype
            for key, value in state.items()
        )
        if not fits:  # torch says what does not, or takes another dtype
            self.model.load_state_dict(state, assign=True)
            self.tensors.update(self.model.state_dict(keep_vars=True))
        for key, value in state.items():
            target = self.tensors[key]
            target.grad = None
            # Layers write into their statistics.
            target.data = value if isinstance(target, nn.Parameter) else value.clone()
        return self.model


@lru_cache(maxsize=4)
def _skeleton(name: str, dataset: Dataset) -> _Skeleton:
    """Build a model without weights."""
    with torch.device("meta"):
        model = build(name, input_shape=dataset.input_shape, num_classes=dataset.num_classes)
    # Not to_empty, which loads torch's compiler: a second of every process.
    empty = {key: torch.empty(v.shape, dtype=v.dtype) for key, v in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    return _Skeleton(model, model.state_dict(keep_vars=True))


def _dataset(context: Context) -> Dataset:
    """Return the data, loaded once per process."""
    config = context.run_config
    return load(str(config["dataset"]), str(config["data-dir"]) or None)


def _received(message: Message, context: Context, dataset: Dataset) -> nn.Module:
    """Return the model that a message carries."""
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return _skeleton(str(context.run_config["model"]), dataset).load(tensors_of(arrays))
