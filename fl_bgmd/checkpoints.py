"""Checkpoints: state that survives a crash, as safetensors and JSON, never pickled.

One file for each checkpoint, named by its round and its SHA-256, written beside its place, flushed
to the disk and renamed: whatever moment a process dies at, the newest file that carries its own
checksum is whole. A disk that is full costs the checkpoint, not the run. Nothing of the state is
copied as a whole, neither by writing it nor by reading it.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

LOG = logging.getLogger("flwr.fl_bgmd")

_NAME = re.compile(r"round-(\d{8})-([0-9a-f]{64})\.safetensors")
_ENTRY = "fl-bgmd"
"""The metadata entry of a file that holds everything but the tensors."""

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""What safetensors calls them."""

_PIECE = 2**24
"""Bytes that are copied at a time of a tensor that is not in one piece of memory."""


_UNREADABLE = (
    *(OSError, SafetensorError, RecursionError),
    *(AttributeError, KeyError, TypeError, ValueError),
)
"""What reading a file raises that no run has written."""


class CheckpointError(RuntimeError):
    """A checkpoint or a folder that cannot be used."""


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing, and see that files can be written there.

    Raises ``OSError`` where they cannot: also on a full disk, which still lets files be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


class Checkpoints:
    """A folder of checkpoints of one run.

    Parameters
    ----------
    folder : str or Path
        Made when needed; ``~`` is the home folder. One folder for each run.
    keep : int
        How many checkpoints stay, 1 or more.
    every : int
        Rounds between checkpoints (the last round always has one), 1 or more.
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
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: 1 or more, a whole number")
        if not isinstance(folder, str | Path) or not str(folder):
            raise ValueError(f"folder is {folder!r}; allowed: a folder")
        self.folder = Path(folder).expanduser().resolve()
        self.keep = keep
        self.every = every
        self.identity = dict(identity or {})

    def save(
        self, number: int, state: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> Path | None:
        """Write the state after round ``number``; delete what is older than the last ``keep``.

        ``state`` is a tree of dicts and lists whose leaves are tensors, bytes, numbers, strings and
        None; ``identity`` adds to the one given at construction. Returns the file; None where it
        could not be written, for example to a full disk: the log says so, and nothing of it stays.
        """
        tensors: dict[str, Tensor] = {}
        described = {
            "round": number,
            "identity": self.identity | dict(identity),
            "state": _describe(state, tensors),
        }
        path = None
        try:
            path = self._write(number, tensors, {_ENTRY: json.dumps(described)})
            for _, old in [found for found in self._named() if found[1].is_file()][self.keep :]:
                if old != path:
                    old.unlink()
        except OSError as error:
            LOG.warning(
                "the checkpoint of round %s is not complete in %s (%s): the run continues",
                number,
                self.folder,
                error.strerror or error,
            )
        return path

    def load(self, identity: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return round and state of the newest checkpoint that is whole, None if there is none.

        What is damaged, or is no checkpoint in spite of its name, is set aside (``.damaged``) with
        a warning.

        Raises
        ------
        CheckpointError
            If it belongs to another run, with what differs.
        """
        for number, path in self._named():
            try:
                written, state = _read(path)
            except _UNREADABLE as error:
                LOG.warning("checkpoint %s is damaged (%s): it is skipped", path, error)
                with suppress(OSError):  # it is skipped again where it cannot be moved
                    path.rename(path.with_suffix(".damaged"))
                continue
            self._compare(path, written, self.identity | dict(identity))
            return number, state
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder for this run; delete what a crashed run has left unfinished.

        Raises
        ------
        CheckpointError
            While another run has it, and where no checkpoint can be written.
        """
        try:
            make_folder(self.folder)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise CheckpointError(
                f"checkpoints are to be kept in {str(self.folder)!r} ({error.strerror}); allowed: "
                "a folder that can be written"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"{self.folder} is in use by another run") from error
            for path in self.folder.glob("round-*.unfinished"):
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
            yield

    def _named(self) -> list[tuple[int, Path]]:
        """Return what has a checkpoint's name, newest first: it need not be one."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("round-*"))
        return sorted(((int(m[1]), path) for m, path in matches if m is not None), reverse=True)

    def _write(
        self, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """Write a file that is there as a whole or not at all, whatever happens; return it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"round-{number:08d}.unfinished"
        try:
            with unfinished.open("wb") as file:
                checksum = _write_safetensors(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"round-{number:08d}-{checksum}.safetensors"
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._flush_folder()
        return path

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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return identity and state of a checkpoint.

    Raises one of ``_UNREADABLE`` if it is no checkpoint, or not as it was written.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() not in path.name:
            raise ValueError("its content has another checksum")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _ENTRY not in metadata:
            raise ValueError(f"its metadata have no entry {_ENTRY!r}")
        described = json.loads(metadata[_ENTRY])
        return dict(described["identity"]), dict(_restore(described["state"], file.get_tensor))


def _write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str:
    """Write tensors as safetensors, piece by piece; return the SHA-256 of what was written.

    The format is that of https://huggingface.co/docs/safetensors: the length of the header, a
    header that says where each tensor lies, and their values. Those of the widest dtypes come
    first, so that all lie at multiples of their width.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    checksum = hashlib.sha256()
    for piece in (len(head).to_bytes(8, "little"), head):
        file.write(piece)
        checksum.update(piece)
    for _, tensor in ordered:
        for values in _in_pieces(tensor):
            file.write(values)
            checksum.update(values)
    return checksum.hexdigest()


def _in_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Return the bytes of a tensor in its order; copies are of ``_PIECE`` bytes at most."""
    if tensor.numel() == 0:
        return
    in_place = tensor.is_contiguous() and tensor.device.type == "cpu"
    if in_place or tensor.nbytes <= _PIECE or not tensor.shape:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        yield plain.view(torch.uint8).numpy().data
        return
    rows = max(1, _PIECE // (tensor.nbytes // len(tensor)))
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        # What is still too much is taken apart along the next dimension.
        yield from _in_pieces(part[0] if len(part) == 1 else part)


def _describe(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON; tensors and bytes go into ``tensors`` and leave their name."""
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES:
            raise TypeError(f"a tensor of {value.dtype} cannot be kept in a checkpoint")
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, bytes | memoryview):
        name = str(len(tensors))
        tensors[name] = _tensor_of(value)
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


def _tensor_of(data: bytes | memoryview) -> Tensor:
    """Return bytes as a tensor that shares their memory, and is never written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()


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
