"""Strategies by name beside the rules they stand for, and rounds with honest replies to them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from every_rule import call
from flower_messages import (
    MALFORMED,
    honest_reply,
    needed,
    plain_model,
    random_update,
    sent_arrays,
    shrunk,
    to_numpy,
    update_row,
)
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

import fl_bgmd.strategies
from fl_bgmd.aggregators import (
    RULES,
    Aggregate,
    block_geometric_median,
    centered_clipping,
    divide_and_conquer,
    flame,
    gap_filter,
    geometric_median,
    multi_krum,
    norm_clip,
    norm_threshold,
    sign_guard,
    spectral_filter,
    trimmed_mean,
)
from fl_bgmd.strategies import (
    BGMD,
    CMD,
    FLAME,
    GMD,
    CenteredClipping,
    DnC,
    FoolsGold,
    GapFilter,
    MultiKrum,
    NormClipping,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    SignGuard,
    TrimmedMean,
)
from simulations.grid import InProcessGrid

NODES = 10

FRACTION = 0.2

SEED = 11

Rule = Callable[..., Aggregate]
"""Of the rows, the generator and, where it needs one, the ``root``."""

CLASSES: dict[str, type[RobustStrategy]] = {
    name: type("Named", (RobustStrategy,), {"spec": name}) for name in RULES
} | {
    cls.spec: cls
    for cls in vars(fl_bgmd.strategies).values()
    if isinstance(cls, type) and "spec" in vars(cls) and cls.spec
}
"""By the name of its rule; rules that have no class are given one."""


def default(name: str) -> tuple[type[RobustStrategy], dict[str, Any], Rule]:
    """Return the strategy of a rule with its own options, and the rule."""

    def rule(rows: Tensor, generator: torch.Generator, **root: Tensor) -> Aggregate:
        found: Aggregate = call(
            name, rows, generator=generator, byzantine_fraction=FRACTION, **root
        )
        return found

    return CLASSES[name], {}, rule


STRATEGIES: dict[str, tuple[type[RobustStrategy], dict[str, Any], Rule]] = {
    **{name: default(name) for name in RULES},
    # By choice: other options, and where the defaults would say little of sixteen coordinates.
    "bgmd": (
        BGMD,
        {"block_fraction": 0.4, "min_block_size": 1},
        lambda rows, generator: block_geometric_median(
            rows, block_fraction=0.4, min_block_size=1, generator=generator
        ),
    ),
    "bgmd-paper": (
        BGMD,
        {
            "selection": "top-k",
            "score": "squared-norm",
            "memory": "mean",
            **{"block_fraction": 0.5, "min_block_size": 1},
        },
        lambda rows, _: block_geometric_median(
            rows,
            selection="top-k",
            score="squared-norm",
            memory_rule="mean",
            block_fraction=0.5,
            min_block_size=1,
        ),
    ),
    "gmd-weiszfeld": (
        GMD,
        {"solver": "weiszfeld", "tol": 1e-4},
        lambda rows, _: geometric_median(rows, solver="weiszfeld", tol=1e-4),
    ),
    "trimmed-mean": (TrimmedMean, {}, lambda rows, _: trimmed_mean(rows, trim_fraction=FRACTION)),
    "trimmed-mean-own": (
        TrimmedMean,
        {"trim_fraction": 0.4},
        lambda rows, _: trimmed_mean(rows, trim_fraction=0.4),
    ),
    "norm-threshold": (
        NormThreshold,
        {"order": 1.5},
        lambda rows, _: norm_threshold(rows, drop_fraction=FRACTION, order=1.5),
    ),
    "norm-threshold-own": (
        NormThreshold,
        {"drop_fraction": 0.5},
        lambda rows, _: norm_threshold(rows, drop_fraction=0.5),
    ),
    "robust-filter-sigma": (
        RobustFilter,
        {"sigma0": 0.3},
        lambda rows, _: spectral_filter(rows, byzantine_fraction=FRACTION, sigma0=0.3),
    ),
    "robust-filter-own": (
        RobustFilter,
        {"method": "saddle", "sigma0": 0.5},
        lambda rows, _: spectral_filter(
            rows, byzantine_fraction=FRACTION, sigma0=0.5, method="saddle"
        ),
    ),
    "multi-krum-own": (
        MultiKrum,
        {"num_selected": 3},
        lambda rows, _: multi_krum(rows, byzantine_fraction=FRACTION, num_selected=3),
    ),
    "centered-clipping-own": (
        CenteredClipping,
        {"radius": 0.5, "iterations": 2},
        lambda rows, _: centered_clipping(rows, radius=0.5, iterations=2),
    ),
    "norm-clip-own": (NormClipping, {"radius": 0.5}, lambda rows, _: norm_clip(rows, radius=0.5)),
    "dnc": (
        DnC,
        {"coordinates": 5, "iterations": 3},
        lambda rows, generator: divide_and_conquer(
            rows,
            byzantine_fraction=FRACTION,
            generator=generator,
            coordinates=5,
            iterations=3,
        ),
    ),
    "gap-filter": (
        GapFilter,
        {"gap": 1.1, "far": 3.0},
        lambda rows, _: gap_filter(rows, byzantine_fraction=FRACTION, gap=1.1, far=3.0),
    ),
    "sign-guard": (
        SignGuard,
        {"coordinate_share": 0.5},
        lambda rows, generator: sign_guard(rows, generator=generator, coordinate_share=0.5),
    ),
    "flame": (
        FLAME,
        {"noise": 0.1},
        lambda rows, generator: flame(rows, generator=generator, noise=0.1),
    ),
}

ONE_OF_EACH = [name for name in STRATEGIES if not name.endswith("-own")]

MEMORIES = ("robust", "mean", "per-client", "none")

STATEFUL: dict[str, tuple[type[RobustStrategy], dict[str, Any]]] = {
    **{
        f"bgmd-{rule}": (BGMD, {"memory": rule, "block_fraction": 0.3, "min_block_size": 1})
        for rule in MEMORIES
    },
    "centered-clipping": (CenteredClipping, {}),
    "fools-gold": (FoolsGold, {}),
    "centering": (GMD, {"mixing": "centering+clipping:factor=0.5"}),
    "momentum": (GMD, {"server_momentum": 0.9}),
    "adam": (GMD, {"server_optimizer": "adam", "server_learning_rate": 0.1}),
    "momentum-and-memory": (
        BGMD,
        {"server_momentum": 0.5, "block_fraction": 0.3, "min_block_size": 1},
    ),
    "bucketing": (CMD, {"mixing": "bucketing"}),
}


def make(cls: type[RobustStrategy], **options: Any) -> RobustStrategy:
    given = {"byzantine_fraction": FRACTION, "seed": SEED, "device": "cpu"}
    return cls(**given | needed(cls) | options)


def named(name: str, **options: Any) -> RobustStrategy:
    cls, own, _ = STRATEGIES[name]
    return make(cls, **{**own, **options})


def silent_grid(nodes: int = NODES) -> InProcessGrid:
    """Nodes to send to; the tests write their replies."""
    return InProcessGrid(ClientApp(), nodes, {})


def messages_of(
    strategy: RobustStrategy, arrays: ArrayRecord, server_round: int = 1, nodes: int = NODES
) -> list[Message]:
    config = ConfigRecord()
    return list(strategy.configure_train(server_round, arrays, config, silent_grid(nodes)))


def node(message: Message) -> int:
    """Return the node that a train message is for."""
    return message.metadata.dst_node_id


def honest_replies(
    messages: Iterable[Message], seed: int = 0, *, partitions: bool = True
) -> list[Message]:
    """One honest reply to each message, the update drawn for its node."""
    return [
        honest_reply(
            message,
            random_update(sent_arrays(message), [seed, node(message)]),
            num_examples=10 * node(message),
            partition=node(message) - 1 if partitions else None,
            metrics={"loss": 1.0 / node(message)},
        )
        for message in messages
    ]


def rows_of(messages: Iterable[Message], replies: Iterable[Message]) -> Tensor:
    by_node = {node(message): message for message in messages}
    rows = [update_row(by_node[reply.metadata.src_node_id], reply) for reply in replies]
    return torch.from_numpy(np.stack(rows))


def flat(arrays: ArrayRecord) -> NDArray[Any]:
    return np.concatenate([value.ravel() for value in to_numpy(arrays).values()])


def moved(arrays: ArrayRecord, update: Tensor, learning_rate: float = 1.0) -> NDArray[Any]:
    return flat(arrays) - learning_rate * update.numpy()


def expected_of(
    name: str, rows: Tensor, model: ArrayRecord, generator: torch.Generator | None = None
) -> Aggregate:
    """Return what the rule of :data:`STRATEGIES` makes of the rows of a round on the model."""
    cls, _, rule = STRATEGIES[name]
    root = {"root": torch.from_numpy(flat(shrunk(model, 1)))} if needed(cls) else {}
    return rule(rows, generator or torch.Generator().manual_seed(SEED), **root)


def train_round(
    strategy: RobustStrategy,
    arrays: ArrayRecord,
    server_round: int = 1,
    reply: Callable[[list[Message]], Iterable[Message]] = honest_replies,
    nodes: int = NODES,
) -> tuple[ArrayRecord, MetricRecord]:
    result, metrics = strategy.aggregate_train(
        server_round, reply(messages_of(strategy, arrays, server_round, nodes))
    )
    assert result is not None
    assert metrics is not None
    return result, metrics


def without_time(metrics: MetricRecord, *ignored: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.endswith("-seconds") and key not in ignored
    }


BAD_NODE = 4


@functools.cache
def usual_replies() -> tuple[Message, ...]:
    """Honest replies to a round on the plain model, made once."""
    return tuple(honest_replies(messages_of(named("mean"), plain_model())))


def with_one_bad(kind: str) -> Callable[[list[Message]], list[Message]]:
    def reply(messages: list[Message]) -> list[Message]:
        replies = list(usual_replies())
        position = [node(message) for message in messages].index(BAD_NODE)
        replies[position] = MALFORMED[kind].build(messages[position])
        return replies

    return reply


def honest_without_bad(messages: list[Message]) -> list[Message]:
    return [reply for reply in usual_replies() if reply.metadata.src_node_id != BAD_NODE]
