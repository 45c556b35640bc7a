"""The model on its way down, packed: what a strategy sends and what a client makes of it."""

import math

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fl_bgmd.compression import QSGD, Compressor, build_compressor
from fl_bgmd.replies import PACKED_KEY, ModelLayout

MODEL_RECORD = "fl-bgmd.model"
"""The ConfigRecord that describes a packed model."""


def build_downlink(name: str) -> Compressor | None:
    """Return the compressor of the model that ``name`` stands for, None for ``none``.

    Only ``qsgd`` and ``qsgd:levels``: it rounds every value a little, without bias, where the
    others would leave out or level most of the model. ``ValueError`` for anything else.
    """
    if name == "none":
        return None
    if name.partition(":")[0] != "qsgd":
        raise ValueError(f"downlink_compressor is {name!r}; allowed: none, qsgd, qsgd:levels")
    compressor = build_compressor(name)
    assert isinstance(compressor, QSGD)
    return compressor


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


def received_model(content: RecordDict) -> ArrayRecord:
    """Return the model in what a server sent, unpacked if it is packed."""
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
    compressor = build_compressor(str(described["compressor"]))
    data = arrays[PACKED_KEY].numpy().tobytes()
    values = compressor.decode(data, math.prod(layout.values.shape)).numpy()
    return layout.to_arrays(values.astype(layout.dtype), layout.buffer_values)


def unpack_model(content: RecordDict) -> None:
    """Put the unpacked model into a message's content in the packed one's place."""
    if MODEL_RECORD in content:
        [name] = content.array_records
        content[name] = received_model(content)
        del content[MODEL_RECORD]
