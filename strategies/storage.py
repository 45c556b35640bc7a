"""Where the rows of a round are: in memory, or in a file where they would not fit."""

import logging
import os
import tempfile
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_bgmd.filed import filed
from fl_bgmd.mapped import NoRoomError, mapped
from fl_bgmd.shards import Crew

from .errors import RowsError
from .settings import Settings

LOG = logging.getLogger("flwr.fl_bgmd")

SHARE = 0.5
"""``auto`` takes a file for rows that need more of the available memory than this."""

_SMALL = 2**20
"""Bytes: rows that need no more stay in memory without a look at how much of it there is."""


def rows_in_file(count: int, width: int, dtype: torch.dtype, settings: Settings) -> Tensor | None:
    """Return a matrix (count, width) in a file where the settings ask for one; None: memory.

    Raises
    ------
    RowsError
        Where there is no room for the file, nor, under ``auto``, in memory.
    """
    size = count * width * dtype.itemsize
    if settings.rows == "memory" or size == 0 or (settings.rows == "auto" and size <= _SMALL):
        return None
    available = available_memory() if settings.rows == "auto" else None
    if settings.rows == "auto" and (available is None or size <= SHARE * available):
        return None
    folder = _folder(settings)
    try:
        rows = mapped((count, width), dtype, folder)
    except NoRoomError as error:
        why = f"the rows of a round ({count} x {width}) go to a file in rows_dir: {error}"
        if available is None or size > available:
            raise RowsError(why) from error
        LOG.warning("%s; %s bytes of memory are available: they stay there", why, f"{available:,}")
        return None
    LOG.info("the rows of the round (%s bytes) are in a file in %s", f"{size:,}", folder)
    return rows


def model_in_file(arrays: ArrayRecord, settings: Settings) -> ArrayRecord:
    """Return a model in a file where the rows are to be in one; elsewhere as it is.

    Raises :class:`.errors.RowsError` where there is no room for it.
    """
    if settings.rows != "file":
        return arrays
    try:
        return filed(arrays, _folder(settings))
    except NoRoomError as error:
        raise RowsError(f"the model goes to a file in rows_dir: {error}") from error


def _folder(settings: Settings) -> Path:
    return Path(settings.rows_dir or tempfile.gettempdir()).expanduser()


def crew_for(settings: Settings) -> Crew | None:
    """Return who holds the shards of the rows where the settings ask for it.

    Raises :class:`~fl_bgmd.shards.ShardsError` where nobody answers.
    """
    if settings.shards == "none":
        return None
    from fl_bgmd.ray_shards import RayCrew

    return RayCrew(settings.shards_address)


def available_memory() -> int | None:
    """Return how many bytes of memory can still be used, None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = dict(line.split(":", 1) for line in lines)
        free = int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    return min([free, *_left_to_group()])


def _left_to_group(group: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return what a limit of this container leaves, nothing where there is none."""
    try:
        limit = int((group / "memory.max").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        # Pages of files are taken back where memory is short.
        return [max(0, limit - int(dict(line.split(" ", 1) for line in lines)["anon"]))]
    except (OSError, KeyError, ValueError):
        return []
