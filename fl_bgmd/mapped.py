"""Matrices in files without a name, for what does not fit into memory.

A mapped matrix is a tensor like any other; the system reads and writes its pages as they are
used, and takes their memory back when it needs it. What rules make of it that is as large as itself
goes to a file, too: see :func:`like`.
"""

import math
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

SMALL = 2**20
"""Bytes of what is made of a mapped matrix and stays in memory all the same."""

_folders: dict[int, Path] = {}
"""Where the file of a mapped storage is, by the storage's address."""


class NoRoomError(OSError):
    """There is no room for a file, or no way to write it."""


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return an uninitialized tensor in a file in ``folder``, which nobody else can see.

    The file has no name, so that nothing is left of it after a crash, and all of its bytes are
    reserved: a full disk is an error here and not later.

    Raises
    ------
    NoRoomError
        Naming the folder, with the bytes needed and free.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise NoRoomError(f"{folder} has {free:,} bytes free and {size:,} are needed")
        with tempfile.TemporaryFile(dir=folder) as file:
            os.truncate(file.fileno(), size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except NoRoomError:
        raise
    except OSError as error:
        raise NoRoomError(f"{folder}, where {size:,} bytes are needed: {error}") from error
    if hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_SEQUENTIAL)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    address = tensor.untyped_storage().data_ptr()
    _folders[address] = folder
    weakref.finalize(memory, _folders.pop, address, None)
    return tensor


def folder_of(tensor: Tensor) -> Path | None:
    """Return where the file of a tensor, or of what it is a view of, is; None for memory."""
    if not _folders or tensor.device.type != "cpu":
        return None
    return _folders.get(tensor.untyped_storage().data_ptr())


def like(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return a mapped tensor beside a mapped one; None if it is not, or little is asked for."""
    folder = folder_of(tensor)
    if folder is None or math.prod(shape) * dtype.itemsize <= SMALL:
        return None
    return mapped(shape, dtype, folder)
