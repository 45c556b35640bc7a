"""Tables fit the terminal: columns go, and nothing is cut or folded that holds a number."""

import io

import pandas as pd
import pytest
from rich.console import Console

from fl_bgmd.attacks import ATTACKS
from simulations.config import SETTINGS
from simulations.listings import print_attacks, print_keys
from simulations.report.tables import show
from simulations.terminal import UNBOUNDED, room

DETAILS = pd.DataFrame(
    {
        **{"strategy": ["mean", "bgmd+nearest-neighbor"], "status": ["diverged", "finished"]},
        **{"final": ["9.80 ± 0.10", "85.12 ± 0.31"], "best": ["10.01", "85.40"]},
        **{"worst class": ["0.00", "60.10"], "backdoor": ["-", "-"]},
        **{"s / round": ["1.11", "2.22"], "accepted": ["10", "20"], "rejected": ["10", "0"]},
        **{"MB up": ["111.6", "111.6"], "MB down": ["111.6", "111.6"]},
    }
)
ATTACKED = pd.DataFrame(
    {
        **{"": ["gmd", "*gmd, paper*"], "none": ["90.1 ± 0.2", "*91*"]},
        **{"worst class": ["80.0", ""]},
        **{"bit-flip": ["61.0 ± 0.2", "*60*"], "alie": ["88.0 ± 0.2", ""]},
        **{"backdoor": ["71.0 ± 0.2", ""], "backdoor success": ["90.0", ""]},
        **{"worst": ["61.0", ""], "mean": ["73.3", ""], "s / round": ["1.00", ""]},
    }
)


def shown(frame: pd.DataFrame, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(console, frame, "**What** it stands on.")
    return console.file.getvalue()


def columns_of(text: str) -> list[str]:
    return [name.strip() for name in text.splitlines()[1].strip("┃").split("┃")]


@pytest.mark.parametrize(
    ("frame", "width", "left"),
    [
        (DETAILS, 200, list(DETAILS)),
        (DETAILS, 105, [n for n in DETAILS if n not in ("backdoor", "MB down", "accepted")]),
        (DETAILS, 60, ["strategy", "status", "final"]),
        (DETAILS, 10, ["strategy", "final"]),
        (ATTACKED, 200, list(ATTACKED)),
        (
            ATTACKED,
            110,
            [name for name in ATTACKED if name not in ("s / round", "backdoor success")],
        ),
        (ATTACKED, 87, ["", "none", "bit-flip", "alie", "backdoor", "worst", "mean"]),
        (ATTACKED, 72, ["", "none", "bit-flip", "backdoor", "worst", "mean"]),
        (ATTACKED, 59, ["", "none", "bit-flip", "worst", "mean"]),
        (ATTACKED, 46, ["", "none", "worst", "mean"]),
        (ATTACKED, 10, ["", "none", "worst"]),
    ],
)
def test_the_least_important_columns_go_first(
    frame: pd.DataFrame, width: int, left: list[str]
) -> None:
    text = shown(frame, width)
    if width > 10:
        assert columns_of(text) == left
        assert max(map(len, text.splitlines())) <= width
        for name in left:
            for entry in frame[name]:
                assert entry in text
    gone = [str(name) for name in frame if name not in left]
    said = " ".join(text.partition("left out: ")[2].split())
    assert said == (f"{', '.join(gone)} (all columns: table.md)" if gone else "")


def test_listings_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for wide in (80, 300):
        console = Console(width=wide, force_terminal=True, color_system=None)
        print_keys(console, SETTINGS.values())
        print_attacks(console)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= wide
        for name in (*SETTINGS, *ATTACKS):
            assert f" {name} " in text  # whole, in a line
        assert ("left out" in text) == (wide == 80)


def test_files_and_pipes_get_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    pipe = Console(file=io.StringIO())
    assert room(pipe) == UNBOUNDED
    show(pipe, DETAILS, "")
    assert columns_of(pipe.file.getvalue()) == list(DETAILS)
    assert room(Console(file=io.StringIO(), force_terminal=True, width=70)) == 70
    monkeypatch.setenv("COLUMNS", "90")
    assert room(Console(file=io.StringIO())) == 90
