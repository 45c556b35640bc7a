"""Where tensors live and how many threads work on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises ``ValueError`` for a name torch does not know or a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; this machine has {torch.cuda.device_count()}")
    return resolved


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Move images to the device, channels last: convolutions are a third faster that way."""
    # Not .contiguous(), which leaves the strides of gray images: both layouts are the same bytes.
    return images.to(device).to(memory_format=torch.channels_last)


@contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """Run the body with this number of torch threads, and reproducible convolutions on a GPU.

    Results then do not depend on the backend, nor from run to run on which sum came first.
    """
    cudnn = torch.backends.cudnn
    before, was_deterministic = torch.get_num_threads(), cudnn.deterministic
    torch.set_num_threads(threads)
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic = was_deterministic
        torch.set_num_threads(before)
