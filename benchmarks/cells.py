"""Cells of a benchmark's table, measured several at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import TypeVar

import torch

from simulations.runner import pool

_Cell = TypeVar("_Cell")
_Outcome = TypeVar("_Outcome")


def measured(
    measure: Callable[[_Cell], _Outcome], wanted: Sequence[_Cell], jobs: int
) -> Iterator[tuple[_Cell, _Outcome]]:
    """Yield each cell with its outcome as it ends; each is measured on one thread."""
    torch.set_num_threads(1)
    if jobs == 1:
        yield from ((cell, measure(cell)) for cell in wanted)
        return
    with pool(jobs) as workers:
        pending = {workers.submit(measure, cell): cell for cell in wanted}
        try:
            yield from ((pending[future], future.result()) for future in as_completed(pending))
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
