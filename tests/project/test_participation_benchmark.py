"""The benchmark of sampled clients and of unknown shares: its cells, its file, its table."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tables import cells_of

from benchmarks.participation import Cell, cells, main, read, tables
from simulations.config import validate

LINE = {"status": "finished", "accuracy": 50.0, "least": 40.0, "estimate": None, "seconds": 1.0}


def write(path: Path, *lines: tuple[Cell, float, float | None]) -> None:
    path.write_text(
        "".join(
            json.dumps(asdict(cell) | LINE | {"accuracy": accuracy, "estimate": estimate}) + "\n"
            for cell, accuracy, estimate in lines
        )
    )


@pytest.mark.parametrize("part", ["participation", "share"])
def test_every_cell_is_a_run_that_there_can_be(part: str) -> None:
    options = argparse.Namespace(
        part=part,
        rules=["gmd", "trimmed-mean"],
        attacks=["none", "ipm:10"],
        stale=[0, 30],
        assumed=["0.1", "auto"],
        seeds=[0, 1],
        rounds=8,
    )
    found = list(cells(options))
    assert len(set(found)) == len(found) == 16
    for cell in found:
        config = validate(cell.config())
        assert config["byzantine-fraction"] == (0.0 if cell.attack == "none" else 0.2)
        assert config["num-server-rounds"] == 8


def test_a_table_has_the_mean_of_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.jsonl"
    write(
        path,
        *(
            (Cell("participation", "gmd", "ipm:10", "0.25", 30, seed=s), 60.0 + s, None)
            for s in (0, 2)
        ),
        (Cell("participation", "gmd", "ipm:10", "0.25", 0), 10.0, None),
        (Cell("share", "krum", "sign-flip", "auto"), 70.0, 0.24),
    )
    expected = [
        ["rule", "stale_updates", "ipm:10"],
        ["gmd", "0", "10.0"],
        ["gmd", "30", "61.0 (60.0 to 62.0)"],
        [""],
        ["rule", "assumed", "sign-flip"],
        ["krum", "auto", "70.0, assumed 0.24"],
    ]
    assert cells_of(tables(read(path))) == expected
    main(["--table", "--output", str(path)])
    assert cells_of(capsys.readouterr().out) == expected


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    only = Cell("participation", "gmd", "ipm:10", "0.25", 0, rounds=5)
    write(path, (only, 10.0, None))
    before = path.read_text()
    given = ["--rules", "gmd", "--attacks", "ipm:10", "--stale", "0", "--seeds", "0"]
    main([*given, "--rounds", "5", "--output", str(path)])
    assert path.read_text() == before
