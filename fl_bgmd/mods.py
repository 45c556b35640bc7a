"""Flower client mods: put them before any ClientApp.

``ClientApp(mods=[ByzantineMod()])``
"""

import math
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fl_bgmd.aggregators.norms import norms_of_order
from fl_bgmd.attacks import ATTACKS, AttackPlan, Bound, View, build_attacks
from fl_bgmd.attacks.plan import refuse_former
from fl_bgmd.client_state import keep, kept
from fl_bgmd.compression import build_compressor, build_received
from fl_bgmd.layout import ModelLayout
from fl_bgmd.momentum import MomentumMod
from fl_bgmd.wire import (
    COMPRESSION_ERROR,
    PARTITION,
    Terms,
    TrainedReply,
    mark,
    marked,
    packed_with,
    server_round,
    unpack_model,
)

__all__ = ["ByzantineMod", "CompressionMod", "MomentumMod", "role"]

_PAST = "fl-bgmd.past-update"
_ERROR = "fl-bgmd.compression-error"
_COMPRESSED = "compress-lies"


@dataclass(frozen=True)
class ByzantineMod:
    """Let a client lie when it is its turn: it trains honestly, then sends something else.

    Works alike in simulation and on a SuperNode, for the attacks that need nothing but the
    client's own update. Each setting that is None is read from the run configuration; the
    partition comes from the node configuration (``partition-id``, ``num-partitions``), the round
    from the message. A lie carries a ConfigRecord ``byzantine`` that names the attack: experiments
    count what was played.

    Attributes
    ----------
    attack : str, optional
        A name of :data:`fl_bgmd.attacks.ATTACKS` or ``package.module:NAME`` of your own, with
        options behind a colon (``bit-flip:5``); several joined by ``+`` (dealt out to the hostile
        clients in turns), or ``none``. Run config: ``attack``. Given here it has to be one that
        this mod plays: on the update, knowing no other (from the run configuration the others are
        left to the client's training and the grid).
    fraction : float, optional
        Hostile fraction of the clients. Run config: ``byzantine-fraction``.
    selection : str, optional
        ``per-round`` or ``fixed``. Run config: ``byzantine-selection``.
    seed : int, optional
        Run config: ``seed``.
    compressed : bool, optional
        For an app that has the mod before and behind :class:`CompressionMod`: act only where the
        run configuration's ``compress-lies`` (by default true) says the same. By default always.
    strength, preset : None
        Gone: an error names what takes their place.
    """

    attack: str | None = None
    fraction: float | None = None
    selection: str | None = None
    seed: int | None = None
    compressed: bool | None = None
    strength: InitVar[None] = None
    preset: InitVar[None] = None

    def __post_init__(self, strength: None, preset: None) -> None:
        """Refuse what cannot be, and attacks that would silently not be played."""
        former = {"strength": strength, "preset": preset}
        refuse_former({key: value for key, value in former.items() if value is not None}, former)
        AttackPlan.from_config(self._given())
        for bound in build_attacks(self.attack or "none"):
            if not bound.attack.is_local:
                local = ", ".join(name for name, attack in ATTACKS.items() if attack.is_local)
                raise ValueError(f"attack is {str(bound)!r}; allowed in a client mod: {local}")

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Run the client, then replace its update if it is hostile in this round."""
        elsewhere = self.compressed is not None and (
            self.compressed != context.run_config.get(_COMPRESSED, True)
        )
        if elsewhere:
            return call_next(message, context)
        error = context.state.array_records.get(_ERROR)
        reply = call_next(message, context)
        plan = self.plan(context)
        is_train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if not plan.attacks or not is_train or not reply.has_content():
            return reply
        bound = role(plan, message, context)
        # One on the data was played in training: what is left of it is to inflate the update.
        boosting = None
        if bound is not None and not bound.attack.is_local:
            if bound.attack.boost and marked(reply.content) == str(bound):
                boosting = bound
            bound = None  # played in training or by the grid
        past = _past_updates(context) if plan.num_past else ()
        if bound is None and boosting is None and not plan.num_past:
            return reply
        [sent] = message.content.array_records.values()
        named = packed_with(reply.content)
        own = None if named is None else Terms.of(message.content).packing(build_received(named))
        trained = TrainedReply.read(reply.content, ModelLayout(sent), own)
        update = trained.update
        if plan.num_past:
            _remember(context, (*past, update)[-plan.num_past :])
        num_clients = int(context.node_config["num-partitions"])
        num_byzantine = len(plan.roles(num_clients, server_round(message)))
        if boosting is not None:
            trained.replace(boosting.boosted(update, num_clients, num_byzantine))
        if bound is None or (bound.num_past and not past):
            return reply  # with nothing stale to send yet
        view = View(
            update=update,
            generator=torch.Generator().manual_seed(
                plan.client_seed(server_round(message), int(context.node_config["partition-id"]))
            ),
            num_clients=num_clients,
            num_byzantine=num_byzantine,
            past=past,
        )
        if bound.attack.untrained:
            [record] = reply.content.array_records
            reply.content[record] = sent  # byte for byte, statistics of its layers included
        else:
            trained.replace(bound.lie(view))
        mark(reply, str(bound))
        # Nor does a lie that nobody compresses spoil the memory of the client's honest rounds.
        if error is not None:
            context.state[_ERROR] = error
        elif _ERROR in context.state:
            del context.state[_ERROR]
        return reply

    def plan(self, context: Context) -> AttackPlan:
        """Return the plan: this mod's own settings over those of the run configuration."""
        return AttackPlan.from_config({**context.run_config, **self._given()})

    def _given(self) -> dict[str, Any]:
        """Return this mod's own settings by their keys in a run configuration."""
        own: dict[str, Any] = {
            "attack": self.attack,
            "byzantine-fraction": self.fraction,
            "byzantine-selection": self.selection,
            "seed": self.seed,
        }
        return {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True)
class CompressionMod:
    """Let a client send its update packed, with error feedback across rounds.

    The reply's arrays give way to one array of bytes (:data:`fl_bgmd.wire.PACKED_KEY`) and the
    model's buffers as they are; nothing else in the app changes. A strategy with ``compressor=``
    asks for it in each round's configuration; under any other strategy, and for replies that are
    no model, the mod does nothing. It also unpacks models of strategies with
    ``downlink_compressor=``, which clients without it do not understand: put it first.

    Put before :class:`ByzantineMod` (``mods=[CompressionMod(), ByzantineMod()]``) hostile clients
    adhere to the protocol (Option I of Ghosh et al.): what they send is compressed. Put after it,
    they send anything (Option II).

    What the packing has lost goes with the reply's metrics, as ``compression-error``:
    ``||p - Q(p)||^2 / ||p||^2``, so 1 minus the delta of Definition 4 that this round had.

    Attributes
    ----------
    compressor : str, optional
        See :func:`fl_bgmd.compression.build_compressor`; by default what the strategy asks for. One
        that is named here is used whatever the strategy asks for, and read by no other strategy
        than one with the same. Of compressors of your own a message gives the name alone, which has
        to be known on the client: name it here or in the run configuration (``compressor``), or
        import its module in the client app.
    error_feedback : bool, optional
        Whether what the compression lost is added to the next update: ``p = g + e``, ``Q(p)`` is
        sent, ``e <- p - Q(p)`` (Algorithm 2 of Ghosh et al.). The strategy's choice by default.
        Compressors without a guarantee (``delta`` 0: plain signs, scaled rand-k of less than
        half) have no memory. It lives in the client's ``Context.state``.
    """

    compressor: str | None = None
    error_feedback: bool | None = None

    def __post_init__(self) -> None:
        """Refuse a compressor that cannot be built, before any round."""
        if self.compressor is not None:
            build_compressor(self.compressor)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Unpack the model, run the client, pack its update."""
        specs = _own_specs(context)
        unpack_model(message.content, specs)
        terms = Terms.of(message.content)
        is_train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        own = None if self.compressor is None else build_compressor(self.compressor)
        compressor = terms.packing(own, specs) if is_train else None
        reply = call_next(message, context)
        if compressor is None or not reply.has_content():
            return reply
        [sent] = message.content.array_records.values()
        records = list(reply.content.array_records.values())
        if len(records) != 1 or set(records[0]) != set(sent):
            return reply  # no model: the server's screening says so
        before = ModelLayout(sent)
        trained = TrainedReply.read(reply.content, before, compressor)
        update, compressor = trained.update, compressor.for_shapes(before.shapes)
        feedback = terms.error_feedback if self.error_feedback is None else self.error_feedback
        # A client that is hostile for a round does not spoil its own honest rounds' memory.
        feedback = feedback and marked(reply.content) is None
        # What is no contraction would make the memory grow forever.
        feedback = feedback and compressor.delta(len(update)) > 0
        if feedback:
            update = update + kept(context, _ERROR, update)
        data = compressor.encode(update, _generator(terms, context))
        lost = update - compressor.decode(data, len(update))
        if feedback:
            keep(context, _ERROR, lost)
        whole = _norm(update, None)
        share = (_norm(lost, None) / whole) ** 2 if whole else 0.0
        share = share if math.isfinite(share) else 0.0  # of an update that is not finite
        for metrics in reply.content.metric_records.values():
            metrics[COMPRESSION_ERROR] = share
        norm = whole if terms.norm_order is None else _norm(update, terms.norm_order)
        trained.pack(data, compressor, norm)
        return reply


def _norm(update: Tensor, order: float | None) -> float:
    """Return a norm of an update, Euclidean for None; whatever an update that is not finite has."""
    if order is None or not bool(torch.isfinite(update).all()):
        return float(torch.linalg.vector_norm(update, dtype=torch.float64))
    [norm] = norms_of_order(update[None], order)
    return float(norm)


def _own_specs(context: Context) -> list[object]:
    """Return the compressors that the run configuration names: the app's own, not a message's."""
    keys = ("compressor", "downlink-compressor")
    return [context.run_config[key] for key in keys if key in context.run_config]


def _generator(terms: Terms, context: Context) -> torch.Generator | None:
    """Return what this client's rounding of this round is drawn from, the same in each re-run."""
    if terms.seed is None or PARTITION not in context.node_config:
        return None
    draw = np.random.SeedSequence([terms.seed, int(context.node_config[PARTITION])])
    return torch.Generator().manual_seed(int(draw.generate_state(1)[0]))


def role(plan: AttackPlan, message: Message, context: Context) -> Bound | None:
    """Return the attack that this client plays in this round, None if it is honest."""
    roles = plan.roles(int(context.node_config["num-partitions"]), server_round(message))
    return roles.get(int(context.node_config["partition-id"]))


def _past_updates(context: Context) -> tuple[Tensor, ...]:
    """Return the updates that the client has kept, oldest first."""
    record = context.state.array_records.get(_PAST)
    if record is None:
        return ()
    return tuple(torch.from_numpy(record[key].numpy().copy()) for key in sorted(record))


def _remember(context: Context, updates: tuple[Tensor, ...]) -> None:
    """Keep updates in the client's state: in Ray and on a SuperNode they outlive the process."""
    context.state[_PAST] = ArrayRecord(
        {f"{i:06d}": Array(np.ascontiguousarray(update)) for i, update in enumerate(updates)}
    )
