"""The strategies' options as types (PEP 692), for type checkers and editors.

Written by ``python -m strategies.generate`` (``make config``) from their declarations; not to be
edited.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fl_bgmd.checkpoints import Checkpoints


class StrategyOptions(TypedDict, total=False):
    """The options of all strategies, and Flower's."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None
    evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None
    server_learning_rate: float | Callable[[int], float]
    """Step of the server along the update, above 0."""
    server_optimizer: str
    """The optimizer of the server (torch's), which takes the aggregate for a gradient."""
    server_momentum: float
    """Momentum of the server's SGD, 0 to below 1."""
    server_nesterov: bool
    """Whether the server's momentum is Nesterov's."""
    projection_radius: float
    """The model's trained values stay in a ball of this radius."""
    projection_center: Literal["initial", "origin"]
    """Center of the ball that ``projection_radius`` keeps the model in."""
    model_average: float
    """Share of the rounds so far over which the model is averaged that is evaluated, returned and
    saved, 0 to 1."""
    mixing: str
    """Pre-aggregation."""
    byzantine_fraction: float | str
    """Hostile share of the clients to prepare for, 0 to below 1/2."""
    weighting: Literal["uniform", "examples"]
    """Whether ``num-examples`` weights the clients."""
    min_valid_replies: int | None
    """Accepted replies without which a round keeps the model."""
    max_empty_rounds: int
    """How many rounds in a row may come to nothing before the run ends."""
    node_wait_timeout: float
    """Seconds to wait for enough nodes to be connected, above 0."""
    too_few_nodes: Literal["fail", "go-on"]
    """What to do when too few nodes are connected after ``node_wait_timeout``."""
    bench_after: int
    """Bad rounds in a row after which a node sits out."""
    bench_rounds: int
    """How many rounds a node sits out."""
    stale_updates: int
    """For how many rounds the last update of a client that is not asked stays in use."""
    stale_bytes: int
    """Memory for stale updates, in bytes (the oldest are dropped first)."""
    checkpoints: Checkpoints | str | Path | None
    """Folder to save checkpoints to and resume from."""
    compressor: str
    """Compressor of the updates of clients with :class:`fl_bgmd.mods.CompressionMod`."""
    error_feedback: bool
    """Whether clients add what compression lost to their next update."""
    shared_coordinates: bool
    """Whether the server chooses the coordinates of ``rand-k`` in each round, the same for all."""
    downlink_compressor: str
    """Compressor of the model on its way to the clients."""
    seed: int | None
    """Seed of the sampling of nodes, blocks and buckets, for runs that can be repeated."""
    device: str
    """Where the update matrix lives."""
    rows: Literal["auto", "memory", "file"]
    """Where the updates of a round are kept, one row for each client."""
    rows_dir: str | Path
    """Folder on a disk with room for the rows of a round."""
    shards: Literal["none", "ray"]
    """Where the rule works on the rows."""
    shards_address: str
    """``HOST:PORT`` of a running Ray cluster."""
    verdict_distances: bool
    """Whether verdicts say how far each update is from the aggregate, which costs about as much as
    a sum over the rows, with mixings four times as much."""
    on_round: Callable[[int, dict[str, float]], object] | None
    """Called after each round with its number and a dict of floats."""
    root_update: Callable[[ArrayRecord, int], ArrayRecord] | None
    """What the server's own data say, for rules that ask for a ``root``."""


class GMDOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.GMD`."""

    solver: Literal["gram", "newton", "weiszfeld"]
    """``gram`` iterates on the n x n Gram matrix."""
    tol: float
    """Iterate until the certified ``gap`` is at most this."""
    max_iter: int
    """Return the best point so far, with its true gap, after this many steps."""


class BGMDOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.BGMD`."""

    block_fraction: float
    """Share of the coordinates in a block, above 0 to 1."""
    min_block_size: int
    """The block has at least this many columns, all of fewer."""
    selection: Literal["sample", "top-k", "uniform"]
    """See :func:`~fl_bgmd.aggregators.sampling.select_block`."""
    score: Literal["clipped", "squared-norm", "norm"]
    """What a column is worth."""
    memory: Literal["robust", "mean", "per-client", "none"]
    """``mean`` is the paper's Equation 8."""
    solver: Literal["gram", "newton", "weiszfeld"]
    """Of the geometric median of the block."""
    tol: float
    """Of the geometric median of the block."""


class TrimmedMeanOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.TrimmedMean`."""

    trim_fraction: float | None
    """Dropped at each end."""


class NormThresholdOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.NormThreshold`."""

    drop_fraction: float | None
    """The paper's beta, 0 to below 1."""
    order: float
    """The paper's q, order of the norm, 1 or more."""
    norms: Literal["computed", "reported"]
    """Option II computes the norms of the updates as received."""


class RobustFilterOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.RobustFilter`."""

    sigma0: float | None
    """Above 0, the paper's sigma_0."""
    method: Literal["mean", "saddle"]
    """How a row is reconstructed from the others."""
    slack: float
    """The paper's eps', 0 to 1/4."""


class MultiKrumOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.MultiKrum`."""

    num_selected: int | None
    """How many are averaged, all where there are fewer."""


class CenteredClippingOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.CenteredClipping`."""

    radius: float | None
    """Above 0, the tau of the paper."""
    iterations: int
    """1 or more."""


class NormClippingOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.NormClipping`."""

    radius: float | None
    """Above 0."""


class DnCOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.DnC`."""

    iterations: int
    """Draws of coordinates, 1 or more."""
    coordinates: int
    """How many are drawn, 1 or more."""
    filter_share: float
    """What a draw leaves out, in multiples of the hostile share, above 0."""


class GapFilterOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.GapFilter`."""

    gap: float
    """1 or more."""
    far: float
    """1 or more, in median norms."""


class SignGuardOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.SignGuard`."""

    lower: float
    """The paper's L, 0 or more."""
    upper: float
    """The paper's R, above 0."""
    coordinate_share: float
    """Share of the coordinates that signs are counted in, above 0 to 1."""


class FoolsGoldOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.FoolsGold`."""

    confidence: float
    """Steepness of the weights, above 0."""


class FLAMEOptions(StrategyOptions, total=False):
    """The options of :class:`.rules.FLAME`."""

    noise: float
    """Standard deviation of normal noise to add, in median norms, 0 or more."""
