"""Figures of each round for TensorBoard, beside the run that they are of (key ``log-to``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_bgmd.extras import require

from .config import Config, ConfigError


def check_log(config: Config, folder: Path | None) -> None:
    """Check that what ``log-to`` asks for can be written, before anything starts.

    Raises
    ------
    ConfigError
        For a run without a folder.
    MissingExtraError
        Where TensorBoard is not installed.
    """
    log_to = config["log-to"]
    if log_to == "none":
        return
    require("tensorboard", f"log-to {log_to}", "tensorboard")
    if folder is None:
        raise ConfigError(f"log-to is {log_to!r} without a folder; allowed: none, or a folder")


class FigureLog:
    """Writes the figures of each round as event files; nothing where ``log-to`` is ``none``.

    Parameters
    ----------
    config : dict
        A validated configuration that :func:`check_log` has passed.
    folder : Path, optional
        Of the run.
    """

    def __init__(self, config: Config, folder: Path | None) -> None:
        self._folder = None if config["log-to"] == "none" else folder
        self._writer: Any = None

    def __call__(self, number: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a round."""
        if self._folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A run that is resumed or repeated hides what an earlier one has left from here on.
            self._writer = SummaryWriter(str(self._folder), purge_step=number)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()  # or minutes pass before TensorBoard sees them

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
