"""What leaves this repository: the wheel, beside somebody's own folders, and the Flower bundle."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fl_bgmd.strategies
import strategies

ROOT = Path(__file__).resolve().parent.parent
APP = """
import clients
import strategies
from fl_bgmd.strategies import BGMD, GMD

import fl_bgmd.strategies

assert clients.MINE, "the app's own clients/ is hidden"
assert strategies.MINE, "the app's own strategies/ is hidden"
assert BGMD(block_fraction=0.2).block_fraction == 0.2
print(fl_bgmd.strategies.__file__)
"""


def run(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    [built] = folder.glob("*.whl")
    return built


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fl_bgmd"}
    assert "fl_bgmd/strategies/bgmd.py" in names
    assert "fl_bgmd/strategies.py" not in names


def test_wheel_works_beside_an_app_with_its_own_folders(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    [site] = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies come from this environment; a path named in a .pth file is not searched
    # for further .pth files, so the editable install of this project stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    app = tmp_path / "app"
    for folder in ("strategies", "clients"):
        (app / folder).mkdir(parents=True)
        (app / folder / "__init__.py").write_text("MINE = True\n")
    (app / "main.py").write_text(APP)
    used = run(str(python), "main.py", cwd=app).strip()
    assert Path(used).is_relative_to(site)


def test_source_tree_and_wheel_export_the_same_names() -> None:
    assert fl_bgmd.strategies.__all__ == strategies.__all__
    for name in strategies.__all__:
        assert getattr(fl_bgmd.strategies, name) is getattr(strategies, name)


def test_core_does_not_import_strategies() -> None:
    code = "import sys, fl_bgmd, fl_bgmd.aggregators, fl_bgmd.replies, fl_bgmd.mods\n"
    code += "names = {'strategies', 'fl_bgmd.strategies'}\n"
    code += "assert not {m for m in sys.modules if m in names or m.startswith('strategies.')}"
    run(sys.executable, "-c", code, cwd=ROOT)


def test_bundle_holds_the_app_and_nothing_else(tmp_path: Path) -> None:
    flwr = Path(sys.executable).parent / "flwr"
    run(str(flwr), "build", "--app", str(ROOT), cwd=tmp_path)
    [bundle] = tmp_path.glob("*.fab")
    names = zipfile.ZipFile(bundle).namelist()
    for needed in (
        "pyproject.toml",
        "fl_bgmd/strategies.py",
        "strategies/bgmd.py",
        "clients/client_app.py",
        "simulations/server_app.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith((".venv", "results", ".git"))]
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(bundle).extractall(unpacked)
    code = "import fl_bgmd.strategies, clients.client_app, simulations.server_app\n"
    code += "print(simulations.server_app.__file__)"
    assert str(unpacked) in run(sys.executable, "-c", code, cwd=unpacked)
