"""The model on its way down, packed."""

from typing import Any

import numpy as np
import pytest
from flower_messages import batch_norm_model, plain_model, same_bits
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_bgmd.compression import build_downlink
from fl_bgmd.mods import CompressionMod
from fl_bgmd.strategies import GMD, EmptyRoundsError, Mean, RobustStrategy
from fl_bgmd.wire import MODEL_RECORD, pack_model, received_model
from simulations import backends
from simulations.config import validate
from simulations.grid import InProcessGrid

LEVELS = 1000


def test_a_model_comes_back_rounded_and_its_buffers_as_they_were() -> None:
    model = batch_norm_model()
    compressor = build_downlink(f"qsgd:{LEVELS}")
    assert compressor is not None
    content, received = pack_model(model, compressor, seed=3)
    assert list(received) == list(model)
    assert same_bits(received, received_model(content))
    for key, array in model.items():
        there = received[key]
        assert (there.dtype, there.shape) == (array.dtype, array.shape)
        if array.numpy().dtype.kind != "f" or "running" in key:
            assert there.data == array.data
        elif array.numpy().size:
            spread = np.linalg.norm(np.concatenate([a.numpy().ravel() for a in model.values()]))
            assert np.abs(there.numpy() - array.numpy()).max() <= spread / LEVELS


def test_the_same_seed_rounds_the_same_way_and_on_average_it_is_right() -> None:
    model = plain_model()
    compressor = build_downlink("qsgd:4")
    assert compressor is not None
    assert same_bits(pack_model(model, compressor, 1)[1], pack_model(model, compressor, 1)[1])
    drawn = [pack_model(model, compressor, seed)[1]["weight"].numpy() for seed in range(3000)]
    error = np.mean(drawn, axis=0) - model["weight"].numpy()
    assert np.abs(error).max() < 5 * np.std(drawn, axis=0).max() / 3000**0.5


@pytest.mark.parametrize("name", ["top-k:0.1", "qsgd:0", "sign", "zip", ""])
def test_what_would_not_leave_a_model_is_refused(name: str) -> None:
    expected = r"(downlink_compressor|levels|compressor) is .*; allowed: "
    with pytest.raises(ValueError, match=expected):
        GMD(downlink_compressor=name)


def start(strategy: RobustStrategy, mods: list[Any], rounds: int = 1) -> tuple[Result, list[Any]]:
    """Run clients that add 1 to what they received; return what they saw as well."""
    app, seen = ClientApp(mods=mods), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert MODEL_RECORD not in message.content
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        seen.append(arrays)
        moved = ArrayRecord({key: Array(array.numpy() + 1) for key, array in arrays.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app, 3, {})
    return strategy.start(grid, plain_model(), num_rounds=rounds), seen


def test_clients_train_the_rounded_model_and_the_server_moves_its_own() -> None:
    strategy = Mean(downlink_compressor="qsgd:2", fraction_evaluate=0.0)
    result, seen = start(strategy, [CompressionMod()])
    assert all(same_bits(arrays, seen[0]) for arrays in seen)
    assert not same_bits(seen[0], plain_model())
    for key, array in plain_model().items():
        assert np.allclose(result.arrays[key].numpy(), array.numpy() + 1, atol=1e-6)


def test_fewer_bytes_go_down_and_they_are_counted() -> None:
    sizes = {}
    for name in ("none", "qsgd:2"):
        result, _ = start(Mean(downlink_compressor=name, fraction_evaluate=0.0), [CompressionMod()])
        sizes[name] = result.train_metrics_clientapp[1]["bytes-down"]
    assert sizes["qsgd:2"] < sizes["none"]


def test_both_ways_at_once() -> None:
    strategy = GMD(downlink_compressor="qsgd:100", compressor="none", fraction_evaluate=0.0)
    up = GMD(downlink_compressor="qsgd:100", compressor="low-rank:4", fraction_evaluate=0.0)
    one, _ = start(strategy, [CompressionMod()], rounds=3)
    both, _ = start(up, [CompressionMod()], rounds=3)
    for key, array in one.arrays.items():
        assert np.allclose(array.numpy(), both.arrays[key].numpy(), atol=1e-4)


def test_clients_without_the_mod_fail_and_the_run_ends_as_an_error() -> None:
    with pytest.raises(EmptyRoundsError) as error:
        start(Mean(downlink_compressor="qsgd:2", fraction_evaluate=0.0), [], rounds=2)
    rounds = error.value.result.train_metrics_clientapp.values()
    assert [m["rejected"] for m in rounds] == [3, 3]


def test_an_experiment_with_every_kind_of_compression() -> None:
    """With attackers in the grid, who must see what the clients see."""
    given = {
        "dataset": "mnist",
        "model": "tiny-cnn",
        "num-clients": 5,
        "partition": "shards:20",
        "num-server-rounds": 3,
        "local-steps": 1,
        "evaluate-every": 3,
        "compressor": "qsgd:7",
        "downlink-compressor": "qsgd:127",
        "fraction-evaluate": 1.0,
        "strategy": "gmd",
        "attack": "ipm",
        "byzantine-fraction": 0.4,
        "device": "cpu",
    }
    result = backends.run(validate(given), backend="inprocess")
    assert result.error == ""
    assert result.rounds[-1]["accepted"] == 5
    assert result.played == {"ipm": 6}
    assert "clients-accuracy" in result.rounds[-1]
