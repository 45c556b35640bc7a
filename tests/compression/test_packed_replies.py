"""Packed updates from client to model: the mod, the screening, the strategies."""

import random
import resource
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    batch_norm_model,
    honest_reply,
    random_update,
    regression_app,
    regression_error,
    regression_model,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
    train_message,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_bgmd.aggregators import coordinate_median
from fl_bgmd.compression import build_compressor
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.mods import ByzantineMod, CompressionMod
from fl_bgmd.replies import Rejection, Screened, screen
from fl_bgmd.strategies import (
    BGMD,
    GMD,
    QBGMD,
    CenteredClipping,
    FedBGMD,
    Mean,
    NormThreshold,
    RobustFilter,
)
from fl_bgmd.wire import ATTACK_RECORD, COMPRESSION_ERROR, PACKED_KEY, PACKED_RECORD
from simulations.backends import run
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid

NAMES = (
    "none",
    "top-k:0.5",
    "rand-k:0.5",
    "scaled-rand-k:0.5",
    "qsgd",
    "l1-sign",
    "sign",
    "low-rank:1",
)
N = 6


def packed(message: Message, name: str = "top-k:0.5", seed: int = 0) -> Message:
    """Return an honest client's reply, packed by the mod."""
    reply = honest_reply(message, random_update(sent_arrays(message), seed))
    grid = InProcessGrid(regression_app(), 1, {})
    [context] = grid._contexts.values()
    return CompressionMod(compressor=name)(message, context, lambda m, c: reply)


def read(reply: Message, model: ArrayRecord, name: str) -> tuple[Screened, Any, Any]:
    layout = ModelLayout(model)
    row = np.full(layout.num_directions, np.nan, layout.dtype)
    buffers = np.full(layout.num_buffers, np.nan, BUFFER_DTYPE)
    return screen(reply, layout, row, buffers, compressor=build_compressor(name)), row, buffers


def fit(
    strategy: Any, mods: list[Any], rounds: int = 60, config: Any = None, step: float = 0.1
) -> Any:
    """Train the regression; return the final arrays and the metrics."""
    grid = InProcessGrid(regression_app(mods, learning_rate=step), N, config or {})
    return strategy.start(grid, regression_model(), num_rounds=rounds)


def options(**more: Any) -> dict[str, Any]:
    common = {"min_available_nodes": N, "min_train_nodes": N, "fraction_evaluate": 0.0, "seed": 0}
    return common | more


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_packed_reply_is_what_its_bytes_stand_for(name: str) -> None:
    model = batch_norm_model()
    message = train_message(model, 1, {"server-round": 1}, "train")
    true, row_of_true, buffers_of_true = read(
        honest_reply(message, random_update(model, 0)), model, name
    )
    assert true.reason is None
    reply = packed(message, name)
    [arrays] = reply.content.array_records.values()
    assert set(arrays) == {PACKED_KEY} | {spec.key for spec in ModelLayout(model).buffers}
    screened, row, buffers = read(reply, model, name)
    assert screened.reason is None, screened.detail
    data = arrays[PACKED_KEY].numpy().tobytes()
    compressor = build_compressor(name).for_shapes(ModelLayout(model).shapes)
    expected = compressor.decode(data, len(row))
    np.testing.assert_array_equal(row, expected.numpy())
    np.testing.assert_array_equal(buffers, buffers_of_true)
    assert screened.norm == pytest.approx(float(np.linalg.norm(row_of_true)), rel=1e-6)
    assert len(data) == compressor.num_bytes(len(row))


def test_a_packed_reply_nobody_asked_for_is_rejected() -> None:
    model = batch_norm_model()
    message = train_message(model, 1, {"server-round": 1}, "train")
    layout = ModelLayout(model)
    row, buffers = np.empty(layout.num_directions, layout.dtype), np.empty(layout.num_buffers)
    found = screen(packed(message), layout, row, buffers.astype(BUFFER_DTYPE))
    assert found.reason is Rejection.KEYS


def test_the_mod_does_nothing_unless_asked() -> None:
    model = regression_model()
    for server_config in ({"server-round": 1}, {"server-round": 1, "other": 2}):
        message = train_message(model, 1, server_config, "train")
        update = random_update(model, 0)
        reply = honest_reply(message, update)
        grid = InProcessGrid(regression_app(), 1, {})
        [context] = grid._contexts.values()
        after = CompressionMod()(message, context, lambda m, c, r=reply: r)
        assert same_bits(sent_arrays(after), sent_arrays(honest_reply(message, update)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", [Mean, BGMD])
def test_every_strategy_learns_from_packed_updates(strategy: Any, name: str) -> None:
    torch.manual_seed(0)
    extra = {"block_fraction": 0.5} if strategy is BGMD else {}
    # Plain signs have no size: steps of 1 until the server makes them smaller.
    rate = 0.05 if name == "sign" else 0.2 if name.startswith("scaled") else 1.0
    rounds = 15 if rate == 1.0 else 40
    made = strategy(**options(compressor=name, server_learning_rate=rate, **extra))
    result = fit(made, [CompressionMod()], rounds, step=0.3)
    assert regression_error(result.arrays) < 0.25 * regression_error(regression_model())
    last = result.train_metrics_clientapp[rounds]
    assert last["accepted"] == N
    plain = sum(len(a.data) for a in regression_model().values())
    assert last["bytes-down"] == N * plain


def test_error_feedback_keeps_what_was_lost() -> None:
    """After each round: the sum of what was sent plus the memory is the sum of the updates."""
    model = regression_model()
    grid = InProcessGrid(regression_app([CompressionMod()]), 1, {})
    honest = InProcessGrid(regression_app(), 1, {})
    asked = {"server-round": 1, "compressor": "top-k:0.2", "error-feedback": True}
    sent, true = np.zeros(9), np.zeros(9)
    for _ in range(5):
        message = train_message(model, 1, asked, "train")
        [reply] = grid.send_and_receive([message])
        sent += read(reply, model, "top-k:0.2")[1]
        [plain] = honest.send_and_receive([train_message(model, 1, {"server-round": 1}, "train")])
        true += read(plain, model, "top-k:0.2")[1]
    [context] = grid._contexts.values()
    [memory] = to_numpy(context.state["fl-bgmd.compression-error"]).values()
    np.testing.assert_allclose(sent + memory, true, rtol=1e-4, atol=1e-6)
    assert np.abs(memory).max() > 0


def test_feedback_beats_none_with_a_biased_compressor() -> None:
    errors = []
    for feedback in (True, False):
        strategy = NormThreshold(
            **options(compressor="top-k:0.12", error_feedback=feedback, drop_fraction=0.0)
        )
        errors.append(regression_error(fit(strategy, [CompressionMod()], rounds=40).arrays))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("mods", "adheres"),
    [([CompressionMod(), ByzantineMod()], True), ([ByzantineMod(), CompressionMod()], False)],
)
def test_hostile_clients_before_and_after_the_compression(mods: list[Any], adheres: bool) -> None:
    config = {"attack": "bit-flip", "byzantine-fraction": 0.34, "byzantine-selection": "fixed"}
    model = regression_model()
    grid = InProcessGrid(regression_app(mods), N, config)
    asked = {"server-round": 1, "compressor": "l1-sign"}
    messages = [train_message(model, node, asked, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    kinds = [PACKED_KEY in sent_arrays(reply) for reply in replies]
    assert kinds.count(True) == (N if adheres else N - 2)
    rows = [read(reply, model, "l1-sign") for reply in replies]
    assert all(screened.reason is None for screened, _, _ in rows)
    norms = sorted(float(np.linalg.norm(row)) for _, row, _ in rows)
    assert norms[3] < 0.1 * norms[4]
    # Both kinds of liar are thrown out by their norms.
    result = fit(
        NormThreshold(**options(compressor="l1-sign", drop_fraction=0.34)), mods, 80, config
    )
    assert regression_error(result.arrays) < 0.3 * regression_error(model)


@pytest.mark.parametrize("norms", ["computed", "reported"])
def test_option_one_takes_the_norms_that_clients_report(norms: str) -> None:
    def boast(message: Message, context: Any, call_next: Any) -> Message:
        """Report a small norm with a huge update."""
        reply = call_next(message, context)
        if int(context.node_config["partition-id"]) == 0:
            reply.content[PACKED_RECORD]["norm"] = 1e-9
            [arrays] = reply.content.array_records.values()
            data = bytearray(arrays[PACKED_KEY].numpy().tobytes())
            data[:4] = np.array([1e3], "<f4").tobytes()
            arrays[PACKED_KEY] = Array(np.frombuffer(bytes(data), np.uint8))
        return reply

    strategy = NormThreshold(**options(compressor="l1-sign", drop_fraction=0.3, norms=norms))
    result = fit(strategy, [boast, CompressionMod()], 5)
    # Option I trusts the reported norm: the liar stays in.
    assert (regression_error(result.arrays) > 100) == (norms == "reported")


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, np.inf])
def test_clients_report_the_norm_that_the_server_asks_for(order: float) -> None:
    """Option I for any q: of the update as it was before the compression."""
    heard: list[tuple[float, float]] = []

    def overhear(message: Message, context: Any, call_next: Any) -> Message:
        asked = message.content.config_records["config"].get("norm-order", 2.0)
        reply = call_next(message, context)
        heard.append((float(asked), float(reply.content[PACKED_RECORD]["norm"])))  # type: ignore[arg-type]
        return reply

    made = NormThreshold(**options(compressor="l1-sign", norms="reported", order=order))
    fit(made, [overhear, CompressionMod(error_feedback=False)], 1)
    plain = NormThreshold(**options(compressor="none", drop_fraction=0.0))
    rows: list[np.ndarray] = []

    def watch(message: Message, context: Any, call_next: Any) -> Message:
        reply = call_next(message, context)
        sent, received = (to_numpy(sent_arrays(m)) for m in (message, reply))
        rows.append(np.concatenate([(sent[key] - received[key]).ravel() for key in sent]))
        return reply

    fit(plain, [watch], 1)
    assert [asked for asked, _ in heard] == [order] * N
    expected = [np.linalg.norm(row.astype(float), order) for row in rows]
    np.testing.assert_allclose([norm for _, norm in heard], expected, rtol=1e-5)


def test_an_update_that_is_not_finite_has_a_norm_to_report() -> None:
    asked = {"server-round": 1, "compressor": "top-k:0.5", "norm-order": 3.0}
    message = train_message(regression_model(), 1, asked, "train")

    def broken(message: Message, context: Any, call_next: Any) -> Message:
        reply = call_next(message, context)
        arrays = {
            key: np.full_like(value, np.inf)
            for key, value in to_numpy(sent_arrays(message)).items()
        }
        reply.content["arrays"] = to_record(arrays)
        return reply

    grid = InProcessGrid(regression_app([CompressionMod(), broken]), 1, {})
    [reply] = grid.send_and_receive([message])
    assert not reply.has_error()
    assert read(reply, regression_model(), "top-k:0.5")[0].reason is not None


OPTIONS_ONE_AND_TWO = [
    ByzantineMod(compressed=False),
    CompressionMod(),
    ByzantineMod(compressed=True),
]


@pytest.mark.parametrize("compress", [True, False])
def test_one_app_plays_both_options(compress: bool) -> None:
    config = {"attack": "bit-flip", "byzantine-fraction": 0.34, "byzantine-selection": "fixed"}
    config |= {"compress-lies": compress}
    model = regression_model()
    grid = InProcessGrid(regression_app(OPTIONS_ONE_AND_TWO), N, config)
    asked = {"server-round": 1, "compressor": "l1-sign"}
    messages = [train_message(model, node, asked, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    packed_ones = [PACKED_KEY in sent_arrays(reply) for reply in replies]
    assert packed_ones.count(False) == (0 if compress else 2)
    rows = [read(reply, model, "l1-sign")[1] for reply in replies]
    norms = sorted(float(np.linalg.norm(row)) for row in rows)
    assert norms[3] < 0.1 * norms[4]  # each lies once


@pytest.mark.parametrize("compress", [True, False])
def test_a_lie_leaves_the_memory_of_honest_rounds_alone(compress: bool) -> None:
    config = {"attack": "bit-flip", "byzantine-fraction": 0.34, "compress-lies": compress}
    model = regression_model()
    grid = InProcessGrid(regression_app(OPTIONS_ONE_AND_TWO), N, config)
    seen = set()
    for number in range(1, 8):
        before = memories(grid)
        asked = {"server-round": number, "compressor": "top-k:0.3"}
        messages = [train_message(model, node, asked, "train") for node in grid.get_node_ids()]
        for place, reply in enumerate(grid.send_and_receive(messages)):
            lied = ATTACK_RECORD in reply.content
            seen.add((lied, before[place] is None))
            assert (memories(grid)[place] == before[place]) == lied
    assert len(seen) == 4


def test_compress_lies_is_a_key_of_the_app() -> None:
    """Option II in the project's own app: two of five replies travel unpacked."""
    small: dict[str, Any] = {"num-server-rounds": 1, "num-clients": 5, "local-steps": 1}
    small |= {"dataset": "mnist", "model": "tiny-cnn", "attack": "bit-flip"}
    small |= {"byzantine-fraction": 0.4, "assumed-byzantine-fraction": 0.4}
    small |= {"strategy": "norm-threshold", "compressor": "l1-sign", "evaluate-every": 1}
    sizes = []
    for compress in (True, False):
        result = run(validate(small | {"compress-lies": compress}), backend="inprocess")
        assert result.played == {"bit-flip": 2}
        sizes.append(result.last("bytes-up", None))
    num_bytes = 4 * 412  # plain float32
    assert sizes[1] - sizes[0] > 2 * 0.8 * num_bytes
    with pytest.raises(ConfigError, match="compress-lies is False with client-momentum-of-lies Tr"):
        validate(small | {"compress-lies": False, "client-momentum-of-lies": True})


def memories(grid: InProcessGrid) -> list[bytes | None]:
    """Return the error memories of a grid's clients."""
    found = []
    for context in grid._contexts.values():
        record = context.state.array_records.get("fl-bgmd.compression-error")
        found.append(None if record is None else to_numpy(record)["vector"].tobytes())
    return found


@pytest.mark.parametrize(
    ("value", "accepted"),
    [(0.0, True), (2.5, True), (3, True), (-1.0, False), (float("nan"), False), ("x", False)],
)
def test_reported_norms_are_screened(value: Any, accepted: bool) -> None:
    model = regression_model()
    reply = packed(train_message(model, 1, {"server-round": 1}, "train"))
    reply.content[PACKED_RECORD] = ConfigRecord({"norm": value})
    reason = read(reply, model, "top-k:0.5")[0].reason
    assert reason is (None if accepted else Rejection.PACKED)


def mutate(array: Array, draw: random.Random) -> Array:
    """Return a packed array with something wrong with it (or, rarely, nothing)."""
    data = bytearray(array.numpy().tobytes())
    kind = draw.randrange(8)
    if kind == 0:
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == 1:
        data += draw.randbytes(draw.randrange(1, 2000))
    elif kind == 2:
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == 3:
        data = bytearray(draw.randbytes(len(data)))
    elif kind == 4:
        data[:4] = draw.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xbf"])
    elif kind == 5:
        shape = draw.choice([(10**12,), (len(data), 1), (), (2**62, 2**62), (-1,)])
        return Array(dtype="uint8", shape=shape, stype="numpy.ndarray", data=array.data)
    elif kind == 6:
        values = np.frombuffer(bytes(data), np.uint8)
        dtype = draw.choice([np.int8, np.float32, np.complex64, np.uint16, np.bool_])
        return Array(values.astype(dtype))
    else:
        raw = array.data
        cut = draw.randrange(len(raw))
        return Array(
            dtype="uint8",
            shape=(len(data),),
            stype="numpy.ndarray",
            data=raw[:cut] + draw.randbytes(5),
        )
    return Array(np.frombuffer(bytes(data), np.uint8))


def test_ten_thousand_corrupt_messages_end_nothing_and_cost_nothing() -> None:
    model = batch_norm_model()
    message = train_message(model, 1, {"server-round": 1}, "train")
    names = ("top-k:0.3", "rand-k:0.3", "qsgd:5", "l1-sign", "sign", "low-rank:1", "none")
    honest = {name: packed(message, name) for name in names[:-1]}
    honest["none"] = packed(message, "none")
    draw = random.Random(0)
    reasons = set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(10_000):
        name = names[i % len(names)]
        reply = packed(message, name) if i < len(names) else honest[name]
        [arrays] = reply.content.array_records.values()
        kept = arrays[PACKED_KEY]
        arrays[PACKED_KEY] = mutate(kept, draw)
        screened, row, _ = read(reply, model, name)
        arrays[PACKED_KEY] = kept
        reasons.add(screened.reason)
        if screened.reason is None:
            assert np.isfinite(row).all()
        else:
            assert screened.detail
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes on Linux
    assert reasons == {None, *{Rejection.SHAPE, Rejection.DTYPE, Rejection.ENCODING}} | (
        {Rejection.PACKED}
    )
    assert grown < 50_000


def test_unknown_compressors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compressor is 'zip'.*; allowed: none, "):
        GMD(compressor="zip")
    with pytest.raises(ValueError, match="norms is 'believed'; allowed: computed, reported"):
        NormThreshold(norms="believed")


def test_fedavg_and_the_mod_leave_each_other_alone() -> None:
    own = {key: value for key, value in options().items() if key != "seed"}
    plain = fit(FedAvg(**own), [], rounds=3)
    with_mod = fit(FedAvg(**own), [CompressionMod()], rounds=3)
    # Flower samples the nodes in an order of its own: sums differ in the last digits.
    for key, value in to_numpy(plain.arrays).items():
        np.testing.assert_allclose(to_numpy(with_mod.arrays)[key], value, rtol=1e-5)


@pytest.mark.parametrize("strategy", [QBGMD, FedBGMD])
def test_quantized_block_descent_learns_under_attack(strategy: Any) -> None:
    config = {"attack": "bit-flip", "byzantine-fraction": 0.34}
    made = strategy(**options(block_fraction=0.5))
    assert made.compressor.name == "qsgd:63"
    result = fit(made, [CompressionMod(), ByzantineMod()], 100, config)
    assert regression_error(result.arrays) < 0.2 * regression_error(regression_model())
    with pytest.raises(ValueError, match="compressor is 'none'; allowed: a compressor"):
        strategy(compressor="none")


@pytest.mark.parametrize("name", ["rand-k:0.5", "scaled-rand-k:0.5"])
@pytest.mark.parametrize("strategy", [RobustFilter, GMD, Mean])
def test_server_chosen_coordinates_travel_as_a_seed(strategy: Any, name: str) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(strategy):  # type: ignore[misc,valid-type]
        def aggregate(self, current: Any) -> Any:
            seen.append(tuple(current.updates.shape))
            return super().aggregate(current)

    made = Watching(**options(compressor=name, shared_coordinates=True, server_learning_rate=0.5))
    result = fit(made, [CompressionMod()], 60)
    assert regression_error(result.arrays) < 0.2 * regression_error(regression_model())
    # 9 values, 4 chosen: 16 bytes beside the 128 of the array's own header.
    assert set(seen) == {(N, 4)}
    assert result.train_metrics_clientapp[1]["bytes-up"] == N * (128 + 4 * 4)


@pytest.mark.parametrize("name", ["rand-k:0.5", "scaled-rand-k:0.5"])
def test_clients_without_the_mod_share_the_coordinates(name: str) -> None:
    """The same model comes out: error feedback apart, packing loses nothing that is looked at."""
    models = []
    for mods in ([], [CompressionMod(error_feedback=False)]):
        made = Mean(**options(compressor=name, shared_coordinates=True))
        models.append(to_numpy(fit(made, mods, 5).arrays))
    for key, value in models[0].items():
        np.testing.assert_allclose(models[1][key], value, rtol=1e-5, atol=1e-6)


def test_coordinates_are_not_shared_with_rules_that_remember_them() -> None:
    shared = {"compressor": "rand-k", "shared_coordinates": True}
    with pytest.raises(ValueError, match="shared_coordinates is True with compressor 'top-k'"):
        GMD(compressor="top-k", shared_coordinates=True)
    for strategy in (BGMD, CenteredClipping):
        with pytest.raises(
            ValueError, match=f"shared_coordinates is True with {strategy.__name__}"
        ):
            strategy(**shared)
    BGMD(**shared, memory="none")
    with pytest.raises(ConfigError, match="shared-coordinates is True with compressor 'none'"):
        validate({"shared-coordinates": "on"})
    with pytest.raises(
        ConfigError, match=r"shared-coordinates is True with bgmd.*; allowed: False"
    ):
        validate({"shared-coordinates": "on", "compressor": "rand-k", "strategy": "bgmd"})


@pytest.mark.parametrize("name", ["top-k", "rand-k", "scaled-rand-k"])
@pytest.mark.parametrize("fraction", [0.3333333, 1 / 3, 0.1, 1e-7, 1.0])
def test_the_name_of_a_compressor_says_all(name: str, fraction: float) -> None:
    """Clients build theirs from the name that the server sends."""
    compressor = build_compressor(f"{name}:{fraction!r}")
    assert build_compressor(compressor.name) == compressor


def test_what_overflows_when_scaled_is_rejected() -> None:
    """A plain reply under shared coordinates is scaled by d / k after it has been read."""
    model = batch_norm_model()
    message = train_message(model)
    layout = ModelLayout(model)
    compressor = build_compressor("scaled-rand-k:0.2").for_round(3)
    lies = to_numpy(model)
    for spec in layout.directions:
        lies[spec.key] = np.full_like(lies[spec.key], -2e38)
    reply = honest_reply(message, random_update(model, 1))
    reply.content["arrays"] = to_record(lies)
    coordinates = compressor.coordinates(layout.num_directions)
    assert coordinates is not None
    found = screen(
        reply,
        layout,
        np.empty(len(coordinates), np.float32),
        np.empty(layout.num_buffers, BUFFER_DTYPE),
        compressor=compressor,
        coordinates=coordinates,
    )
    assert found.reason == Rejection.NON_FINITE
    assert "the update times 5" in found.detail


def test_an_update_that_is_not_finite_leaves_no_error_memory() -> None:
    """It costs the client one round, not all that follow."""

    def burst(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        first = context.node_config["partition-id"] == 1
        if first and message.content["config"]["server-round"] == 2:
            sent = to_numpy(sent_arrays(message))
            reply.content["arrays"] = to_record(
                {key: np.full_like(value, np.inf) for key, value in sent.items()}
            )
        return reply

    made = GMD(**options(compressor="top-k:0.5"))
    with np.errstate(all="ignore"):
        result = fit(made, [CompressionMod(), burst], 5)
    rounds = list(result.train_metrics_clientapp.values())
    assert [m["accepted"] for m in rounds] == [N, N - 1, N, N, N]


def test_hostile_clients_after_the_mod_lie_about_shared_coordinates_too() -> None:
    """Their plain updates are scaled by the server: what arrives is the lie, not d / k times it."""
    norms = []
    for mods in (
        [CompressionMod(error_feedback=False), ByzantineMod("bit-flip:3", fraction=0.4)],
        [ByzantineMod("bit-flip:3", fraction=0.4), CompressionMod(error_feedback=False)],
    ):
        made = Mean(**options(compressor="scaled-rand-k:0.5", shared_coordinates=True))
        result = fit(made, mods, 1)
        assert result.train_metrics_clientapp[1]["accepted"] == N
        norms.append(result.train_metrics_clientapp[1]["update-norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_replies_that_are_no_model_pass_the_mod() -> None:
    def other(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": ArrayRecord({"other": Array(np.zeros(3, np.float32))})})
        return Message(content, reply_to=message)

    message = train_message(batch_norm_model(), config={"compressor": "top-k:0.5"})
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {})
    reply = CompressionMod()(message, context, other)
    assert [*reply.content["arrays"]] == ["other"]


@pytest.mark.parametrize("clients", [5, 6])
def test_the_median_of_signs_is_the_majority_vote(clients: int) -> None:
    generator = torch.Generator().manual_seed(clients)
    updates = torch.randn(clients, 40, generator=generator)
    sign = build_compressor("sign")
    votes = torch.stack([sign.decode(sign.encode(update), 40) for update in updates])
    assert torch.equal(coordinate_median(votes).vector, updates.sign().sum(0).sign())


def test_a_packed_reply_says_what_it_has_lost() -> None:
    model = batch_norm_model()
    message = train_message(model, 1, {"server-round": 1}, "train")
    values = [value.ravel() for value in random_update(model, 0).values()]
    update = torch.from_numpy(np.concatenate(values)).double()
    [metrics] = packed(message, "top-k:0.5").content.metric_records.values()
    kept = update.square().sort(descending=True).values[: len(update) // 2]
    lost = 1 - float(kept.sum() / update.square().sum())
    assert metrics[COMPRESSION_ERROR] == pytest.approx(lost, rel=1e-4)
    # With the median of the replies among the round's metrics, not above what is guaranteed.
    rounds = fit(GMD(**options(compressor="top-k:0.5")), [CompressionMod()], rounds=3)
    found = [record[COMPRESSION_ERROR] for record in rounds.train_metrics_clientapp.values()]
    assert len(found) == 3
    assert all(0 < share <= 0.5 for share in found)


@pytest.mark.parametrize(("feedback", "theorem"), [(False, 2), (True, 3)])
def test_where_the_theorems_promise_nothing_is_said_once(
    feedback: bool, theorem: int, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = NormThreshold(
        **options(compressor="top-k:0.1", error_feedback=feedback, byzantine_fraction=0.3)
    )
    fit(strategy, [CompressionMod()], rounds=3)
    said = [text for text in caplog.messages if "of Ghosh et al. promises nothing" in text]
    assert len(said) == 1
    assert f"delta 0.11 is guaranteed: Theorem {theorem}" in said[0]
    caplog.clear()
    fit(NormThreshold(**options(byzantine_fraction=0.3)), [], rounds=1)
    assert "promises nothing" not in caplog.text


def test_what_low_rank_guarantees_depends_on_the_layers() -> None:
    layout = ModelLayout(ArrayRecord({"w": Array(np.zeros((8, 20), np.float32))}))
    assert NormThreshold(compressor="low-rank:1").settings.contraction(layout) == 1 / 8
    assert NormThreshold().settings.contraction(layout) == 1.0
