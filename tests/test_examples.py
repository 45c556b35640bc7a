"""Other people's apps under attack, as they are and with the one line changed."""

import importlib
import os
import shutil
import struct
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_bgmd.data import load
from fl_bgmd.mods import ByzantineMod
from simulations.config import Config
from simulations.grid import InProcessGrid

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("pytorch", "sklearn", "numpy", "legacy")
ATTACK = ByzantineMod(attack="bit-flip", strength=100.0, fraction=0.4, seed=1)
LEAST = {"pytorch": 0.6, "sklearn": 0.85, "numpy": 0.9, "legacy": 0.9}
"""Accuracy that an app must reach with BGMD, four of ten clients hostile."""

MOST = {"pytorch": 0.3, "sklearn": 0.3, "numpy": 0.7, "legacy": 0.3}
"""Accuracy that averaging must stay below under attack; the numpy app's classes are two."""


def patched(source: str, patch: str) -> str:
    """Apply a unified diff: every hunk is found by its text."""
    for hunk in patch.split("\n@@ ")[1:]:
        lines = hunk.splitlines()[1:]
        before = "\n".join(line[1:] for line in lines if line[:1] in " -")
        after = "\n".join(line[1:] for line in lines if line[:1] in " +")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    return source


def copied(name: str, folder: Path, *, with_bgmd: bool) -> Path:
    """Copy an example into a folder, with its patch applied or without."""
    copy = folder / f"{name}-{'bgmd' if with_bgmd else 'fedavg'}"
    shutil.copytree(EXAMPLES / name, copy)
    if with_bgmd:
        server = copy / f"{name}_app" / "server_app.py"
        server.write_text(patched(server.read_text(), (copy / "bgmd.patch").read_text()))
    return copy


@contextmanager
def imported(app_folder: Path) -> Iterator[tuple[ModuleType, Config]]:
    """Import an app's modules and read its configuration, as Flower does; work in its folder."""
    flower = tomllib.loads((app_folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    package = flower["components"]["serverapp"].split(".")[0]
    before = Path.cwd()
    sys.path.insert(0, str(app_folder))
    os.chdir(app_folder)
    try:
        for part in ("client_app", "server_app", "task"):
            importlib.import_module(f"{package}.{part}")
        yield sys.modules[package], flower["config"]
    finally:
        os.chdir(before)
        sys.path.remove(str(app_folder))
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            del sys.modules[module]


def with_mods(app: ClientApp, *mods: object) -> ClientApp:
    """Put mods before an app that knows nothing of them."""
    outer = ClientApp(mods=list(mods))
    outer.train()(app)
    outer.evaluate()(app)
    return outer


def configured(app: ServerApp, config: Config) -> ServerApp:
    """Show a ServerApp a run configuration: Flower does so for ``flwr run`` only."""
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = dict(config)
        app(grid, context)

    return outer


def play(
    name: str, folder: Path, *, with_bgmd: bool, mods: tuple[object, ...] = (), **changes: object
) -> float:
    """Run an example on ten clients of this process; return the accuracy of the model it saved."""
    with imported(copied(name, folder, with_bgmd=with_bgmd)) as (app, config):
        torch.manual_seed(0)
        config |= changes
        grid = InProcessGrid(with_mods(app.client_app.app, *mods), 10, config)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        with np.errstate(all="ignore"):
            configured(app.server_app.app, config)(grid, context)
            return saved_accuracy(name, app, config)


def saved_accuracy(name: str, app: ModuleType, config: Config) -> float:
    """Return the test accuracy of the model in the working directory."""
    if name == "pytorch":
        net = app.task.Net()
        net.load_state_dict(torch.load("final_model.pt"))
        data = torch.utils.data.DataLoader(app.task.load_mnist(config["data-dir"], False), 512)
        return app.task.test(net, data, torch.device("cpu"))[1]
    arrays = list(np.load("final_model.npz").values())
    if name == "numpy":
        return app.task.accuracy(*arrays, app.task.split_tumours()[1])
    if name == "legacy":
        net = app.task.build_net()
        app.task.set_weights(net, arrays)
        return app.task.test(net, app.task.split_digits()[1])[1]
    if not np.isfinite(arrays[0]).all():
        return 0.0  # scikit-learn refuses to predict
    model = app.task.create_model(1)
    app.task.set_parameters(model, arrays)
    return model.score(*app.task.split_digits()[1])


@pytest.fixture(scope="module")
def mnist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a part of MNIST where torchvision looks for it: 4,000 and 1,000 images."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    dataset = load("mnist")
    parts = {
        "train-images-idx3": dataset.train_images[:4000],
        "train-labels-idx1": dataset.train_labels[:4000],
        "t10k-images-idx3": dataset.test_images[:1000],
        "t10k-labels-idx1": dataset.test_labels[:1000],
    }
    for name, array in parts.items():
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / f"{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, dict[str, object]]:
    """Return what the runs here change in the examples' configurations."""
    return {
        "pytorch": {
            "data-dir": str(request.getfixturevalue("mnist_folder")),
            "num-server-rounds": 4,
            "fraction-evaluate": 0.0,
            "local-epochs": 2,
            "batch-size": 16,
        }
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_patch_is_one_import_and_one_line_of_the_server(name: str) -> None:
    patch = (EXAMPLES / name / "bgmd.patch").read_text()
    [file] = [line for line in patch.splitlines() if line.startswith("+++")]
    assert file == f"+++ b/{name}_app/server_app.py"
    changes = [line for line in patch.splitlines() if line[:1] in "+-" and line[:3] not in "+++---"]
    module, old = "fl_bgmd.strategies", "flwr.serverapp.strategy"
    if name == "legacy":
        module, old = "fl_bgmd.strategies.legacy", "flwr.server.strategy"
    assert changes == [
        f"-from {old} import FedAvg",
        f"+from {module} import BGMD",
        "-    strategy = FedAvg(" + changes[2].partition("(")[2],
        "+    strategy = BGMD(" + changes[2].partition("(")[2],
    ]
    for source in (EXAMPLES / name).rglob("*.py"):
        assert "bgmd" not in source.read_text().lower(), f"{source.name} knows this project"
    readme = (EXAMPLES / name / "README.md").read_text()
    assert "\n".join(changes) in readme.replace("\n ", "\n"), "the README shows another diff"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bgmd", [False, True], ids=["fedavg", "bgmd"])
def test_averaging_breaks_and_bgmd_holds(
    name: str, with_bgmd: bool, tmp_path: Path, settings: dict[str, dict[str, object]]
) -> None:
    changes = settings.get(name, {})
    accuracy = play(name, tmp_path, with_bgmd=with_bgmd, mods=(ATTACK,), **changes)
    if with_bgmd:
        assert accuracy >= LEAST[name]
    else:
        assert not accuracy > MOST[name]
