"""Timing and peak memory of a function in this process."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median wall clock of ``repeats`` calls, after one that does not count."""
    function()
    taken = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return how far memory rises during one call above what was in use before it.

    On the CPU this is the kernel's high-water mark of resident memory (Linux only; 0 elsewhere).
    """
    gc.collect()
    _release_freed_memory()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kilobytes(status, "VmRSS")
    function()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _release_freed_memory() -> None:
    """Give freed memory back to the system: what is still held would be used again, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kilobytes(status: Path, key: str) -> int:
    [line] = [line for line in status.read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
