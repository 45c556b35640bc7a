"""The wire format: what goes down to the clients and what comes up, each written and read here.

Down: the model's arrays, packed or not, and the :class:`Terms` of the round. Up: arrays, packed or
not, metrics, and which attack they are the work of. What is read here is one's own, or a server's;
what a server receives passes :mod:`fl_bgmd.replies` first.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fl_bgmd.compression import Compressor, build_downlink, build_received
from fl_bgmd.layout import ModelLayout

MODEL_RECORD = "fl-bgmd.model"
"""The ConfigRecord that describes a packed model."""

PACKED_KEY = "fl-bgmd.packed"
"""Key of the array that holds a packed update, or a packed model, in place of the model's own."""

PACKED_RECORD = "compression"
"""ConfigRecord of a packed reply: the compressor and the update's norm."""

ATTACK_RECORD = "byzantine"
"""ConfigRecord in which a hostile reply says, for the record, which attack it played."""

COMPRESSION_ERROR = "compression-error"
"""The metric of a packed reply with the share of the squared norm that the packing has lost."""

EXAMPLES = "num-examples"
"""The metric with the number of examples."""

PARTITION = "partition-id"
"""The metric, and the key of a node's configuration, with the number of its partition."""

_TERMS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "round": ("server-round", int),
    "seed": ("round-seed", int),
    "compressor": ("compressor", str),
    "error_feedback": ("error-feedback", bool),
    "compression_seed": ("compression-seed", int),
    "norm_order": ("norm-order", float),
}
"""Fields of :class:`Terms`: the key of each in a configuration, and its type there."""


# ---------------------------------------------------------------------------------------- down


@dataclass(frozen=True)
class Terms:
    """What a round asks of its clients, and what they may draw from.

    Attributes
    ----------
    round : int
        Its number; 0 where none was sent.
    seed : int, optional
        What clients draw from in this round, each with its partition.
    compressor : str, optional
        The name of the compressor that updates are to be packed with.
    error_feedback : bool
        Whether clients keep what the compression lost.
    compression_seed : int, optional
        What the coordinates that the server chose for all follow from.
    norm_order : float, optional
        Of the norm that clients are to report with packed updates; None: Euclidean.
    """

    round: int = 0
    seed: int | None = None
    compressor: str | None = None
    error_feedback: bool = True
    compression_seed: int | None = None
    norm_order: float | None = None

    def to_config(self, config: ConfigRecord) -> None:
        """Write the terms into a round's configuration, what is None left out."""
        for name, (key, _) in _TERMS.items():
            value = getattr(self, name)
            if value is not None and (name != "error_feedback" or self.compressor is not None):
                config[key] = value

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the terms in a configuration; what is missing has its default."""
        found: dict[str, Any] = {}
        for name, (key, read) in _TERMS.items():
            if key in config:
                found[name] = read(config[key])
        return cls(**found)

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """Read the terms in what a server sent."""
        merged: dict[str, Any] = {}
        for name, config in content.items():
            # The model's record names a compressor, too: the model's.
            if name != MODEL_RECORD and isinstance(config, ConfigRecord):
                merged.update(config)
        return cls.from_config(merged)

    def packing(
        self, own: Compressor | None = None, specs: Iterable[object] = ()
    ) -> Compressor | None:
        """Return the compressor of this round's updates, None where none is asked for.

        ``own`` takes the place of the one asked for; ``specs``: see
        :func:`fl_bgmd.compression.build_received`.
        """
        if own is None and self.compressor is None:
            return None
        made = own or build_received(str(self.compressor), specs)
        return made if self.compression_seed is None else made.for_round(self.compression_seed)


def server_round(message: Message) -> int:
    """Return the round that a message names, 0 where it names none."""
    return Terms.of(message.content).round


def pack_model(
    arrays: ArrayRecord, compressor: Compressor, seed: int
) -> tuple[RecordDict, ArrayRecord]:
    """Return the records that stand for a model, and the model that clients make of them.

    Trained arrays are packed together, buffers stay as they are. The rounding is drawn from
    ``seed``.
    """
    layout = ModelLayout(arrays)
    generator = torch.Generator().manual_seed(seed)
    data = compressor.encode(torch.from_numpy(layout.values), generator)
    shapes = ["x".join(map(str, arrays[key].shape)) for key in layout.keys]
    described = ConfigRecord(
        {
            "compressor": compressor.name,
            "keys": layout.keys,
            "dtypes": [arrays[key].dtype for key in layout.keys],
            "shapes": shapes,
        }
    )
    content = RecordDict({"arrays": _packed(data, layout, arrays), MODEL_RECORD: described})
    return content, received_model(content)


def received_model(content: RecordDict, specs: Iterable[object] = ()) -> ArrayRecord:
    """Return the model in what a server sent, unpacked if it is packed.

    ``specs``: see :func:`fl_bgmd.compression.build_received`.
    """
    [arrays] = content.array_records.values()
    described = content.config_records.get(MODEL_RECORD)
    if described is None:
        return arrays
    keys, dtypes, shapes = (described[name] for name in ("keys", "dtypes", "shapes"))
    assert isinstance(keys, list)
    assert isinstance(dtypes, list)
    assert isinstance(shapes, list)
    like = ArrayRecord()
    for key, dtype, shape in zip(keys, dtypes, shapes, strict=True):
        sizes = [int(size) for size in str(shape).split("x") if size]
        like[str(key)] = arrays.get(str(key)) or Array(np.zeros(sizes, str(dtype)))
    layout = ModelLayout(like)
    named = str(described["compressor"])
    compressor = build_downlink(named, lambda text: build_received(text, specs))
    if compressor is None:
        raise ValueError(f"compressor is {named!r} for a packed model; allowed: another one")
    data = arrays[PACKED_KEY].numpy().tobytes()
    values = compressor.decode(data, math.prod(layout.values.shape)).numpy()
    return layout.to_arrays(values.astype(layout.dtype), layout.buffer_values)


def unpack_model(content: RecordDict, specs: Iterable[object] = ()) -> None:
    """Put the unpacked model into a message's content in the packed one's place.

    ``specs``: see :func:`fl_bgmd.compression.build_received`.
    """
    if MODEL_RECORD in content:
        [name] = content.array_records
        content[name] = received_model(content, specs)
        del content[MODEL_RECORD]


# ------------------------------------------------------------------------------------------ up


def packed_keys(layout: ModelLayout) -> list[str]:
    """Return the keys of the arrays of a packed model: the bytes', and the buffers' own."""
    return [PACKED_KEY, *(spec.key for spec in layout.buffers)]


def _packed(data: bytes, layout: ModelLayout, arrays: ArrayRecord) -> ArrayRecord:
    first, *buffers = packed_keys(layout)
    values = Array(np.frombuffer(data, np.uint8))
    return ArrayRecord({first: values, **{key: arrays[key] for key in buffers}})


def packed_with(content: RecordDict) -> str | None:
    """Return the compressor that one's own reply names, None where it is not packed."""
    [arrays] = content.array_records.values()
    if PACKED_KEY not in arrays:
        return None
    return str(content.config_records[PACKED_RECORD]["compressor"])


@dataclass(frozen=True)
class TrainedReply:
    """A reply to training in the hands of who may change it: a client's mod, an adversary.

    Attributes
    ----------
    content : RecordDict
        The reply's.
    sent : ModelLayout
        The model that was to be trained.
    compressor : Compressor or None
        What the reply is packed with, or was to be.
    update : Tensor
        (d,) of ``sent.dtype``: what the server would read in it.
    model : ModelLayout
        The model that it stands for, in its own dtypes, with its buffers.
    """

    content: RecordDict
    sent: ModelLayout
    compressor: Compressor | None
    update: Tensor
    model: ModelLayout

    @classmethod
    def read(cls, content: RecordDict, sent: ModelLayout, compressor: Compressor | None) -> Self:
        """Read a reply, which holds a model or a packed update."""
        [arrays] = content.array_records.values()
        if PACKED_KEY not in arrays:
            # In the order sent: a client may reply in another one.
            model = ModelLayout({key: arrays[key] for key in sent.keys})
            update = torch.from_numpy(sent.values - model.values)
            return cls(content, sent, compressor, update, model)
        assert compressor is not None  # nobody packs a reply without one
        data = arrays[PACKED_KEY].numpy().tobytes()
        update = compressor.for_shapes(sent.shapes).decode(data, sent.num_directions)
        update = update.to(torch.from_numpy(sent.values).dtype)
        plain = sent.to_arrays(sent.values - update.numpy(), sent.buffer_values)
        for spec in sent.buffers:
            plain[spec.key] = arrays[spec.key]
        return cls(content, sent, compressor, update, ModelLayout(plain))

    def replace(self, update: Tensor) -> None:
        """Put a model that amounts to ``update`` into the reply, in the dtypes that it had.

        It is not packed: who replaces an update may send anything. Raises nothing for an update
        that is not finite.
        """
        plain = update if self.compressor is None else self.compressor.as_plain(update)
        self._put(self.model.to_arrays(self.sent.values - plain.numpy(), self.model.buffer_values))
        if PACKED_RECORD in self.content:
            del self.content[PACKED_RECORD]

    def pack(self, data: bytes, compressor: Compressor, norm: float) -> None:
        """Put what ``compressor`` has written into the reply in place of the model's arrays."""
        [arrays] = self.content.array_records.values()
        self._put(_packed(data, self.model, arrays))
        described = ConfigRecord({"compressor": compressor.name, "norm": norm})
        self.content[PACKED_RECORD] = described

    def _put(self, arrays: ArrayRecord) -> None:
        [name] = self.content.array_records
        self.content[name] = arrays


def mark(reply: Message, name: str) -> None:
    """Write into a reply which attack it is the work of."""
    reply.content[ATTACK_RECORD] = ConfigRecord({"attack": name})


def marked(content: RecordDict) -> str | None:
    """Return the attack that a reply says it is the work of, None for an honest one."""
    record = content.config_records.get(ATTACK_RECORD)
    return None if record is None else str(record.get("attack", ""))
