"""Timing and peak memory of a function in this process."""

import ctypes
import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

STATUS = Path("/proc/self/status")


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median wall clock of ``repeats`` calls, after one that does not count."""
    function()
    taken = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return how far memory rises during one call above what was in use before it.

    On the CPU this is the kernel's high-water mark of resident memory (Linux only; 0 elsewhere).
    """
    gc.collect()
    _release_freed_memory()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not STATUS.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = held_bytes("VmRSS")
    function()
    return max(0, held_bytes("VmHWM") - before)


def _release_freed_memory() -> None:
    """Give freed memory back to the system: what is still held would be used again, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held_bytes(key: str, status: Path = STATUS) -> int:
    """Return what the kernel says of a process under a key such as ``VmRSS`` (Linux).

    By default of this one; also what it says of the machine, in ``/proc/meminfo``.
    """
    [line] = [line for line in status.read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024


class Watching(ABC):
    """Something that is looked at from a thread while a block runs."""

    def __enter__(self) -> Self:
        """Begin to look."""
        self.done = threading.Event()
        self._thread = threading.Thread(target=self.look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self.done.set()
        self._thread.join()

    @abstractmethod
    def look(self) -> None:
        """Look again and again until :attr:`done` is set."""


def wait(device: torch.device) -> None:
    """Wait until a device has done its work; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
