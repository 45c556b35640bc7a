"""Studies: what is planned, that they resume where they stopped, what their tables say."""

import json
import math
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_bgmd.attacks import ATTACKS
from fl_bgmd.data import held_out, load, partitions
from simulations import runner
from simulations.backends import run
from simulations.cli import main
from simulations.config import ConfigError
from simulations.experiment import RunResult
from simulations.report.study import table_of
from simulations.report.tables import (
    MEAN,
    SECONDS,
    WORST,
    accuracies,
    accuracy_means,
    chosen,
    with_published,
)
from simulations.runner import line_of, result_of, run_cells
from simulations.study import Study, attack_columns, read_study, split_attacks, strategy_rows

SMALL = {
    "dataset": "mnist",
    "model": "tiny-cnn",
    "partition": "iid",
    "num-server-rounds": 3,
    "local-steps": 1,
    "batch-size": 16,
    "byzantine-fraction": 0.4,
    "evaluate-every": 3,
}
ROUNDS = ("num-server-rounds", "evaluate-every")


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves, as of a study with too many columns: they take longer than the runs."""
    monkeypatch.setattr("simulations.report.study.MOST_PANELS", 0)


# ------------------------------------------------------------------------------- declared


def test_a_study_sweeps_the_strengths_and_the_seeds() -> None:
    rows = strategy_rows(["gmd"])
    given = {"byzantine-fraction": 0.4, "seed": 5}
    cells = Study(rows, attack_columns(["all"], sweep=True), given, seeds=2).cells()
    swept = sum(len(attack.swept()) for attack in ATTACKS.values())
    assert len(cells) == 2 * (swept + 1)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.seed for cell in cells} == {5, 6}
    [clean, _] = [cell for cell in cells if cell.column == "none"]
    assert clean.config["byzantine-fraction"] == 0.0
    flips = {cell.config["attack"] for cell in cells if cell.group == "bit-flip"}
    assert flips == {"bit-flip:1.5", "bit-flip:5", "bit-flip"}
    assert "gmd/bit-flip:5/seed-6" in {cell.name for cell in cells}
    # With options it is what it says.
    text = "gaussian:100,memory-poison:scale=10,strong=0.1,zero+alie:1.5,bit-flip:100"
    assert list(attack_columns(split_attacks(text), sweep=True)) == [
        *("gaussian:100", "memory-poison:scale=10,strong=0.1", "zero+alie:1.5", "bit-flip")
    ]
    for twice in ("bit-flip:100,bit-flip", "bit-flip,bit-flip:5"):
        with pytest.raises(ConfigError, match=r"attack holds bit-flip.* twice; allowed"):
            attack_columns(split_attacks(twice), sweep=True)
    assert list(attack_columns(["none", "zero"])) == ["none", "zero"]
    with pytest.raises(ConfigError, match="seeds is 0"):
        Study(rows, seeds=0)


def test_a_clean_column_is_without_hostile_clients_only_beside_others() -> None:
    assert attack_columns(["none"]) == {"none": {"attack": "none"}}
    given = {"byzantine-fraction": 0.4}
    with pytest.raises(ConfigError, match=r"byzantine-fraction is 0\.4 with attack 'none'"):
        Study(strategy_rows(["gmd"]), attack_columns(["none"]), given).cells()


def test_several_runs_have_checkpoints_of_their_own() -> None:
    given = {"checkpoint-dir": "there"}
    [alone] = Study(strategy_rows(["gmd"]), config=given).cells()
    assert alone.config["checkpoint-dir"] == "there"
    two = Study(strategy_rows(["gmd", "mean"]), config=given).cells()
    assert [cell.config["checkpoint-dir"] for cell in two] == [
        *("there/gmd/none/seed-0", "there/mean/none/seed-0")
    ]


def test_a_file_may_list_strategies_and_attacks(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'rows = ["gmd", "bgmd:0.3+nearest-neighbor"]\ncolumns = ["none", "zero"]\nseeds = 2\n'
        "[config]\nbyzantine-fraction = 0.4\n"
    )
    study = read_study(file)
    assert study.name == "mine"
    assert [cell.name for cell in study.cells()][:3] == [
        *("gmd/none/seed-0", "gmd/zero/seed-0", "bgmd:0.3+nearest-neighbor/none/seed-0")
    ]
    chosen = study.changed(rows=["gmd"], columns=["zero"], seeds=1, config={"seed": 7})
    assert [cell.name for cell in chosen.cells()] == ["gmd/zero/seed-7"]
    with pytest.raises(ConfigError, match=r"rows is 'cmd'; allowed: gmd, bgmd:0\.3"):
        study.changed(rows=["cmd"])


def test_settings_are_chosen_on_validation_data_by_the_worst_case(tmp_path: Path) -> None:
    rows, columns = strategy_rows(["gmd"]), attack_columns(["none", "zero"])
    given = SMALL | {"validation-fraction": 0.1}
    study = Study(rows, columns, given, select={"learning-rate": [0.05, 0.2], "momentum": [0.0]})
    cells = study.cells()
    assert [cell.name for cell in cells] == [
        f"gmd/learning-rate={rate},momentum=0.0/{column}/seed-0"
        for rate in (0.05, 0.2)
        for column in ("none", "zero")
    ]
    assert [cell.config["learning-rate"] for cell in cells] == [0.05, 0.05, 0.2, 0.2]
    accuracies_of = [(0.9, 0.3, 0.8), (0.8, 0.5, 0.1), (0.9, 0.4, 0.9), (0.7, 0.4, 0.9)]
    lines = []
    for cell, (validation, other, test) in zip(cells, accuracies_of, strict=True):
        entry = {"round": 3, "accuracy": test, "validation-accuracy": validation, "loss": other}
        lines.append(line_of(cell, RunResult(cell.config, [entry])))
    # 0.05 has the worst validation accuracy 0.8, 0.2 has 0.7, whatever they do on test examples.
    assert accuracies(chosen(lines))[""].tolist() == ["gmd (learning-rate=0.05,momentum=0.0)"]
    assert table_of(study, lines)["worst"].tolist() == ["10.0"]
    lines[0]["validation-accuracy"] = None  # it failed before it was measured
    assert table_of(study, lines)["worst"].tolist() == ["90.0"]
    with pytest.raises(ConfigError, match="validation-fraction is 0 with select; allowed: the sh"):
        Study(rows, columns, select={"learning-rate": [0.1]})
    with pytest.raises(ConfigError, match=r"select\.momentum is 0\.1; allowed: a list of values"):
        Study(rows, columns, given, select={"momentum": 0.1})  # type: ignore[dict-item]


def test_held_out_examples_are_nobodys() -> None:
    dataset = load("mnist")
    withheld = held_out(dataset, 0.1)
    assert len(withheld) == 6000
    shares = partitions(dataset, 10, scheme="iid", seed=3, validation=0.1)
    everything = np.sort(np.concatenate([withheld, *shares]))
    assert np.array_equal(everything, np.arange(60000))
    result = run(SMALL, strategy="gmd", attack="zero", validation_fraction=0.1)
    assert 0 <= result.rounds[-1]["validation-accuracy"] <= 1
    assert "validation-accuracy" not in run(SMALL, strategy="gmd", attack="zero").rounds[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows = [", r"study is '.*mine\.toml' \(.*\); allowed: a TOML file"),
        ("seeds = 2", "key 'rows' is missing"),
        ('rows = ["gmd", "gmd"]', "strategies holds gmd twice"),
        ('rows = ["gmd"]\ncolumns = ["zero", "zeor"]', "attack is 'zeor'"),
        ('rows = ["gmd"]\nseed = 1', "key 'seed' is unknown; allowed: .*seeds"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(file)


@pytest.mark.usefixtures("without_curves")
def test_the_command_line_runs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SMALL.items())
    file.write_text(f'rows = ["gmd", "mean"]\ncolumns = ["none", "zero"]\n[config]\n{keys}\n')
    command = ["compare", str(file), "--backend=inprocess", f"--folder={tmp_path / 'out'}"]
    assert main([*command, "--row=gmd", "--num-server-rounds=1"]) == 0
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/*/*")) == ["none", "zero"]
    record = json.loads((tmp_path / "out/gmd/zero/seed-0/run.json").read_text())
    assert record["config"]["num-server-rounds"] == 1
    assert main([*command, "--attack=ipm"]) == 2
    assert "allowed: those in the file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ run


def table_rows(folder: Path) -> list[list[str]]:
    lines = (folder / "table.md").read_text().splitlines()
    return [
        [entry.strip() for entry in line[1:-1].split("|")] for line in lines if line.startswith("|")
    ]


@pytest.mark.usefixtures("without_curves")
def test_compare_attacks_writes_table_heat_map_and_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{k}={v}" for k, v in SMALL.items() if k not in ROUNDS]
    arguments = ["--strategies", "mean", "gmd", "--attack=none,sign-flip,ipm", "--jobs=2"]
    arguments += ["--num-server-rounds=1", "--evaluate-every=1"]
    arguments += ["--backend=inprocess", f"--results-dir={tmp_path}", "--seeds=2"]
    assert main(["compare", *options, *arguments]) == 0
    [folder] = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    # none 1, sign-flip 1, ipm 3 strengths.
    assert len(lines) == 2 * 2 * 5
    table = table_rows(folder)
    names = ["", "none", "worst class", "sign-flip", "ipm", "worst", "mean", "s / round"]
    assert table[0] == names
    for (label, *entries), name in zip(table[2:], ("mean", "gmd"), strict=True):
        assert label == name
        values = [float(entry.partition(" ± ")[0]) for entry in entries]
        own = [line for line in lines if line["row"] == name]
        by_strength: dict[Any, list[float]] = {}
        for line in own:
            by_strength.setdefault(line["column"], []).append(100 * line["final-accuracy"])
        means = {key: sum(v) / 2 for key, v in by_strength.items()}
        worst_ipm = min(value for attack, value in means.items() if attack.startswith("ipm"))
        assert values[3] == pytest.approx(worst_ipm, abs=0.051)
        assert values[4] == min(values[0], values[2], values[3])
        assert values[5] == pytest.approx((values[2] + values[3]) / 2, abs=0.101)
        least = [min(line["class-accuracies"]) for line in own if line["column"] == "none"]
        assert values[1] == pytest.approx(50 * sum(least), abs=0.051)
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "ranks.png").exists()  # of two rows
    assert "worst" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["report", str(folder), f"--output={again}"]) == 0
    assert table_rows(again) == table
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "allowed: a folder with a cells.jsonl of" in capsys.readouterr().err


@pytest.mark.usefixtures("without_curves")
def test_a_study_resumes_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    options += ["--backend=inprocess", f"--folder={tmp_path}"]
    rows = ["--strategies", "mean", "gmd"]
    assert main(["compare", *options, *rows, "--attack=none,zero"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/seed-0/run.json")}
    assert len(before) == 4
    # One more attack and a lost run.
    lost = tmp_path / "gmd" / "zero" / "seed-0" / "run.json"
    lost.unlink()
    assert main(["compare", *options, *rows, "--attack=none,zero,sign-flip"]) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/seed-0/run.json")}
    assert len(after) == 6
    assert {path for path in before if after[path] != before[path]} == {lost}
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 6
    assert "sign-flip" in (tmp_path / "table.md").read_text()
    # Other cells in the same folder leave the lines of these; other settings are refused.
    assert main(["compare", *options, "--strategies", "cmd", "--attack=none,zero"]) == 0
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 8
    capsys.readouterr()
    other = [*options, "--server-momentum=0.5"]
    assert main(["compare", *other, *rows, "--attack=none,zero"]) == 2
    assert "was run with server-momentum 0.0 and not 0.5" in capsys.readouterr().err
    # Half a line is what an interrupted study may leave.
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"row": "gm')
    assert main(["report", str(tmp_path), f"--output={tmp_path / 'report'}"]) == 0
    (tmp_path / "cells.jsonl").write_text('{"row": "gmd"}\n')
    assert main(["report", str(tmp_path), f"--output={tmp_path / 'report'}"]) == 2
    assert "whose line 1 describes no run" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text("")
    assert main(["report", str(tmp_path), f"--output={tmp_path / 'report'}"]) == 2
    assert "a cells.jsonl of finished runs" in capsys.readouterr().err


@pytest.mark.usefixtures("without_curves")
def test_a_study_with_an_idle_attack_fails_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{key}={value}" for key, value in SMALL.items() if key != "num-server-rounds"]
    arguments = ["--strategies=gmd", "--attack=zero,delayed", "--num-server-rounds=1"]
    arguments += ["--backend=inprocess", f"--results-dir={tmp_path}", "--no-sweep"]
    assert main(["compare", *options, *arguments]) == 1
    assert "attack delayed was not played" in capsys.readouterr().err
    [folder] = tmp_path.iterdir()
    assert table_rows(folder)[-1][2:5] == ["failed", "failed", "failed"]


def die_while_reporting() -> None:
    _, one_at_a_time = runner._NEWS
    one_at_a_time.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_while_it_reports_keeps_nobody_waiting() -> None:
    def play() -> None:
        with suppress(BrokenProcessPool), runner.pool(1) as workers:
            workers.submit(die_while_reporting).result()

    study = threading.Thread(target=play, daemon=True)
    study.start()
    study.join(60)
    assert not study.is_alive()


def test_more_jobs_than_one_need_the_in_process_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--attack=none,zero", "--byzantine-fraction=0.4", "--jobs=2"]) == 2
    assert "jobs is 2 with backend ray; allowed: 1, more without Ray" in capsys.readouterr().err


def test_a_failed_run_makes_its_cell_and_the_worst_unknown() -> None:
    given = {"byzantine-fraction": 0.4}
    cells = Study(strategy_rows(["gmd"]), attack_columns(["none", "zero"]), given).cells()
    good = RunResult(cells[0].config, rounds=[{"round": 1, "accuracy": 0.5}])
    bad = RunResult(cells[1].config, status="failed", error="x")
    lines = [line_of(cell, result) for cell, result in zip(cells, (good, bad), strict=True)]
    means = accuracy_means(lines)
    assert list(means.columns) == ["none", "zero", WORST]
    assert means.loc["gmd", "none"] == 0.5
    assert means.loc["gmd", ["zero", WORST]].isna().all()
    shown = accuracies(lines).iloc[0]
    assert shown[["zero", WORST, MEAN]].tolist() == ["failed"] * 3


def test_a_run_that_is_missing_has_not_failed() -> None:
    there = [line("gmd", column, 0) for column in ("none", "zero")] + [line("cmd", "none", 0)]
    shown = accuracies([x | {"class-accuracies": [0.5]} for x in there]).set_index("")
    assert shown.loc["cmd", ["none", "zero", WORST, MEAN]].tolist() == ["50.0", "-", "-", "-"]
    assert shown.loc["gmd", "zero"] == "50.0"


def line(row: str, column: str, seed: int, **more: Any) -> dict[str, Any]:
    group = column.partition(":")[0]
    said = {"status": "finished", "final-accuracy": 0.5, "seconds-per-round": math.nan, **more}
    setting = {"attack": column}
    return {"row": row, "column": column, "group": group, "seed": seed, "setting": setting, **said}


def test_details_are_the_least_class_and_the_most_successful_backdoor() -> None:
    lines = [
        line("gmd", column, seed, **{"backdoor-success": success, "class-accuracies": classes})
        for column, seed, success, classes in (
            ("none", 0, None, [0.9, 0.2]),
            ("none", 1, None, [0.4, 0.8]),
            ("backdoor", 0, 0.1, [0.1, 0.1]),
            ("backdoor", 1, 0.3, [0.1, 0.1]),
            ("backdoor:3", 0, 0.6, [0.1, 0.1]),
            ("backdoor:3", 1, 0.8, [0.1, 0.1]),
        )
    ]
    table = accuracies(lines)
    names = ["", "none", "worst class", "backdoor", "backdoor success", "worst", "mean"]
    assert list(table) == [*names, SECONDS]
    entries = ["gmd", "50.0 ± 0.0", "30.0", "50.0 ± 0.0", "70.0", "50.0", "50.0", "-"]
    assert table.iloc[0].tolist() == entries
    clean = [found for found in lines if found["column"] == "none"]
    assert list(accuracies(clean)) == ["", "none", "worst class", "worst", SECONDS]
    lines[-1]["status"] = "failed"
    assert accuracies(lines)["backdoor success"].tolist() == ["failed"]


def test_the_scatter_is_that_of_the_worst_strength() -> None:
    lines = [
        line("gmd", column, seed, **{"final-accuracy": accuracy})
        for column, seed, accuracy in (
            ("ipm", 0, 0.9),
            ("ipm", 1, 0.9),
            ("ipm:0.1", 0, 0.4),
            ("ipm:0.1", 1, 0.6),
            ("zero", 0, 0.7),
            ("zero", 1, 0.7),
        )
    ]
    entries = accuracies(lines).iloc[0].tolist()
    assert entries == ["gmd", "70.0 ± 0.0", "50.0 ± 14.1", "50.0", "60.0", "-"]


def test_the_mean_is_over_the_attacks_and_seconds_are_of_the_runs_without_one() -> None:
    lines = [
        line("gmd", column, seed, **{"final-accuracy": accuracy, "seconds-per-round": seconds})
        for column, seed, accuracy, seconds in (
            ("none", 0, 0.9, 1.0),
            ("none", 1, 0.9, 2.0),
            ("zero", 0, 0.7, 8.0),
            ("zero", 1, 0.7, 8.0),
            ("ipm", 0, 0.3, 5.0),
            ("ipm", 1, 0.5, 7.0),
        )
    ]
    for found in lines:
        found["class-accuracies"] = None
    shown = accuracies(lines)
    assert shown[[WORST, MEAN, SECONDS]].iloc[0].tolist() == ["40.0", "55.0", "1.50"]
    assert accuracies(lines[2:])[[MEAN, SECONDS]].iloc[0].tolist() == ["55.0", "7.00"]
    # What a paper printed stands beside the accuracies alone.
    assert list(with_published(shown, {"zero": {"gmd": "71.0"}})) == [
        *("", "none", "worst class", "zero", "ipm", WORST)
    ]
    assert list(with_published(shown, {})) == list(shown)
    # A clean run that failed leaves the mean of the others, and no seconds.
    lines[0]["status"] = "failed"
    shown = accuracies(lines)
    assert shown[["none", WORST, MEAN, SECONDS]].iloc[0].tolist() == [
        "failed",
        "failed",
        "55.0",
        "-",
    ]


def test_an_incomplete_cell_is_not_a_mean_of_what_is_there() -> None:
    lines = [
        line(strategy, column, seed)
        for strategy in ("gmd", "bgmd")
        for column in ("none", "ipm", "ipm:0.1")
        for seed in (0, 1)
    ]
    assert accuracy_means(lines).loc["bgmd"].tolist() == [0.5, 0.5, 0.5]
    for missing in (-1, -2):  # a seed, then a whole strength
        means = accuracy_means(lines[:missing])
        [clean, ipm, worst] = means.loc["bgmd"]
        assert clean == 0.5
        assert math.isnan(ipm)
        assert math.isnan(worst)
        assert means.loc["gmd"].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.usefixtures("without_curves")
@pytest.mark.usefixtures("without_curves")
def test_report_refuses_runs_of_different_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--{key}={value}" for key, value in SMALL.items() if key != "partition"]
    arguments += ["--strategies", "mean", "--attack=none,zero", "--backend=inprocess"]
    for scheme in ("iid", "shards"):
        given = [*arguments, f"--partition={scheme}", f"--results-dir={tmp_path / scheme}"]
        assert main(["compare", *given]) == 0
    folders = [str(next((tmp_path / scheme).iterdir())) for scheme in ("iid", "shards")]
    assert main(["report", folders[0], f"--output={tmp_path / 'one'}"]) == 0
    assert main(["report", *folders, f"--output={tmp_path / 'both'}"]) == 2
    assert "partition 'iid' and 'shards'" in capsys.readouterr().err
    other = [*arguments, "--partition=iid", "--seed=1", "--compressor=qsgd"]
    assert main(["compare", *other, f"--results-dir={tmp_path / 'other'}"]) == 0
    packed = str(next((tmp_path / "other").iterdir()))
    assert main(["report", folders[0], packed, f"--output={tmp_path / 'packed'}"]) == 2
    assert "runs of mean with compressor 'none' and 'qsgd'" in capsys.readouterr().err
    assert main(["report", folders[0], folders[0], f"--output={tmp_path / 'twice'}"]) == 2
    assert "twice; allowed: once" in capsys.readouterr().err


# ------------------------------------------------------------------------------ from Python


def test_compare_from_python_keeps_rounds_and_table(tmp_path: Path) -> None:
    from fl_bgmd.simulations import compare

    keys = {key.replace("-", "_"): value for key, value in SMALL.items()}
    rounds: list[tuple[str, int]] = []
    result = compare(
        ["gmd", "mean"],
        ["none", "zero"],
        folder=tmp_path,
        on_progress=lambda name, number, accuracy: rounds.append((name, number)),
        **keys,
    )
    assert len(rounds) == 4 * (3 + 1)
    assert list(result.frame["row"]) == ["gmd", "gmd", "mean", "mean"]
    names = ["", "none", "worst class", "zero", "worst", "mean", "s / round"]
    assert list(result.table.columns) == names
    frame = result.runs["gmd", "zero", 0].frame
    assert list(frame.index) == [0, 1, 2, 3]
    assert frame["accepted"].dropna().tolist() == [10, 10, 10]
    assert float(frame["accuracy"].iloc[-1]) == result.frame["final-accuracy"][1]
    again = compare(["gmd", "mean"], ["none", "zero"], folder=tmp_path, **keys)
    assert again.lines == json.loads(json.dumps(result.lines))
    with pytest.raises(ConfigError, match=r"bath-size.*did you mean 'batch-size'"):
        compare(["gmd"], bath_size=3)


def test_run_from_python_takes_keys_by_name() -> None:
    told: list[int] = []
    result = run(
        SMALL,
        strategy="gmd",
        attack="zero",
        num_server_rounds=2,
        evaluate_every=2,
        on_round=lambda number, accuracy: told.append(number),
    )
    assert told == [0, 1, 2]
    assert result.config["dataset"] == "mnist"
    assert result.played == {"zero": 8}


# ---------------------------------------------------------------------------------- bases


def test_a_file_has_what_its_base_says_where_it_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "first.toml").write_text(
        'title = "first"\nseeds = 2\nrows = ["gmd", "cmd"]\ncolumns = ["none", "ipm"]\n'
        '[config]\ndataset = "mnist"\nbatch-size = 16\n'
    )
    (tmp_path / "second.toml").write_text(
        'base = "first.toml"\ntitle = "second"\ncolumns = ["alie"]\n[config]\nbatch-size = 32\n'
    )
    (tmp_path / "third.toml").write_text('base = "second.toml"\n[rows.own]\nstrategy = "mean"\n')
    second, third = (read_study(tmp_path / f"{name}.toml") for name in ("second", "third"))
    assert (second.title, second.seeds, [*second.rows]) == ("second", 2, ["gmd", "cmd"])
    assert ([*second.columns], dict(second.config)) == (
        ["alie"],
        {"dataset": "mnist", "batch-size": 32},
    )
    assert [*third.rows] == ["own"]


@pytest.mark.parametrize("base", ["a.toml", "b.toml", "nowhere.toml"])
def test_a_base_that_is_none_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'base = "{base}"\nrows = ["gmd"]\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n')
    with pytest.raises(ConfigError, match=r"nowhere\.toml|allowed: a file not based on this one"):
        read_study(tmp_path / "a.toml")


# ------------------------------------------------------------------------------- continued


def test_what_is_published_of_a_study_is_enough_to_continue_it(tmp_path: Path) -> None:
    study = Study(strategy_rows(["gmd"]), attack_columns(["none", "zero"]), SMALL, seeds=1)
    first, then = tmp_path / "first", tmp_path / "then"
    lines = run_cells(study.cells(), first)
    then.mkdir()
    kept, _ = (first / "cells.jsonl").read_text().splitlines()
    (then / "cells.jsonl").write_text(kept + "\n")
    ran: list[str] = []
    again = run_cells(study.cells(), then, on_done=lambda cell, _: ran.append(cell.name))
    assert ran == ["gmd/zero/seed-0"]
    assert again[0] == lines[0]
    assert again[1]["final-accuracy"] == lines[1]["final-accuracy"]
    whole, told = (result_of(lines[0], folder) for folder in (first, then))
    assert whole is not None
    assert told is not None
    assert told.accuracies == whole.accuracies
    assert told.bytes_up_to(3) == whole.bytes_up_to(3) > 0
    assert told.total("accepted") == whole.total("accepted") == 30
    assert len(told.rounds) == 2 < len(whole.rounds)
    other = Study(study.rows, study.columns, {**SMALL, "batch-size": 8})
    with pytest.raises(ConfigError, match="batch-size 16 and not 8"):
        run_cells(other.cells(), then)
