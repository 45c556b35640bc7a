"""Vectors that a client keeps from round to round, in Flower's ``Context.state``.

The grids of this project's simulations, on Ray too, hold it and save it in checkpoints. SuperNodes,
and Flower's own simulation, hold it in memory, for one run: a run that was submitted again, or a
SuperNode that was started again, begins without.
"""

import torch
from flwr.app import Array, ArrayRecord, Context
from torch import Tensor


def kept(context: Context, name: str, like: Tensor) -> Tensor:
    """Return the vector that was kept under a name, zeros where none of that shape is there."""
    record = context.state.array_records.get(name)
    if record is None:
        return torch.zeros_like(like)
    [vector] = record.values()
    if tuple(vector.shape) != tuple(like.shape):
        return torch.zeros_like(like)
    return torch.from_numpy(vector.numpy().copy())


def keep(context: Context, name: str, vector: Tensor) -> None:
    """Keep a vector under a name; one that is not finite leaves what was there."""
    if bool(torch.isfinite(vector).all()):
        context.state[name] = ArrayRecord({"vector": Array(vector.numpy())})
