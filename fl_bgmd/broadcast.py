"""The model on its way down, packed: what a strategy sends and what a client makes of it."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fl_bgmd.compression import Compressor, build_downlink, build_received
from fl_bgmd.replies import PACKED_KEY, ModelLayout

MODEL_RECORD = "fl-bgmd.model"
"""The ConfigRecord that describes a packed model."""


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
    packed = ArrayRecord({PACKED_KEY: Array(np.frombuffer(data, np.uint8))})
    for spec in layout.buffers:
        packed[spec.key] = arrays[spec.key]
    shapes = ["x".join(map(str, arrays[key].shape)) for key in layout.keys]
    described = ConfigRecord(
        {
            "compressor": compressor.name,
            "keys": layout.keys,
            "dtypes": [arrays[key].dtype for key in layout.keys],
            "shapes": shapes,
        }
    )
    content = RecordDict({"arrays": packed, MODEL_RECORD: described})
    return content, received_model(content)


def received_model(content: RecordDict, own: Iterable[object] = ()) -> ArrayRecord:
    """Return the model in what a server sent, unpacked if it is packed.

    ``own``: see :func:`fl_bgmd.compression.build_received`.
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
    compressor = build_downlink(named, lambda text: build_received(text, own))
    if compressor is None:
        raise ValueError(f"the model is packed with compressor {named!r}; allowed: any but that")
    data = arrays[PACKED_KEY].numpy().tobytes()
    values = compressor.decode(data, math.prod(layout.values.shape)).numpy()
    return layout.to_arrays(values.astype(layout.dtype), layout.buffer_values)


def unpack_model(content: RecordDict, own: Iterable[object] = ()) -> None:
    """Put the unpacked model into a message's content in the packed one's place.

    ``own``: see :func:`fl_bgmd.compression.build_received`.
    """
    if MODEL_RECORD in content:
        [name] = content.array_records
        content[name] = received_model(content, own)
        del content[MODEL_RECORD]
