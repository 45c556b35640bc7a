"""State that survives: files, resumed runs, runs that are killed again and again."""

import hashlib
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as to_safetensors
from warm_python import run_code

from fl_bgmd.checkpoints import CheckpointError, Checkpoints
from fl_bgmd.strategies import (
    BGMD,
    GMD,
    CenteredClipping,
    EmptyRoundsError,
    RobustFilter,
    RobustStrategy,
)
from simulations import backends
from simulations.config import validate
from simulations.experiment import RunResult
from simulations.grid import InProcessGrid
from simulations.processes import workers

ROOT = Path(__file__).resolve().parents[2]

# --------------------------------------------------------------------------------- the files

TREE = {
    "tensors": {"half": torch.arange(3).half(), "flags": torch.tensor([True, False])},
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0),
    "bytes": b"\x00\xff",
    "by-number": {7: [1.5, None, "text", True], -(2**70): {}},
    "odd": [math.inf, 5e-324, 2**80],
    "nothing": None,
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, TREE, {})
    loaded = checkpoints.load({})
    assert loaded is not None
    assert loaded[0] == 4
    assert same(loaded[1], TREE)


def odd_tensors() -> dict[str, torch.Tensor]:
    """Return tensors that do not lie in memory as they are read; one is larger than a piece."""
    pool = torch.arange(24, dtype=torch.int64)
    wide = torch.arange(5_000_000, dtype=torch.float32).reshape(2, 2_500_000)
    return {
        "bfloat16": torch.linspace(-2, 2, 7).bfloat16(),
        "half scalar": torch.tensor(0.5).half(),
        "narrow": torch.tensor([-3, 100], dtype=torch.int8),
        "view": pool[3:9],
        "every other": pool[::2],
        "shared": pool.view(4, 6),
        "expanded": torch.tensor([1.5, 2.5]).expand(3, 2),
        "column": wide.T[17:18],
        "turned": wide.T,
        "no rows": torch.empty(0, 3),
        "with a gradient": torch.ones(2, requires_grad=True),
    }


def test_tensors_come_back_however_they_lie_in_memory(tmp_path: Path) -> None:
    state = odd_tensors()
    path = Checkpoints(tmp_path).save(1, state, {})
    assert path is not None
    loaded = Checkpoints(tmp_path).load({})
    assert loaded is not None
    assert same(loaded[1], state)


def test_other_tools_read_the_file_and_find_each_tensor_at_its_alignment(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, TREE | odd_tensors(), {})
    assert path is not None
    data = path.read_bytes()
    mine = load_safetensors(data)
    again = to_safetensors(mine)  # the library's own writer
    assert {name: (t.dtype, t.shape) for name, t in mine.items()} == {
        name: (t.dtype, t.shape) for name, t in load_safetensors(again).items()
    }
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in mine.items():
        start, end = header[name]["data_offsets"]
        assert (8 + length + start) % tensor.itemsize == 0
        assert end - start == tensor.nbytes


def test_a_dtype_that_safetensors_has_no_name_for_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a tensor of torch.complex128 cannot be kept"):
        Checkpoints(tmp_path).save(1, {"x": torch.ones(2, dtype=torch.complex128)}, {})
    assert list(tmp_path.iterdir()) == []


IN_SMALL_MEMORY = """
import sys, torch
from fl_bgmd.checkpoints import Checkpoints
from benchmarks.measure import peak_extra_bytes

checkpoints, cpu = Checkpoints(sys.argv[1]), torch.device("cpu")
checkpoints.save(1, {"x": torch.ones(3), "y": b"1"}, {})  # loads what is loaded once
checkpoints.load({})
state = {
    "vector": torch.zeros(12_500_000), "turned": torch.zeros(5_000, 2_500).T,
    "bytes": bytes(50_000_000),
}
found = []
print(peak_extra_bytes(lambda: checkpoints.save(2, state, {}), cpu))
print(peak_extra_bytes(lambda: found.append(checkpoints.load({})), cpu))
assert found[0][1]["vector"].shape == (12_500_000,)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory as Linux counts it")
def test_neither_writing_nor_reading_copies_the_state(tmp_path: Path) -> None:
    done = run_code(IN_SMALL_MEMORY, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written, read = map(int, done.stdout.split())
    # Of 150 MB: some pieces; and what was bytes is bytes again.
    assert written < 40e6
    assert read < 50e6 + 60e6


def test_an_empty_folder_and_one_that_is_not_there_hold_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load({}) is None
    assert Checkpoints(tmp_path / "new").load({}) is None


def test_no_pickle_goes_in(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a function cannot be kept"):
        Checkpoints(tmp_path).save(1, {"f": same}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_last_few_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (1, 2, 9, 10, 11):
        checkpoints.save(number, {"n": number}, {})
    assert sorted(path.name[:14] for path in tmp_path.iterdir()) == [
        "round-00000010",
        "round-00000011",
    ]
    assert checkpoints.load({}) == (11, {"n": 11})


@pytest.mark.parametrize("damage", ["truncated", "one-bit", "emptied", "grown"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": torch.ones(100)}, {})
    newest = checkpoints.save(2, {"x": torch.ones(100)}, {})
    data = bytearray(newest.read_bytes())
    if damage == "one-bit":
        data[len(data) // 2] ^= 1
    cut = {"truncated": data[:-1], "one-bit": data, "emptied": b"", "grown": data + b"\0"}[damage]
    newest.write_bytes(cut)
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        loaded = checkpoints.load({})
    assert loaded is not None
    assert loaded[0] == 1
    assert f"checkpoint {newest} is damaged" in caplog.text


def named_like_a_checkpoint(folder: Path, data: bytes) -> Path:
    """Write a file with the right checksum in its name."""
    path = folder / f"round-00000009-{hashlib.sha256(data).hexdigest()}.safetensors"
    path.write_bytes(data)
    return path


def metadata(described: str) -> bytes:
    return to_safetensors({}, metadata={"fl-bgmd": described})


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("directory", "it is not a file"),
        ("dangling link", "it is not a file"),
        ("pipe", "it is not a file"),
        ("garbage", "another checksum"),
        ("garbage with its checksum", ""),
        ("no metadata", "no entry 'fl-bgmd'"),
        ("no JSON", ""),
        ("no object", ""),
        ("no state", "state"),
        ("missing tensor", ""),
        ("unknown node", ""),
        ("deep", ""),
    ],
)
def test_what_only_has_the_name_of_a_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, kind: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": 1}, {})
    contents = {
        "garbage with its checksum": b"garbage",
        "no metadata": to_safetensors({}),
        "no JSON": metadata("{"),
        "no object": metadata("[1]"),
        "no state": metadata('{"identity": {}}'),
        "missing tensor": metadata('{"identity": {}, "state": {"tensor": "0"}}'),
        "unknown node": metadata('{"identity": {}, "state": {"a": 1, "b": 2}}'),
        "deep": metadata("[" * 100_000),
    }
    odd = tmp_path / f"round-00000009-{'0' * 64}.safetensors"
    if kind in contents:
        odd = named_like_a_checkpoint(tmp_path, contents[kind])
    elif kind == "directory":
        odd.mkdir()
        (odd / "file").touch()
    elif kind == "dangling link":
        odd.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.write_bytes(b"garbage")
    with caplog.at_level(logging.WARNING, logger="flwr.fl_bgmd"):
        assert checkpoints.load({}) == (1, {"x": 1})
    assert f"checkpoint {odd} is damaged" in caplog.text
    assert why in caplog.text
    assert not odd.is_symlink()
    assert not odd.exists()
    assert checkpoints.save(2, {"x": 2}, {}) is not None
    assert checkpoints.load({}) == (2, {"x": 2})


def test_what_appears_beside_the_checkpoints_of_a_run_is_let_be(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    odd = tmp_path / f"round-00000009-{'0' * 64}.safetensors"
    odd.mkdir()
    (tmp_path / "round-00000009-abc.unfinished").mkdir()
    with checkpoints.locked():
        assert checkpoints.save(1, {}, {}) is not None
        assert checkpoints.save(2, {}, {}) is not None
    assert len([path for path in tmp_path.glob("round-*.safetensors") if path.is_file()]) == 1
    assert odd.is_dir()


def test_names_carry_the_checksum(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(3, {}, {})
    assert (
        path.name == f"round-00000003-{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"
    )


def test_another_identity_is_refused_with_the_difference(tmp_path: Path) -> None:
    Checkpoints(tmp_path, identity={"seed": 1, "model": "a"}).save(1, {}, {"rule": "gmd"})
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, identity={"seed": 2, "model": "a"}).load({"rule": "cmd"})
    assert "rule was 'gmd' and is 'cmd'; seed was 1 and is 2" in str(error.value)
    with pytest.raises(CheckpointError, match="seed was 1 and is 'not set'"):
        Checkpoints(tmp_path, identity={"model": "a"}).load({"rule": "gmd"})


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path).locked(),
        pytest.raises(CheckpointError, match="in use by another run"),
        Checkpoints(tmp_path).locked(),
    ):
        raise AssertionError
    with Checkpoints(tmp_path).locked():
        pass


def test_what_a_crash_left_unfinished_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / "round-00000003-abc.unfinished"
    left.write_bytes(b"half")
    with Checkpoints(tmp_path).locked():
        assert not left.exists()


@pytest.mark.parametrize(
    "given", [{"keep": 0}, {"every": 0}, {"every": -1}, {"keep": "3"}, {"every": 1.5}]
)
def test_impossible_arguments_are_refused(given: dict[str, Any]) -> None:
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed: 1 or more"):
        Checkpoints("x", **given)
    for folder in ("", None, 3):
        with pytest.raises(ValueError, match=f"folder is {folder!r}; allowed: a folder"):
            Checkpoints(folder)  # type: ignore[arg-type]


def test_the_home_folder_is_meant_by_its_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoints("~/runs/a").folder == tmp_path.resolve() / "runs" / "a"


# ------------------------------------------------------------------- folders that do not take any


def broad() -> ArrayRecord:
    """Return a model of 0.8 MB."""
    return ArrayRecord([np.zeros(100_000)])


def run_on_a_small_disk(folder: str) -> None:
    """Run five rounds with checkpoints on a disk that has room for two; then one more run."""
    log = logging.getLogger("flwr.fl_bgmd")
    log.propagate = False
    log.setLevel(logging.WARNING)
    log.addHandler(logging.StreamHandler())
    app = ClientApp()
    app.train()(train)
    for _ in range(2):
        strategy = GMD(checkpoints=folder, fraction_evaluate=0.0, min_available_nodes=3, seed=1)
        try:
            result = strategy.start(InProcessGrid(app, 3, {}), broad(), num_rounds=5)
        except CheckpointError as error:
            print(f"refused: {error}")
        else:
            print("rounds", sorted(result.train_metrics_clientapp))
        print("files", sorted(path.suffix for path in Path(folder).iterdir()))
        loaded = Checkpoints(folder).load(checkpoint_identity(folder))
        print("newest", loaded and loaded[0])
        with suppress(OSError), (Path(folder) / "filling").open("wb") as filling:
            filling.write(bytes(2**21))


def checkpoint_identity(folder: str) -> dict[str, Any]:
    """Return what the newest checkpoint says that it is of."""
    with safe_open(max(Path(folder).glob("round-*")), framework="pt") as file:
        identity: dict[str, Any] = json.loads(file.metadata()["fl-bgmd"])["identity"]
    return identity


def on_a_mount(folder: Path, prepare: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a mount namespace of its own, after ``prepare``; skip where none is."""
    folder.mkdir(exist_ok=True)
    unshare = ["unshare", "--mount", "sh", "-c"]
    tried = subprocess.run([*unshare, prepare], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    return subprocess.run(
        [*unshare, f'{prepare} && exec "$0" -c "$1"', sys.executable, code],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["..", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = on_a_mount(
        disk,
        f"mount -t tmpfs -o size=2m none {disk}",
        f"from test_checkpoints import *; run_on_a_small_disk({str(disk)!r})",
    )
    assert done.returncode == 0, done.stderr
    first, files, newest, second, more_files, still = done.stdout.splitlines()
    assert first == "rounds [1, 2, 3, 4, 5]"
    assert files == "files ['', '.safetensors', '.safetensors']"  # and the lock
    assert newest == still == "newest 2"
    for number in (3, 4, 5):
        message = f"the checkpoint of round {number} is not complete in {disk.resolve()} (No space"
        assert done.stderr.count(message) == 1
    # What is full from the start is an error before the first round.
    assert second.startswith("refused: checkpoints are to be kept in")
    assert "No space left on device" in second
    assert ".unfinished" not in more_files


def test_a_read_only_folder_is_an_error_before_the_first_round(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    code = f"from test_checkpoints import *; print(refused_at_once({str(disk)!r}))"
    done = on_a_mount(disk, f"mount -t tmpfs -o ro none {disk}", code)
    assert done.returncode == 0, done.stderr
    assert "(Read-only file system); allowed: a folder that can be written" in done.stdout


def refused_at_once(folder: str) -> str:
    """Return why a run with checkpoints is refused, before it has asked any client."""
    asked = []

    class Asked(InProcessGrid):
        def get_node_ids(self) -> Any:
            asked.append(1)
            return super().get_node_ids()

    with pytest.raises(CheckpointError) as error:
        GMD(checkpoints=folder).start(Asked(ClientApp(), 3, {}), ArrayRecord([np.zeros(3)]))
    assert not asked
    return str(error.value)


@pytest.mark.parametrize("kind", ["a file", "in a file", "with a folder as its lock"])
def test_a_folder_that_cannot_be_used_is_an_error_before_the_first_round(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "x"
    if kind == "with a folder as its lock":
        (folder / "lock").mkdir(parents=True)
    else:
        folder.touch()
    folder = folder / "sub" if kind == "in a file" else folder
    assert f"checkpoints are to be kept in '{folder.resolve()}' (" in refused_at_once(str(folder))


# ------------------------------------------------------------------------------ other people's


def train(message: Message, context: Context) -> Message:
    """Take a step that depends on the model, the round and the client."""
    number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
    draw = np.random.default_rng([number, int(context.node_config["partition-id"])])
    model = message.content["arrays"]
    assert isinstance(model, ArrayRecord)
    arrays = [0.9 * a + draw.standard_normal(a.shape) for a in model.to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 1})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )


def start(
    strategy: RobustStrategy, rounds: int, train_config: ConfigRecord | None = None
) -> Result:
    app = ClientApp()
    app.train()(train)
    grid = InProcessGrid(app, 5, {})
    model = ArrayRecord([np.zeros((3, 4)), np.ones(2)])
    return strategy.start(grid, model, num_rounds=rounds, train_config=train_config)


STRATEGIES: dict[str, tuple[type[RobustStrategy], dict[str, Any]]] = {
    "bgmd": (BGMD, {"block_fraction": 0.3, "min_block_size": 1}),
    "bgmd-per-client": (BGMD, {"block_fraction": 0.3, "min_block_size": 1, "memory": "per-client"}),
    "gmd": (GMD, {"mixing": "bucketing"}),
    "robust-filter": (RobustFilter, {}),
    "centered-clipping": (CenteredClipping, {}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_strategy_resumes_where_it_stopped(name: str, tmp_path: Path) -> None:
    cls, own = STRATEGIES[name]
    options = {**own, "server_momentum": 0.5, "fraction_train": 0.8, "fraction_evaluate": 0.0}
    options["seed"] = 1
    whole = start(cls(**options), 6)
    start(cls(checkpoints=str(tmp_path), **options), 3)
    resumed = start(cls(checkpoints=Checkpoints(tmp_path), **options), 6)
    assert {k: a.data for k, a in whole.arrays.items()} == {
        k: a.data for k, a in resumed.arrays.items()
    }
    assert list(resumed.train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = start(GMD(checkpoints=tmp_path, fraction_evaluate=0.0), 2)
    calls: list[Any] = []
    strategy = GMD(checkpoints=tmp_path, fraction_evaluate=0.0)
    strategy.aggregate = calls.append  # type: ignore[method-assign, assignment]
    again = start(strategy, 2)
    assert calls == []
    assert again.arrays == first.arrays
    assert again.train_metrics_clientapp == first.train_metrics_clientapp


def test_fewer_rounds_than_were_done_are_refused(tmp_path: Path) -> None:
    start(GMD(checkpoints=tmp_path, fraction_evaluate=0.0), 3)
    with pytest.raises(CheckpointError, match=r"num_rounds is 2 .* of round 3; allowed: 3 or more"):
        start(GMD(checkpoints=tmp_path, fraction_evaluate=0.0), 2)


def test_defaults_that_are_given_and_another_device_are_no_other_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0, "seed": 1}
    start(GMD(**options), 1)
    again = GMD(**options, compressor="none", mixing="none", device="cpu")
    assert list(start(again, 2).train_metrics_clientapp) == [1, 2]
    with pytest.raises(CheckpointError, match=r"strategy.compressor was 'none' and is 'qsgd'"):
        start(GMD(**options, compressor="qsgd"), 3)


def test_what_clients_are_asked_to_do_is_what_a_run_is(tmp_path: Path) -> None:
    def asked(**config: Any) -> ConfigRecord:
        return ConfigRecord({"lr": 0.1, "key": b"k", "layers": [1, 2], **config})

    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0, "seed": 1}
    options["compressor"] = "qsgd"  # more keys that the strategy writes
    start(BGMD(**options), 1, asked())
    assert list(start(BGMD(**options), 2, asked()).train_metrics_clientapp) == [1, 2]
    with pytest.raises(CheckpointError, match=r"train_config.lr was 0.1 and is 0.2\. Use"):
        start(BGMD(**options), 3, asked(lr=0.2))
    with pytest.raises(CheckpointError, match=r"train_config.key was '6b' and is '78'\."):
        start(BGMD(**options), 3, asked(key=b"x"))
    with pytest.raises(CheckpointError, match=r"train_config.lr was 0.1 and is 'not set'"):
        start(BGMD(**options), 3)


def test_what_is_done_when_machines_fail_may_change(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0, "seed": 3}
    start(BGMD(**options), 1)
    changed = {"node_wait_timeout": 5.0, "too_few_nodes": "go-on", "max_empty_rounds": 2}
    changed |= {"min_valid_replies": 2, "bench_after": 3, "min_available_nodes": 3}
    result = start(BGMD(**options, **changed), 2)
    assert result.arrays == start(BGMD(fraction_evaluate=0.0, seed=3), 2).arrays


def test_a_secret_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    first = BGMD(checkpoints=tmp_path, fraction_evaluate=0.0)
    start(first, 1)
    second = BGMD(checkpoints=tmp_path, fraction_evaluate=0.0)
    assert second.state_dict()["seed"] != first.state_dict()["seed"]
    start(second, 2)
    assert second.state_dict()["seed"] == first.state_dict()["seed"]
    with pytest.raises(CheckpointError, match=r"strategy.seed was None and is 3"):
        start(BGMD(checkpoints=tmp_path, fraction_evaluate=0.0, seed=3), 2)


def test_a_grid_with_a_state_refuses_a_checkpoint_without(tmp_path: Path) -> None:
    class Stateless(InProcessGrid):
        def __getattribute__(self, name: str) -> Any:
            if name in ("state_dict", "load_state_dict"):
                raise AttributeError(name)
            return super().__getattribute__(name)

    arrays = ArrayRecord([np.zeros(3)])
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0, "seed": 3}
    options |= {"max_empty_rounds": 9}
    with pytest.raises(EmptyRoundsError):
        GMD(**options).start(Stateless(ClientApp(), 3, {}), arrays, num_rounds=1)
    with pytest.raises(CheckpointError, match="on a grid without a state"):
        GMD(**options).start(InProcessGrid(ClientApp(), 3, {}), arrays, num_rounds=2)


def test_a_checkpoint_of_another_strategy_or_model_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": tmp_path, "fraction_evaluate": 0.0}
    start(BGMD(block_fraction=0.5, **options), 1)
    with pytest.raises(CheckpointError, match=r"strategy was 'BGMD' and is 'GMD'"):
        start(GMD(**options), 1)
    with pytest.raises(CheckpointError, match=r"strategy.block_fraction was 0.5 and is 0.25"):
        start(BGMD(block_fraction=0.25, **options), 1)
    grid = InProcessGrid(ClientApp(), 5, {})
    with pytest.raises(CheckpointError, match="model was"):
        BGMD(block_fraction=0.5, **options).start(grid, ArrayRecord([np.zeros(3)]), num_rounds=1)


# ------------------------------------------------------------------------------ whole experiments

# Every kind of state: memory, momentum and generator of the server, error feedback and old updates
# in the clients' contexts, counts of the adversary.
RUN = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "num-clients": 5,
    "partition": "shards:20",
    "num-server-rounds": 40,
    "local-steps": 1,
    "batch-size": 8,
    "learning-rate": 0.05,
    "lr-schedule": "cosine",
    "evaluate-every": 1000,
    "server-momentum": 0.5,
    "strategy": "bgmd+nearest-neighbor",
    "compressor": "top-k:0.2",
    "attack": "delayed+ipm",
    "byzantine-fraction": 0.4,
    "device": "cpu",
}


def run_in(folder: Path, **given: Any) -> RunResult:
    config = validate({**RUN, **given, "checkpoint-dir": str(folder)})
    return backends.run(config, backend="inprocess")


def final_state(folder: Path) -> Any:
    """Return the last checkpoint's content, without wall clocks."""
    loaded = sorted(folder.glob("round-*.safetensors"))[-1]
    with safe_open(loaded, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["fl-bgmd"])

    def timeless(value: Any) -> Any:
        if isinstance(value, dict) and "pairs" in value:
            pairs = value["pairs"]
            return [[k, timeless(v)] for k, v in pairs if not str(k).endswith("seconds")]
        if isinstance(value, dict) and "list" in value:
            return [timeless(item) for item in value["list"]]
        return value

    return described["round"], timeless(described["state"]), tensors


def assert_same_end(a: Path, b: Path) -> None:
    (round_a, state_a, tensors_a), (round_b, state_b, tensors_b) = final_state(a), final_state(b)
    assert round_a == round_b
    assert state_a == state_b
    assert same(tensors_a, tensors_b)


def test_an_experiment_that_is_stopped_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Stopped by an exception in the middle of a round, with a checkpoint every second round."""
    given: dict[str, Any] = {"num-server-rounds": 7, "checkpoint-every": 2}
    whole = run_in(tmp_path / "whole", **given)
    assert whole.error == ""

    def stop(server_round: int, accuracy: float | None) -> None:
        if server_round == 5:
            raise KeyboardInterrupt

    config = validate({**RUN, **given, "checkpoint-dir": str(tmp_path / "stopped")})
    with pytest.raises(KeyboardInterrupt):
        backends.run(config, backend="inprocess", on_round=stop)
    resumed = run_in(tmp_path / "stopped", **given)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    assert resumed.played == whole.played
    assert resumed.accuracies == whole.accuracies
    assert [entry["round"] for entry in resumed.rounds] == list(range(8))


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    given: dict[str, Any] = {"num-server-rounds": 1, "attack": "bit-flip"}
    assert run_in(tmp_path, **given).status == "finished"
    failed = run_in(tmp_path, **given, **{"learning-rate": 0.1})
    assert failed.status == "failed"
    assert "learning-rate was 0.05 and is 0.1" in failed.error
    moved = run_in(tmp_path, **given, **{"results-dir": "elsewhere"})
    assert moved.status == "finished"


def life(folder: Path) -> None:
    torch.set_num_threads(1)
    result = run_in(folder)
    assert result.error == ""


def newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("round-*.safetensors")), default="")


def test_a_process_that_is_killed_twenty_times_ends_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    spawn = workers()  # which have imported most of it
    whole, started = spawn.Process(target=life, args=(tmp_path / "whole",)), time.monotonic()
    whole.start()
    whole.join(300)
    assert whole.exitcode == 0
    one_round = (time.monotonic() - started) / int(RUN["num-server-rounds"])

    folder, draw, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(200):
        process = spawn.Process(target=life, args=(folder,))
        before, deadline = newest(folder), time.monotonic() + 120
        process.start()
        # In every other life from the first moment on, in the others once it has come further: no
        # run would end otherwise. Not much further: twenty must fit into the run.
        if kills % 2:
            while process.is_alive() and newest(folder) == before:
                assert time.monotonic() < deadline, "no checkpoint in two minutes"
                time.sleep(0.005)
        if kills < 20:
            time.sleep(draw.uniform(0, min(0.1, 1.5 * one_round)))
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join(300)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert kills == 20
    assert_same_end(tmp_path / "whole", folder)


def test_damaged_checkpoints_do_not_crowd_out_new_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (5, 6):
        path = checkpoints.save(number, {"x": torch.ones(3)}, {})
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.load({}) is None
    assert [path.suffix for path in sorted(tmp_path.glob("round-*"))] == [".damaged"] * 2
    for number in (1, 2, 3):
        assert checkpoints.save(number, {"x": torch.ones(3)}, {}).exists()
    loaded = checkpoints.load({})
    assert loaded is not None
    assert loaded[0] == 3


def test_one_damaged_later_does_not_cost_the_new_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, {}, {}).write_bytes(b"")
    path = checkpoints.save(1, {}, {})
    assert path.exists()
