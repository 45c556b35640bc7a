"""A device for machines without one: tensors on the CPU that behave as if they were on a GPU.

They say that they are on ``cuda``, refuse to become NumPy arrays and to meet tensors of the CPU, as
those of a GPU do. What runs on them runs on a GPU as far as placement goes; speed and the GPU's own
kernels are another matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda")

# Tensors of the CPU that CUDA's own versions of these take as well.
_MEETS_THE_CPU = {"__getitem__", "__setitem__", "copy_"}
_LEAVES = {"cpu", "tolist", "item", "__float__", "__bool__", "__int__", "__index__"}


class PretendTensor(Tensor):
    """A tensor that pretends to be on a GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` where its tensors really are, once the rules of a GPU allow it."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.device:
            return DEVICE
        if name in ("numpy", "__array__", "data_ptr"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        target = _taken_device([*args, *kwargs.values()])
        tensors = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        strangers = [t for t in tensors if not isinstance(t, PretendTensor) and t.ndim > 0]
        if strangers and name not in _MEETS_THE_CPU and target is None:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        args, kwargs = _on_cpu(args), _on_cpu(kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if name in _LEAVES or (target is not None and target.type == "cpu"):
            return _as(Tensor, result)
        return result


class _Machine(TorchFunctionMode):
    """Puts what is asked for on ``cuda`` there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        target = _taken_device(values)
        if target is None or target.type == "cpu":
            return func(*args, **(kwargs or {}))
        return _as(PretendTensor, func(*_on_cpu(args), **_on_cpu(kwargs or {})))


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Make ``cuda`` a place where tensors can be put."""
    with _Machine():
        yield DEVICE


def _taken_device(values: list[Any]) -> torch.device | None:
    """Return the device that a call names."""
    for value in values:
        if isinstance(value, torch.device):
            return value
    return None


def _on_cpu(values: Any) -> Any:
    """Name the CPU instead of the GPU."""
    if isinstance(values, torch.device) and values.type == "cuda":
        return torch.device("cpu")
    if isinstance(values, dict):
        return {key: _on_cpu(value) for key, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_on_cpu(value) for value in values)
    return values


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _as(kind: type[Tensor], result: Any) -> Any:
    return result.as_subclass(kind) if isinstance(result, Tensor) else result
