"""The processes in which runs and clients are computed, and what they take over from this one."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_all_start_methods, get_context, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any


@lru_cache(maxsize=1)
def workers() -> Any:
    """Return the ``multiprocessing`` context of workers.

    Where the system has it, a process that has imported torch and Flower once makes the workers:
    imports take each of them seconds otherwise.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context: BaseContext = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.backends", "fl_bgmd.clients"])
    return context


def take_over(environment: Mapping[str, str]) -> None:
    """Give a worker the environment of its parent, which may have changed since the imports."""
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Start processes that leave interrupts, which are this process's to answer, alone."""
    resource_tracker.ensure_running()  # it would be started with the first, and let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
