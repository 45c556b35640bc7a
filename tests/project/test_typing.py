"""Type checkers know the strategies' options, in an app that has installed the wheel."""

import inspect
import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fl_bgmd.strategies import BGMD, Mean, RobustStrategy, legacy, options_of
from strategies import typed
from strategies.generate import named_strategies, typed_module

ROOT = Path(__file__).resolve().parents[2]
APP = '''"""An app."""

from typing import Any

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.strategies import BGMD, GMD, FedBGMD, Mean, RobustStrategy, Round


class Mine(RobustStrategy):
    """A strategy with an option of its own."""

    def __init__(self, *, mine: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.mine = mine

    def aggregate(self, current: Round) -> Aggregate:
        """Return the first update."""
        return Aggregate(current.updates[self.mine], weights=None)


class Half(BGMD):
    """BGMD on half of the coordinates, with an option of its own."""

    def __init__(self, *, mine: int = 1, **options: Any) -> None:
        super().__init__(block_fraction=0.5, **options)


right = BGMD(block_fraction=0.2, seed=1, server_learning_rate=lambda number: 1 / number)
rights = [FedBGMD(block_fraction=0.2), GMD(solver="newton"), Mean(min_valid_replies=None)]
others = [Mine(mine=2, seed=3), Half(mine=2, seed=3), RobustStrategy("bgmd", block_fraction=0.2)]
'''
LEFT_OUT = ("torch", "pandas", "matplotlib", "IPython", "prompt_toolkit", "rich", "sqlalchemy")
LEFT_OUT += ("alembic", "cryptography", "fastapi", "httpx", "starlette", "urllib3", "pathspec")
MYPY = f"""
[mypy]
mypy_path = installed
strict = True
# As what is in site-packages.
[mypy-fl_bgmd.*]
follow_imports = silent
# Take seconds, torch minutes, and have no part in options.
[mypy-{",".join(f"{name}.*" for name in LEFT_OUT)}]
follow_imports = skip
follow_imports_for_stubs = True
"""
WRONG = [
    "wrong = BGMD(blok_fraction=0.2)",
    "wrong = FedBGMD(blok_fraction=0.2)",
    'wrong = BGMD(block_fraction="0.2")',
    'wrong = GMD(solver="gramm")',
    "wrong = Mean(block_fraction=0.2)",
]


@pytest.fixture(scope="module")
def app(wheel: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Return the folder of an app; the wheel, unpacked, is in ``installed``."""
    folder = tmp_path_factory.mktemp("app")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    (folder / "main.py").write_text("\n".join((APP, *WRONG, "")))
    # What mypy knows of the installed packages is kept: three seconds, from the second time on.
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy")
    (folder / "mypy.ini").write_text(MYPY.replace("[mypy]", f"[mypy]\ncache_dir = {cache}"))
    found = ["installed", sysconfig.get_path("purelib")]
    settings = {"include": ["main.py"], "extraPaths": found, "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return folder


def output_of(app: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=app, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy_reports_the_wrong_options_and_nothing_else(app: Path) -> None:
    report = output_of(app, "mypy", "--output=json", "main.py")
    found = [json.loads(line) for line in report.splitlines() if line.startswith("{")]
    found = [each for each in found if each["severity"] == "error"]  # its notes say more on them
    assert errors_of(app, [(each["line"], each["message"]) for each in found]) == WRONG
    assert '"blok_fraction"' in found[0]["message"]


def test_pyright_reports_the_wrong_options_and_nothing_else(app: Path) -> None:
    found = json.loads(output_of(app, "pyright", "--outputjson"))["generalDiagnostics"]
    lines = [(each["range"]["start"]["line"] + 1, each["message"]) for each in found]
    assert errors_of(app, lines) == WRONG
    assert '"blok_fraction"' in found[0]["message"]


def errors_of(app: Path, found: list[tuple[int, str]]) -> list[str]:
    """Return the lines of the app that are reported; the messages, where they are others."""
    text = (app / "main.py").read_text().splitlines()
    lines = list(dict.fromkeys(text[line - 1] for line, _ in found))
    return lines if set(lines) <= set(WRONG) else [message for _, message in found]


def test_the_types_are_those_that_are_declared() -> None:
    assert (ROOT / "strategies" / "typed.py").read_text() == typed_module(), "run make config"
    for name, cls in named_strategies().items():
        types = getattr(typed, f"{name}Options", typed.StrategyOptions)
        assert types.__annotations__.keys() == options_of(cls).keys()


@pytest.mark.parametrize("cls", named_strategies().values())
def test_signature_and_help_tell_the_options(cls: type[RobustStrategy]) -> None:
    options = options_of(cls)
    parameters = inspect.signature(cls).parameters
    assert parameters.keys() == options.keys()
    for name, option in options.items():
        assert parameters[name].default == option.default
        if name not in options_of(Mean):
            assert f"\n{name} : " in inspect.getdoc(cls)  # type: ignore[operator]
            assert f"    {option.help}.\n" in inspect.getdoc(cls)  # type: ignore[operator]
    twin = inspect.signature(getattr(legacy, cls.__name__)).parameters
    assert twin.keys() >= options.keys() - options_of(Mean).keys()
    assert {"parameter_names", "initial_parameters", "seed"} <= twin.keys()
    assert not {"checkpoints", "fraction_train", "options"} & twin.keys()


def test_help_of_an_own_class_keeps_what_it_says() -> None:
    class Own(BGMD):
        """Mine.

        Parameters
        ----------
        tol : float
            As I like it.

        Notes
        -----
        None.
        """

        defaults = {"device": "cpu"}  # noqa: RUF012

        def __init__(self, *, mine: int = 3, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]

    text = inspect.getdoc(Own)
    assert text is not None
    assert text.count("tol : float\n    As I like it.\n") == text.count("\ntol :") == 1
    assert text.index("As I like it") < text.index("mine : int, default 3") < text.index("Notes")
    assert "\ndevice : str, default 'cpu'\n" in text
    assert next(iter(inspect.signature(Own).parameters)) == "mine"
    assert inspect.signature(Own).parameters["device"].default == "cpu"


def test_without_docstrings_everything_works() -> None:
    code = "from fl_bgmd.strategies import BGMD; assert BGMD.__doc__ is None; BGMD(seed=1)"
    subprocess.run([sys.executable, "-OO", "-c", code], check=True, cwd=ROOT)
