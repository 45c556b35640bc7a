"""The examples of CONTRIBUTING.md are complete: each runs as a module."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from fl_bgmd.aggregators import MIXINGS, RULES
from fl_bgmd.compression import COMPRESSORS

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
SECTIONS = re.split(r"^## ", TEXT, flags=re.M)[1:]
EXAMPLES = [
    (section.partition("\n")[0], code)
    for section in SECTIONS
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
]


def test_there_is_an_example_of_each_thing_to_add() -> None:
    adds = [name for name in (s.partition("\n")[0] for s in SECTIONS) if name.startswith("Add ")]
    assert [*dict.fromkeys(name for name, _ in EXAMPLES)] == adds
    assert len(adds) == 5


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_the_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (RULES, MIXINGS, COMPRESSORS):  # what it declares is gone afterwards
        monkeypatch.setattr(registry, "_things", dict(registry._things))  # type: ignore[attr-defined]
    (tmp_path / "contributed.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "contributed", raising=False)
    module = importlib.import_module("contributed")
    monkeypatch.delitem(sys.modules, "contributed")
    assert module.__file__ == str(tmp_path / "contributed.py")
