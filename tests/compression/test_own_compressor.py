"""A compressor of somebody's own, declared once in their module, wherever compressors are named."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_messages import (
    honest_reply,
    plain_model,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    same_bits,
    sent_arrays,
    train_message,
)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from warm_python import run_code

from fl_bgmd.compression import COMPRESSORS, build_compressor, build_downlink, build_received
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.mods import CompressionMod
from fl_bgmd.options import OptionError
from fl_bgmd.replies import Rejection, screen
from fl_bgmd.strategies import GMD, legacy
from fl_bgmd.wire import PACKED_KEY, PACKED_RECORD, pack_model, unpack_model
from simulations.cli import main
from simulations.config import ConfigError, validate
from simulations.experiment import build_strategy
from simulations.grid import InProcessGrid

SOURCE = '''
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le

from fl_bgmd.compression import Compressor, compressor


@compressor("cut")
@dataclass(frozen=True)
class Mine(Compressor):
    """The first x bytes of each float64.

    Parameters
    ----------
    x : int
        Bytes that are kept of each value.
    """

    x: Annotated[int, Ge(1), Le(8)] = 4
    carries_model = True

    def encode(self, vector, generator=None):
        values = vector.detach().double().numpy().astype(">f8")
        return values.view(np.uint8).reshape(-1, 8)[:, : self.x].tobytes()

    def decode(self, data, size):
        if len(data) != self.num_bytes(size):
            raise ValueError(f"{len(data)} bytes")
        padded = np.zeros((size, 8), np.uint8)
        padded[:, : self.x] = np.frombuffer(data, np.uint8).reshape(size, self.x)
        values = padded.reshape(-1).view(">f8").astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        return torch.from_numpy(values)

    def num_bytes(self, size):
        return self.x * size

    def delta(self, size):
        return 0.9


class Undeclared(Mine):
    """A subclass that declares nothing."""
'''
SPEC = "tmp_lab:Mine:x=2"
NAME = "cut:2"
N = 4


def forget() -> None:
    """Leave this process as one that has not imported the module."""
    sys.modules.pop("tmp_lab", None)
    COMPRESSORS._things.pop("cut", None)  # type: ignore[attr-defined]
    importlib.invalidate_caches()


@pytest.fixture(autouse=True)
def lab(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "tmp_lab.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()


def context_of(**run_config: Any) -> Context:
    return Context(1, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), run_config)


def packed(mod: CompressionMod, context: Context, asked: dict[str, Any]) -> Message:
    """Return what a client with the mod replies."""
    message = train_message(plain_model(), config=asked)
    reply = honest_reply(message, random_update(plain_model(), 0))
    return mod(message, context, lambda m, c: reply)


def options(**more: Any) -> dict[str, Any]:
    common = {"min_available_nodes": N, "min_train_nodes": N, "fraction_evaluate": 0.0, "seed": 0}
    return common | more


# --------------------------------------------------------------------------------- everywhere


@pytest.mark.parametrize("named", [None, SPEC])
def test_from_python(named: str | None) -> None:
    strategy = GMD(**options(compressor=SPEC))
    assert strategy.compressor is not None
    assert strategy.compressor.name == NAME
    grid = InProcessGrid(regression_app([CompressionMod(compressor=named)]), N, {})
    result = strategy.start(grid, regression_model(), num_rounds=60)
    assert regression_error(result.arrays) < 0.3 * regression_error(regression_model())
    # 9 values of 2 bytes beside the 128 of the array's own header.
    assert result.train_metrics_clientapp[60]["bytes-up"] == N * (128 + 2 * 9)


def test_on_the_way_down() -> None:
    strategy = GMD(**options(downlink_compressor="tmp_lab:Mine:x=3"))
    grid = InProcessGrid(regression_app([CompressionMod()]), N, {})
    result = strategy.start(grid, regression_model(), num_rounds=60)
    assert regression_error(result.arrays) < 0.3 * regression_error(regression_model())
    assert result.train_metrics_clientapp[60]["bytes-down"] == N * (128 + 3 * 9)


def test_from_a_run_configuration() -> None:
    strategy = build_strategy(validate({"compressor": SPEC, "downlink-compressor": SPEC}))
    assert strategy.compressor == build_compressor("cut:x=2")
    for key in ("compressor", "downlink-compressor"):
        for value in ("tmp_lab:Mine:x=9", "tmp_lab:Mine:y=1", "tmp_lab:Undeclared", "tmp_lab:No"):
            with pytest.raises(ConfigError, match=f"compressor is '{value}'"):
                validate({key: value})


def test_from_the_command_line(tmp_path: Path) -> None:
    given = ["--dataset=mnist", "--model=tiny-cnn", "--partition=iid", "--num-clients=3"]
    given += ["--num-server-rounds=2", "--local-steps=1", "--batch-size=8", "--evaluate-every=2"]
    given += [f"--compressor={SPEC}", "--backend=inprocess", f"--results-dir={tmp_path}"]
    assert main(["run", *given]) == 0
    [record] = tmp_path.glob("*/*/*/*/run.json")
    found = json.loads(record.read_text())
    assert found["config"]["compressor"] == SPEC
    assert found["accepted"] == 2 * 3


def test_from_the_older_api() -> None:
    keys: list[list[str]] = []

    class Waiting(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            return [array - np.float32(0.5) for array in parameters], 1, {}

    def watch(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if message.metadata.message_type == "train":
            keys.append(list(reply.content["fitres.parameters"]))
        return reply

    def client_fn(context: Context) -> Client:
        return Waiting().to_client()

    model = ndarrays_to_parameters([np.ones((3, 2), np.float32), np.zeros(4, np.float32)])
    strategy = legacy.GMD(
        compressor=SPEC,
        initial_parameters=model,
        min_fit_clients=N,
        min_available_clients=N,
        fraction_evaluate=0.0,
    )

    def server_fn(context: Context) -> ServerAppComponents:
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    app = ClientApp(client_fn=client_fn, mods=[watch, CompressionMod(compressor=SPEC)])
    ServerApp(server_fn=server_fn)(InProcessGrid(app, N, {}), context_of())
    assert keys == [[PACKED_KEY]] * (2 * N)
    assert strategy.rule.compressor is not None
    assert strategy.rule.compressor.name == NAME


def test_misspelled_options_name_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"compressor is 'tmp_lab:Mine:y=2': .*no option 'y'"):
        GMD(compressor="tmp_lab:Mine:y=2")
    with pytest.raises(OptionError, match="x is '9'; allowed: a whole number, 1 to 8"):
        CompressionMod(compressor="tmp_lab:Mine:x=9")
    with pytest.raises(OptionError, match="a Undeclared; allowed: a class under @compressor"):
        build_compressor("tmp_lab:Undeclared")


def test_it_is_listed_once_it_is_imported() -> None:
    assert "cut" not in COMPRESSORS
    importlib.import_module("tmp_lab")
    kind = COMPRESSORS["cut"]
    assert kind.summary == "The first x bytes of each float64."
    assert kind.options["x"].help == "Bytes that are kept of each value"
    with pytest.raises(ValueError, match=r"downlink_compressor is 'top-k'; allowed: none, .*cut"):
        build_downlink("top-k")


# ------------------------------------------------------------------- what others may not choose


@pytest.mark.parametrize("text", ["os:system", SPEC, "tmp_lab:Mine", "cut:2", "zip", ""])
def test_a_message_makes_no_client_import_a_module(text: str) -> None:
    with pytest.raises(OptionError, match="in a message; allowed: none, "):
        packed(CompressionMod(), context_of(), {"compressor": text})
    assert "tmp_lab" not in sys.modules


def test_a_message_makes_no_client_import_a_module_for_the_model() -> None:
    compressor = build_downlink(SPEC)
    assert compressor is not None
    content, received = pack_model(plain_model(), compressor, 0)
    again = content.copy()
    unpack_model(again)
    assert same_bits(again["arrays"], received)
    forget()
    for text in (SPEC, NAME):
        content["fl-bgmd.model"]["compressor"] = text
        with pytest.raises(OptionError, match="in a message; allowed: none, "):
            unpack_model(content.copy())
    content["fl-bgmd.model"]["compressor"] = NAME
    unpack_model(content, specs=[SPEC])
    assert same_bits(content["arrays"], received)
    content, _ = pack_model(plain_model(), compressor, 0)
    content["fl-bgmd.model"]["compressor"] = "top-k"
    with pytest.raises(OptionError, match="downlink_compressor is 'top-k'"):
        unpack_model(content)


def test_clients_find_it_in_their_own_run_configuration() -> None:
    """In a process of their own, where nobody has imported the module yet."""
    reply = packed(CompressionMod(), context_of(compressor=SPEC), {"compressor": NAME})
    assert list(sent_arrays(reply)) == [PACKED_KEY]
    assert reply.content[PACKED_RECORD]["compressor"] == NAME
    # The name is the strategy's all the same: with another option than in the configuration.
    reply = packed(CompressionMod(), context_of(compressor=SPEC), {"compressor": "cut:3"})
    assert reply.content[PACKED_RECORD]["compressor"] == "cut:3"


def test_a_run_configuration_that_means_something_else_is_left_alone() -> None:
    """An app's key of the same name, under a strategy that asks for a known compressor."""
    for value in ("gzip", 3, "nowhere:Thing"):
        reply = packed(CompressionMod(), context_of(compressor=value), {"compressor": "l1-sign"})
        assert reply.content[PACKED_RECORD]["compressor"] == "l1-sign"


def test_known_names_in_messages_keep_their_options() -> None:
    assert build_received("qsgd:15,bucket=0") == build_compressor("qsgd:15,bucket=0")
    with pytest.raises(OptionError, match="levels is 'system'"):
        build_received("qsgd:system")


@pytest.mark.parametrize("named", ["os:system", SPEC, "top-k:0.4", "qsgd", "", 3, ["l1-sign"]])
def test_the_server_takes_no_other_compressor_from_a_reply(named: Any) -> None:
    reply = packed(CompressionMod(), context_of(), {"compressor": "l1-sign"})
    layout = ModelLayout(plain_model())

    def reason() -> Rejection | None:
        row = np.empty(layout.num_directions, layout.dtype)
        buffers = np.empty(layout.num_buffers, BUFFER_DTYPE)
        found = screen(reply, layout, row, buffers, compressor=build_compressor("l1-sign"))
        assert len(found.detail) < 200
        return found.reason

    assert reason() is None
    reply.content[PACKED_RECORD] = ConfigRecord({"compressor": named, "norm": 1.0})
    assert reason() is Rejection.PACKED
    assert "tmp_lab" not in sys.modules


def test_a_client_process_of_its_own_knows_what_its_app_imports(lab: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fl_bgmd.compression import build_received\n"
        "import tmp_lab\n"
        "print(build_received('cut:3').name)"
    )
    done = run_code(code, str(lab))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cut:3"
