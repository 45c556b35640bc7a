"""Checkpoints: state that survives a crash, as safetensors and JSON, never pickled.

One file for each checkpoint, named by its round and its SHA-256, written beside its place, flushed
to the disk and renamed: whatever moment a process dies at, the newest file that carries its own
checksum is whole.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

LOG = logging.getLogger("flwr.fl_bgmd")

_NAME = re.compile(r"round-(\d{8})-([0-9a-f]{64})\.safetensors")
_ENTRY = "fl-bgmd"
"""The metadata entry of a file that holds everything but the tensors."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or a folder that another run is using."""


class Checkpoints:
    """A folder of checkpoints of one run.

    Parameters
    ----------
    folder : str or Path
        Made when needed. One folder for each run.
    keep : int
        How many checkpoints stay, 1 or more.
    every : int
        A checkpoint after each so many rounds (and after the last), 1 or more.
    identity : dict
        What the run is: JSON values by name. A checkpoint that was written under another identity
        is refused.

    Raises
    ------
    ValueError
        For an argument outside of the above.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        every: int = 1,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        if not str(folder):
            raise ValueError("folder is ''; allowed: a folder")
        self.folder = Path(folder).resolve()
        self.keep = keep
        self.every = every
        self.identity = dict(identity or {})

    def save(self, number: int, state: Mapping[str, Any], identity: Mapping[str, Any]) -> Path:
        """Write the state after round ``number``; delete what is older than the last ``keep``.

        ``state`` is a tree of dicts and lists whose leaves are tensors, bytes, numbers, strings and
        None; ``identity`` adds to the one given at construction. Returns the file.
        """
        tensors: dict[str, Tensor] = {}
        described = {
            "round": number,
            "identity": self.identity | dict(identity),
            "state": _describe(state, tensors),
        }
        data = to_safetensors(tensors, metadata={_ENTRY: json.dumps(described)})
        path = self.folder / (f"round-{number:08d}-{hashlib.sha256(data).hexdigest()}.safetensors")
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        self._flush_folder()
        for _, old in self._found()[self.keep :]:
            if old != path:
                old.unlink()
        return path

    def load(self, identity: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return round and state of the newest checkpoint that is whole, None if there is none.

        A damaged one is set aside (``.damaged``) with a warning.

        Raises
        ------
        CheckpointError
            If it belongs to another run, with what differs.
        """
        for number, path in self._found():
            if hashlib.sha256(path.read_bytes()).hexdigest() not in path.name:
                LOG.warning("checkpoint %s is damaged: it is skipped", path)
                path.rename(path.with_suffix(".damaged"))
                continue
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()[_ENTRY])
                self._compare(path, described["identity"], self.identity | dict(identity))
                return number, _restore(described["state"], file.get_tensor)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder for this run; :class:`CheckpointError` while another run has it.

        What a crashed run has left unfinished is deleted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"{self.folder} is in use by another run") from error
            for path in self.folder.glob("round-*.unfinished"):
                path.unlink()
            yield

    def _found(self) -> list[tuple[int, Path]]:
        """Return the checkpoints, newest first."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("round-*"))
        return sorted(((int(m[1]), path) for m, path in matches if m is not None), reverse=True)

    def _flush_folder(self) -> None:
        """Make the rename itself survive a power cut."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @staticmethod
    def _compare(path: Path, written: dict[str, Any], wanted: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(wanted))
        missing = "not set"
        differing = [
            f"{key} was {written.get(key, missing)!r} and is {wanted.get(key, missing)!r}"
            for key in sorted(written.keys() | wanted.keys())
            if written.get(key, missing) != wanted.get(key, missing)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint {path} is of another run: {'; '.join(differing)}. Use another folder, "
                "or the configuration it was written with"
            )


def _describe(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON; tensors and bytes go into ``tensors`` and leave their name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, bytes):
        name = str(len(tensors))
        tensors[name] = torch.from_numpy(np.frombuffer(value, np.uint8).copy())
        return {"bytes": name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _describe(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        if all(isinstance(item, bool | int | float | str) for item in value):
            return {"values": list(value)}
        return {"list": [_describe(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint")


def _restore(value: Any, tensor: Any) -> Any:
    """Undo :func:`_describe`; ``tensor(name)`` returns a tensor."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "bytes":
        return tensor(content).numpy().tobytes()
    if kind == "pairs":
        return {key: _restore(item, tensor) for key, item in content}
    if kind == "values":
        return content
    return [_restore(item, tensor) for item in content]
