"""The command line, as a user types it, over the in-process backend."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import click
import pytest
import typer
from rich.console import Console
from warm_python import Started

from fl_bgmd.aggregators import RECOMMENDED
from fl_bgmd.data import data_directory
from simulations.cli import app, main, reproducible
from simulations.config import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--backend=inprocess",
    "--dataset=mnist",
    "--model=tiny-cnn",
    "--num-server-rounds=2",
    "--local-steps=1",
    "--batch-size=8",
    "--num-clients=5",
    "--evaluate-every=2",
]
ATTACK = ["--attack=bit-flip", "--byzantine-fraction=0.4"]


def run_folder(results: Path) -> Path:
    [folder] = results.iterdir()
    return folder


def test_run_writes_history_table_and_plot(tmp_path: Path) -> None:
    assert main(["run", *SMALL, *ATTACK, f"--results-dir={tmp_path}"]) == 0
    folder = run_folder(tmp_path)
    run = folder / RECOMMENDED / "bit-flip" / "seed-0"
    record = json.loads((run / "run.json").read_text())
    lines = (run / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert record["status"] == "finished"
    assert record["config"]["attack"] == "bit-flip"
    assert record["backend"] == "inprocess"
    assert record["accepted"] == 10
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert ["accuracy" in entry for entry in rounds] == [True, False, True]
    for plot in ("accuracy-rounds.png", "accuracy-bytes.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert f"| {RECOMMENDED} | finished " in table
    assert "backdoor" not in table  # there was none
    assert f"<h1>{RECOMMENDED}</h1>" in (folder / "report.html").read_text()
    assert len((folder / "cells.jsonl").read_text().splitlines()) == 1


def test_compare_runs_every_strategy_from_the_same_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--strategies", "mean", "bgmd+nearest-neighbor", f"--results-dir={tmp_path}"]
    assert main(["compare", *SMALL, *ATTACK, *arguments]) == 0
    folder = run_folder(tmp_path)
    records = {
        name: json.loads((folder / name / "bit-flip" / "seed-0" / "run.json").read_text())
        for name in ("mean", "bgmd+nearest-neighbor")
    }
    assert all(record["config"]["strategy"] == name for name, record in records.items())
    first = set()
    for rounds in folder.glob("*/bit-flip/seed-0/rounds.jsonl"):
        first.add(json.loads(rounds.read_text().splitlines()[0])["loss"])
    assert len(first) == 1
    shown = capsys.readouterr().out
    assert "bgmd+nearest-neighbor" in shown
    assert "accuracy-rounds.png" in shown.replace("\n", "")


def test_same_seed_same_history_other_seed_another(tmp_path: Path) -> None:
    histories = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        assert main(["run", *SMALL, *ATTACK, f"--seed={seed}", f"--results-dir={folder}"]) == 0
        [rounds] = folder.glob("*/*/*/*/rounds.jsonl")
        last = json.loads(rounds.read_text().splitlines()[-1])
        histories.append((last["loss"], last["update-norm"], last["train-loss"]))
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


def test_averaging_diverges_and_is_a_result_not_a_crash(tmp_path: Path) -> None:
    arguments = ["--strategy=mean", "--num-server-rounds=30", "--learning-rate=1"]
    arguments += ["--local-steps=2", "--evaluate-every=30", f"--results-dir={tmp_path}"]
    assert main(["run", *SMALL, *ATTACK, *arguments]) == 0
    record = json.loads(next(tmp_path.glob("*/*/*/*/run.json")).read_text())
    assert record["status"] == "diverged"
    assert record["rejected"] > 0
    assert record["final-accuracy"] < 0.15


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--batch-size=0"], ["batch-size", "0", "1 or more"]),
        (["run", "--batch-size=many"], ["batch-size", "many", "whole number"]),
        (["run", "--client-threads=100000"], ["client-threads", "100000", "1 to 256"]),
        (["run", "--num-clients=1000000000"], ["num-clients", "1000000000", "1 to 50000"]),
        (["compare", "--dataset=mnist", "--num-clients=60001"], ["num-clients", "1 to 60000"]),
        (["run", "--bath-size", "3"], ["bath-size", "3", "batch-size"]),
        (["run", "--strategy=bmgd"], ["strategy", "bmgd", "bgmd"]),
        (["run", "--attack=bit-flip"], ["attack", "bit-flip", "byzantine-fraction"]),
        (["compare", "--strategies", "gmd+mixed"], ["mixing", "mixed", "nearest-neighbor"]),
        (["compare", "--partition=shards:81"], ["partition", "num-shards", "81", "multiple"]),
        (["compare", "--num-shards=81"], ["num-shards", "81", "partition = 'shards:81'"]),
        (["compare", "--mixing", "bucketing"], ["mixing", "strategy = 'bgmd+bucketing'"]),
        (["run", "--bgmd.memory=mean"], ["bgmd.memory", "strategy = 'bgmd:memory=mean'"]),
        (["compare", "--strategy=gmd"], ["strategy", "gmd", "as an argument, compare gmd"]),
        (["reproduce", "fig-toy", "--strategy=gmd"], ["strategy", "gmd", "with run"]),
        (["reproduce", "fig-toy", "--seed=3"], ["seed", "3", "with run"]),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"--results-dir={tmp_path}/results"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    for part in named:
        assert part in error
    assert not (tmp_path / "results").exists()


def test_a_command_that_does_not_exist_is_refused_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comapre", "gmd"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: command is 'comapre'; did you mean 'compare'?; allowed: run, ")
    assert error.count("mean") == 1


def test_attacks_that_are_given_one_by_one_all_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gmd", *SMALL, "--attack", "bit-flipp", "--attack=alie"]) == 2
    assert "attack is 'bit-flipp'" in capsys.readouterr().err


def test_without_data_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fl_bgmd.data import DataUnavailableError

    def nothing(*_: object, **__: object) -> None:
        raise DataUnavailableError("tried: a, b; put the files in X")

    monkeypatch.setattr("simulations.cli.load", nothing)
    assert main(["run", *SMALL]) == 3
    assert "put the files in X" in capsys.readouterr().err


def test_a_failed_run_ends_with_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the server fell over")

    monkeypatch.setattr("simulations.backends.run_experiment", broken)
    assert main(["run", *SMALL, f"--results-dir={tmp_path}"]) == 1
    assert "the server fell over" in capsys.readouterr().err
    record = json.loads(next(tmp_path.glob("*/*/*/*/run.json")).read_text())
    assert record["status"] == "failed"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lr-", ["lr-schedule", "server-lr-schedule", "lr-period", "lr-decay"]),
        ("fraction-*", ["fraction-train", "fraction-evaluate"]),
        ("partition", ["partition"]),
        ("", list(SETTINGS)),
    ],
)
def test_keys_lists_what_may_be_given(
    pattern: str,
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simulations.cli.CONSOLE", Console(width=1000))
    assert main(["keys", *filter(None, [pattern])]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[1]: line for line in lines if line.startswith("│ ") and line[2] != " "}
    assert list(found) == expected
    for key in expected:
        option = SETTINGS[key]
        assert option.allowed in found[key]
        assert option.help.replace("`", "").replace(":class:", "") in found[key]


def test_every_option_says_what_it_is() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    for command in group.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, f"{command.name} {parameter.name}"
                assert "`" not in parameter.help


def test_reproduce_names_each_study_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--help"]) == 0
    names = capsys.readouterr().out.partition("NAMES:")[2].replace("\n", " ").split(",")
    assert [name.strip() for name in names] == reproducible()
    assert len(set(reproducible())) == len(reproducible())


def test_keys_without_a_match_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "mixing"]) == 2
    assert "pattern is 'mixing'; allowed: part of num-server-rounds, " in capsys.readouterr().err


def test_data_command_names_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--dataset", "cifar10"]) == 0
    assert "50000 training and 10000 test images" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--results-dir={file}"], "results-dir is"),
        (["run", "--results-dir=r", "--checkpoint-dir={file}"], "checkpoint-dir is"),
        (["compare", "--checkpoint-dir={file}/a"], "checkpoint-dir is"),
        (["compare", "--attack=none", "--seeds=2", "--folder={file}"], "folder is"),
        (["reproduce", "fig-toy", "--output={file}"], "output is"),
        (["attacks", "--picture={file}"], "picture is"),
    ],
)
def test_where_nothing_can_be_written_nothing_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    given = [text.format(file=file) for text in arguments]
    assert main([*given, *(SMALL if given[0] in ("run", "compare") else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message} ")
    assert "allowed: a folder that can be written" in error
    assert list(tmp_path.iterdir()) == [file]


def test_folders_may_be_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FL_BGMD_DATA", str(data_directory()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rounds = ["--num-server-rounds=1", "--evaluate-every=1"]
    run = [*SMALL, *rounds, "--results-dir=~/results", "--checkpoint-dir=~/checkpoints"]
    assert main(["run", *run]) == 0
    grid = [*SMALL, *rounds, "--strategies=mean", "--attack=none", "--seeds=2", "--folder=~/grid"]
    assert main(["compare", *grid]) == 0
    assert main(["report", "~/grid", "--output=~/report"]) == 0
    assert main(["attacks", "--picture=~/picture"]) == 0
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        *("results", "checkpoints", "grid", "report", "picture")
    }
    assert main(["report", "~nobody-of-this-name/grid"]) == 2
    assert "~nobody-of-this-name/grid" in capsys.readouterr().err


def test_an_interrupt_during_the_imports_is_one_line(tmp_path: Path) -> None:
    """Interrupted in the middle of an import, whose code takes any exception for its own."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('numpy is broken') from error\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "simulations", "run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [["--attack=zero,zero"], ["--strategies", "gmd", "gmd"], ["--strategies", "gmd+"]],
)
def test_rows_and_columns_are_named_once(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *SMALL, *arguments, f"--results-dir={tmp_path}"]) == 2
    assert "allowed: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["run", *SMALL],
        ["run", *SMALL, "--jobs=2"],
        ["compare", *SMALL, "--attack=none", "--seeds=2", "--jobs=2"],
    ],
    ids=["run", "clients", "grid"],
)
@pytest.mark.parametrize(
    "awaited", ["results", "checkpoints/**/round-*"], ids=["starting", "computing"]
)
def test_an_interrupted_command_ends_at_once_with_a_word(
    command: list[str], awaited: str, tmp_path: Path
) -> None:
    many = [*command, "--num-server-rounds=100000", f"--results-dir={tmp_path / 'results'}"]
    many += [f"--checkpoint-dir={tmp_path / 'checkpoints'}"]
    code = "import runpy, sys; sys.path.insert(0, '')\n"
    code += "runpy.run_module('simulations', run_name='__main__', alter_sys=True)"
    process = Started(code, *many, folder=tmp_path, cwd=ROOT)
    watchdog = threading.Timer(150, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        while not next(tmp_path.glob(awaited), None):
            assert watchdog.is_alive(), f"no {awaited}"
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        asked = time.monotonic()
        done = process.wait()
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert done.returncode == 130
    assert time.monotonic() - asked < 30
    assert re.fullmatch("interrupted: .*\n", done.stderr)
