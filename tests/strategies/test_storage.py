"""Where the rows of a round are: memory or a file, with the same results; a server's peak."""

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    regression_app,
    regression_model,
    same_bits,
    shrunk,
    to_numpy,
    to_record,
)
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result
from warm_python import run_code

from fl_bgmd import filed
from fl_bgmd.aggregators import MIXINGS, RULES
from fl_bgmd.layout import ModelLayout
from fl_bgmd.mapped import folder_of
from fl_bgmd.mods import CompressionMod
from fl_bgmd.strategies import GMD, Mean, RobustStrategy, Round, RowsError
from simulations.grid import InProcessGrid
from strategies import storage
from strategies.settings import Settings

ROOT = Path(__file__).resolve().parents[2]

NODES = 11


def run(spec: str, rounds: int = 2, **options: Any) -> Result:
    """Run rounds in which the blocks and whoever is sampled are the same."""
    mods = [CompressionMod()] if "compressor" in options else []
    if RULES.parse(spec.partition("+")[0])[0].needs_root:
        options["root_update"] = shrunk
    counts = {"min_train_nodes": NODES, "min_available_nodes": NODES, "seed": 5}
    strategy = RobustStrategy(spec, **{**counts, **options})
    grid = InProcessGrid(regression_app(mods), NODES, {})
    return strategy.start(grid, regression_model(), num_rounds=rounds)


def figures(result: Result) -> list[dict[str, Any]]:
    """Return the rounds' metrics but for the time they took."""
    rounds = [dict(metrics) for metrics in result.train_metrics_clientapp.values()]
    return [{k: v for k, v in each.items() if not k.endswith("-seconds")} for each in rounds]


CASES: list[tuple[str, dict[str, Any]]] = [
    *((rule, {}) for rule in RULES),
    *((f"gmd+{mixing}", {}) for mixing in MIXINGS),
    ("bgmd:memory=per-client", {}),
    ("bgmd", {"compressor": "qsgd:4"}),
    ("gmd", {"compressor": "scaled-rand-k:0.5", "shared_coordinates": True}),
    ("gmd", {"stale_updates": 5, "fraction_train": 0.5, "min_train_nodes": 2}),
    ("gmd", {"byzantine_fraction": "auto"}),
    ("mean", {"weighting": "examples"}),
]


@pytest.mark.parametrize(("spec", "options"), CASES, ids=lambda case: str(case)[:40])
def test_rows_in_a_file_give_the_same_model(
    spec: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = run(spec, 3, rows="memory", **options)
    with caplog.at_level(logging.INFO, "flwr.fl_bgmd"):
        file = run(spec, 3, rows="file", rows_dir=str(tmp_path), **options)
    assert same_bits(file.arrays, memory.arrays)
    assert figures(file) == figures(memory)
    assert f"are in a file in {tmp_path}" in caplog.text
    assert list(tmp_path.iterdir()) == []


class Watching(GMD):
    """Notes where the rows are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[Path | None, int]] = []

    def aggregate(self, current: Round) -> Any:
        self.seen.append((folder_of(current.updates), len(current.updates)))
        return super().aggregate(current)


def watched(rounds: int = 1, **options: Any) -> list[tuple[Path | None, int]]:
    counts = {"min_available_nodes": NODES, "fraction_evaluate": 0.0, "seed": 5}
    strategy = Watching(**{**counts, "min_train_nodes": NODES, **options})
    grid = InProcessGrid(regression_app(), NODES, {})
    strategy.start(grid, regression_model(), num_rounds=rounds)
    return strategy.seen


def test_stale_rows_are_in_the_file_too(tmp_path: Path) -> None:
    options = {"fraction_train": 0.4, "min_train_nodes": 2, "stale_updates": 9}
    seen = watched(4, rows="file", rows_dir=tmp_path, **options)
    assert {folder for folder, _ in seen} == {tmp_path}
    assert seen[-1][1] > seen[0][1]


def test_auto_takes_a_file_where_the_rows_need_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = NODES * 9 * 4
    monkeypatch.setattr(storage, "available_memory", lambda: 1)
    assert watched(rows_dir=tmp_path) == [(None, NODES)]  # so little is not worth a look
    monkeypatch.setattr(storage, "_SMALL", 0)
    for available, folder in (
        (None, None),
        (2 * size, None),
        (2 * size - 1, tmp_path),
        (size // 2, tmp_path),
    ):
        monkeypatch.setattr(storage, "available_memory", lambda a=available: a)
        assert watched(rows_dir=tmp_path) == [(folder, NODES)]
    # Without room for a file they stay in memory as long as that has room.
    monkeypatch.setattr(storage, "available_memory", lambda: size)
    assert watched(rows_dir=tmp_path / "nowhere") == [(None, NODES)]
    assert f"{size:,} bytes of memory are available: they stay there" in caplog.text
    monkeypatch.setattr(storage, "available_memory", lambda: size - 1)
    with pytest.raises(RowsError, match="rows_dir"):
        watched(rows_dir=tmp_path / "nowhere")


def test_no_room_ends_the_run_before_anybody_trains(tmp_path: Path) -> None:
    trained: list[Message] = []

    class Noting(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            trained.extend(messages)
            return super().push_messages(messages)

    strategy = Mean(rows="file", rows_dir=tmp_path / "nowhere", min_available_nodes=NODES)
    grid = Noting(regression_app(), NODES, {})
    with pytest.raises(RowsError, match=r"rows_dir: .*nowhere, where \d+ bytes are") as found:
        strategy.start(grid, regression_model(), num_rounds=1)
    assert trained == []
    assert isinstance(found.value.result, Result)


def test_this_machine_says_how_much_memory_there_is(tmp_path: Path) -> None:
    known = storage.available_memory()
    if known is None:
        pytest.skip("nobody says")
    assert 2**20 < known < 2**50
    assert storage._left_to_group(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    assert storage._left_to_group(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 500\n")
    assert storage._left_to_group(tmp_path) == [700]


def test_a_file_is_made_where_rows_come_without_a_round_of_ours(tmp_path: Path) -> None:
    settings = Settings(rows="file", rows_dir=tmp_path)
    rows = storage.rows_in_file(3, 4, torch.float64, settings)
    assert rows is not None
    assert folder_of(rows) == tmp_path
    assert storage.rows_in_file(0, 4, torch.float64, settings) is None


def test_metrics_functions_see_replies_without_their_arrays() -> None:
    seen: list[set[str]] = []

    def note(contents: list[Any], key: str) -> MetricRecord:
        seen.extend(set(content) for content in contents)
        return MetricRecord({"n": len(contents)})

    run("mean", 1, train_metrics_aggr_fn=note)
    assert seen == [{"metrics"}] * NODES


def half_model() -> ArrayRecord:
    """Return the model with its arrays in float16, and far enough from zero."""
    return to_record(
        {
            key: (value + 1.7).astype(np.float16)
            for key, value in to_numpy(regression_model()).items()
        }
    )


@pytest.mark.parametrize(
    ("named", "options", "width"),
    [
        ("bgmd", {}, torch.float16),
        ("gmd", {"stale_updates": 5}, torch.float16),
        ("gmd+nearest-neighbor", {}, torch.float32),
        ("gmd", {"compressor": "qsgd:4"}, torch.float32),
    ],
)
def test_rows_of_a_float16_model_take_half_the_room(
    named: str, options: dict[str, Any], width: torch.dtype, tmp_path: Path
) -> None:
    """In memory and in a file, with the result that rules make of the same values, widened."""
    given: list[Round] = []

    class Noting(RobustStrategy):
        spec, widens = named, False

        def open_round(self, *args: Any) -> ModelLayout:
            layout = super().open_round(*args)
            assert self._session.sent is not None
            if self.widens:
                self._session.sent = replace(self._session.sent, row_dtype=torch.float32)
            return layout

        def aggregate(self, current: Round) -> Any:
            rows = current.updates
            given.append(replace(current, updates=rows.clone()))
            if self.widens:  # to what the values are in rows of half the width
                current = replace(current, updates=rows.to(width).float())
            return super().aggregate(current)

    mods = [CompressionMod()] if "compressor" in options else []
    counts = {"min_train_nodes": NODES, "min_available_nodes": NODES, "seed": 5}
    ends: list[ArrayRecord] = []
    for place, widens in (("memory", True), ("memory", False), ("file", False)):
        strategy = Noting(rows=place, rows_dir=tmp_path, **counts, **options)
        strategy.widens = widens
        grid = InProcessGrid(regression_app(mods), NODES, {})
        ends.append(strategy.start(grid, half_model(), num_rounds=1).arrays)
    assert not same_bits(ends[0], half_model())
    assert same_bits(ends[1], ends[0])
    assert same_bits(ends[2], ends[0])
    wide, *others = given
    assert [each.updates.dtype for each in given] == [torch.float32, width, width]
    for other in others:
        assert torch.equal(other.updates, wide.updates.to(width))


PEAK = "from benchmarks.server_peak import peak; print(peak({!r}, 10, 2_000_000))"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts pages as Linux does")
@pytest.mark.parametrize(
    ("spec", "most"), [("gmd", 1.3), ("gmd+nearest-neighbor", 1.3), ("bgmd", 1.6)]
)
def test_a_server_holds_one_matrix_and_one_reply(spec: str, most: float) -> None:
    """With real messages: of ten replies one is a tenth of the matrix.

    Mixings work in place. The memory of ``bgmd`` takes one and a half replies more, and now and
    then two more that a busy machine has not yet let go of.
    """
    found = run_code(PEAK.format(spec), cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert 1.0 < float(found.stdout) < most


def test_a_run_lets_go_of_a_model_that_its_caller_has_let_go_of(tmp_path: Path) -> None:
    made: list[weakref.ref[ArrayRecord]] = []
    alive: list[bool] = []

    def model() -> ArrayRecord:
        record = regression_model()
        made.append(weakref.ref(record))
        return record

    def note(number: int, result: Result) -> bool:
        alive.append(made[0]() is not None)
        return False

    strategy = GMD(rows="file", rows_dir=tmp_path, min_available_nodes=NODES, fraction_evaluate=0.0)
    grid = InProcessGrid(regression_app(), NODES, {})
    strategy.start(grid, model(), num_rounds=2, should_stop=note)
    assert alive == [False, False]


def test_the_model_of_a_run_with_rows_in_a_file_is_in_a_file(tmp_path: Path) -> None:
    sent: list[ArrayRecord] = []

    class Noting(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            sent.extend(message.content["arrays"] for message in messages[:1])
            return super().push_messages(messages)

    folders = {"rows_dir": tmp_path, "checkpoints": tmp_path / "checkpoints"}
    given: dict[str, Any] = {"min_available_nodes": NODES, "fraction_evaluate": 0.0, **folders}
    for rounds in (1, 2):  # from the first model on, and from a checkpoint
        grid = Noting(regression_app(), NODES, {})
        result = GMD(rows="file", seed=1, **given).start(grid, regression_model(), rounds)
        assert filed.folder_of(result.arrays) == tmp_path
    assert [filed.folder_of(record) for record in sent] == [tmp_path, tmp_path]
    grid = Noting(regression_app(), NODES, {})
    GMD(rows="memory", **given | {"checkpoints": None}).start(grid, regression_model(), 1)
    assert filed.folder_of(sent[-1]) is None
