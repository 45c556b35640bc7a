"""Worker momentum across rounds: what is sent, what is kept, and how it stands among the mods."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fl_bgmd.strategies.legacy import GMD
from flower_messages import (
    batch_norm_model,
    regression_app,
    regression_model,
    reply_with,
    same_bits,
    sent_arrays,
    to_numpy,
    train_message,
)
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from test_legacy import error_of, options, serve

from fl_bgmd.attacks import byzantine_clients
from fl_bgmd.compression import build_compressor
from fl_bgmd.layout import ModelLayout
from fl_bgmd.mods import ByzantineMod, CompressionMod, MomentumMod
from fl_bgmd.wire import Terms, TrainedReply
from simulations.backends import run
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid

N = 5

# ------------------------------------------------------------------------- by hand


def echo_app(mods: list[Any]) -> ClientApp:
    """Return an app whose update is (partition + 1) * round in every coordinate."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        step = (1.0 + int(context.node_config["partition-id"])) * Terms.of(message.content).round
        arrays = to_numpy(sent_arrays(message))
        return reply_with(message, {key: value - np.float32(step) for key, value in arrays.items()})

    return app


def updates(
    mods: list[Any], rounds: int, config: dict[str, Any] | None = None, key: str = "weight"
) -> list[list[float]]:
    """Return the first value of each client's update, by round."""
    grid = InProcessGrid(echo_app(mods), N, config or {})
    return [update_of(grid, number, key) for number in range(1, rounds + 1)]


def update_of(grid: InProcessGrid, number: int, key: str = "weight") -> list[float]:
    model = regression_model()
    messages = [
        train_message(model, node, {"server-round": number}) for node in grid.get_node_ids()
    ]
    return [
        float((model[key].numpy() - sent_arrays(reply)[key].numpy()).flat[0])
        for reply in grid.send_and_receive(messages)
    ]


def test_what_is_sent_is_the_running_mean_of_the_updates() -> None:
    """Beta 0.5, updates 1, 2, 3: m is 0.5, 1.25, 2.125."""
    for mods, config in (
        ([MomentumMod(0.5)], {}),
        ([MomentumMod()], {"client-momentum": 0.5}),
        ([MomentumMod(0.5)], {"client-momentum": 0.9}),
    ):
        found = updates(mods, 3, config)
        assert [row[0] for row in found] == pytest.approx([0.5, 1.25, 2.125])
        assert [row[3] for row in found] == pytest.approx([2.0, 5.0, 8.5])


@pytest.mark.parametrize(
    ("mod", "config"),
    [
        (MomentumMod(), {}),
        (MomentumMod(0.0), {"client-momentum": 0.9}),
        (MomentumMod(lies=True), {"client-momentum": 0.9}),
        (MomentumMod(lies=False), {"client-momentum": 0.9, "client-momentum-of-lies": True}),
    ],
)
def test_without_momentum_the_mod_is_not_there(mod: MomentumMod, config: dict[str, Any]) -> None:
    grid, plain = (InProcessGrid(regression_app(mods), 2, config) for mods in ([mod], []))
    for grids in zip(*[deliver(each) for each in (grid, plain)], strict=True):
        assert same_bits(sent_arrays(grids[0]), sent_arrays(grids[1]))
    assert all(not context.state for context in grid._contexts.values())


def deliver(grid: InProcessGrid, kind: str = "train", number: int = 1) -> list[Message]:
    model = regression_model()
    return list(
        grid.send_and_receive(
            [
                train_message(model, node, {"server-round": number}, kind)
                for node in grid.get_node_ids()
            ]
        )
    )


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0, float("nan")])
def test_a_beta_that_is_none_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta is {beta}; allowed: 0 to below 1"):
        MomentumMod(beta)
    [reply] = deliver(InProcessGrid(regression_app([MomentumMod()]), 1, {"client-momentum": beta}))
    assert f"client-momentum is {beta}; allowed: 0 to below 1" in reply.error.reason
    with pytest.raises(ConfigError, match=r"client-momentum is .*; allowed: .*0 to below 1"):
        validate({"client-momentum": beta})


# ---------------------------------------------------------------------- what stays as it is


def test_buffers_dtypes_and_other_messages_stay_as_they_are() -> None:
    app = ClientApp(mods=[MomentumMod(0.5)])

    def handle(message: Message, context: Context) -> Message:
        arrays = to_numpy(sent_arrays(message))
        for key, value in arrays.items():
            if value.dtype.kind == "f":
                arrays[key] = np.asarray(value + 1, dtype=value.dtype)
        arrays["bn.num_batches_tracked"] += 1
        return reply_with(message, arrays)

    app.train()(handle)
    app.evaluate()(handle)
    model = batch_norm_model()
    sent = to_numpy(model)
    for kind, moved in (("train", 0.5), ("evaluate", 1.0)):
        grid = InProcessGrid(app, 1, {})
        [reply] = grid.send_and_receive([train_message(model, 1, {"server-round": 1}, kind)])
        found = to_numpy(sent_arrays(reply))
        np.testing.assert_allclose(found["weight"] - sent["weight"], moved, rtol=1e-5)
        np.testing.assert_array_equal(found["bn.running_mean"], sent["bn.running_mean"] + 1)
        assert int(found["bn.num_batches_tracked"]) == 8
        assert all(found[key].dtype == value.dtype for key, value in sent.items())


def test_another_model_starts_anew_and_what_is_no_model_is_left_alone() -> None:
    grid = InProcessGrid(echo_app([MomentumMod(0.5)]), 1, {})
    [first] = update_of(grid, 2)
    assert first == pytest.approx(1.0)
    other = ArrayRecord({"weight": regression_model()["weight"]})
    [reply] = grid.send_and_receive([train_message(other, 1, {"server-round": 2})])
    moved = other["weight"].numpy() - sent_arrays(reply)["weight"].numpy()
    np.testing.assert_allclose(moved, 1.0, rtol=1e-5)  # half of 2, nothing of the round before

    app = ClientApp(mods=[MomentumMod(0.5)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply_with(message, {"else": np.ones(3, np.float32)})

    [reply] = deliver(InProcessGrid(app, 1, {}))
    assert sent_arrays(reply)["else"].numpy().tolist() == [1.0] * 3


def test_a_round_that_is_not_finite_costs_that_round_only() -> None:
    def burst(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if Terms.of(message.content).round == 2:
            arrays = to_numpy(sent_arrays(reply))
            return reply_with(message, {k: np.full_like(v, np.nan) for k, v in arrays.items()})
        return reply

    found = [row[0] for row in updates([MomentumMod(0.5), burst], 3)]
    assert found[::2] == pytest.approx([0.5, 0.5 * 0.5 + 0.5 * 3])
    assert np.isnan(found[1])


def test_a_client_that_fails_is_left_alone() -> None:
    app = ClientApp(mods=[MomentumMod(0.5)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ArithmeticError("on my own account")

    [reply] = deliver(InProcessGrid(app, 1, {}))
    assert "on my own account" in reply.error.reason


# ------------------------------------------------------------------------ among other mods

LYING = ByzantineMod(attack="bit-flip:10", fraction=0.4, selection="fixed", seed=1)
HOSTILE = byzantine_clients(N, 0.4, 1, 1, "fixed")


@pytest.mark.parametrize(
    ("mods", "config", "lies_move"),
    [
        ([LYING, MomentumMod(0.5)], {}, False),
        ([MomentumMod(0.5), LYING], {}, True),
        ([MomentumMod(lies=True), LYING, MomentumMod(lies=False)], {}, False),
        (
            [MomentumMod(lies=True), LYING, MomentumMod(lies=False)],
            {"client-momentum-of-lies": True},
            True,
        ),
    ],
)
def test_lies_go_through_momentum_or_not(
    mods: list[Any], config: dict[str, Any], lies_move: bool
) -> None:
    """bit-flip sends -10 times the update it sees, momentum included where that comes first."""
    found = updates(mods, 3, {"client-momentum": 0.5, **config})
    honest = [0.5, 1.25, 2.125]
    # Flipping and averaging commute; a lie of one size does not.
    for partition in range(N):
        sign = -10.0 if partition in HOSTILE else 1.0
        expected = [sign * (1 + partition) * m for m in honest]
        assert [row[partition] for row in found] == pytest.approx(expected)
    constant = ByzantineMod(attack="huge:4", fraction=0.4, selection="fixed", seed=1)
    swapped = [constant if mod is LYING else mod for mod in mods]
    found = updates(swapped, 3, {"client-momentum": 0.5, **config})
    expected = [-2.0, -3.0, -3.5] if lies_move else [-4.0] * 3
    for partition in HOSTILE:
        assert [row[partition] for row in found] == pytest.approx(expected)


@pytest.mark.parametrize("order", [lambda lie, m: [lie, m], lambda lie, m: [m, lie]])
def test_hostile_rounds_leave_the_momentum_of_honest_ones(order: Callable[..., list[Any]]) -> None:
    """Roles are redrawn: m of what a lie replaces continues, m of lies is another one."""
    lying = ByzantineMod(attack="huge:1000", fraction=0.4, seed=3)
    mods = order(lying, MomentumMod(0.5))
    found = updates(mods, 8)
    for partition in range(N):
        m = 0.0
        for number, row in enumerate(found, 1):
            hostile = partition in byzantine_clients(N, 0.4, number, 3)
            if not hostile or isinstance(mods[0], ByzantineMod):
                m = 0.5 * m + 0.5 * (1 + partition) * number
            if hostile:
                assert row[partition] < -400
            else:
                assert row[partition] == pytest.approx(m, rel=1e-5)


def test_error_feedback_is_of_what_momentum_sends() -> None:
    """After each round the sum of what was sent plus the error memory is the sum of the m."""
    asked = {"compressor": "top-k:0.2", "error-feedback": True}
    grid = InProcessGrid(regression_app([CompressionMod(), MomentumMod(0.5)]), 1, {})
    plain = InProcessGrid(regression_app(), 1, {})
    layout_of = regression_model()
    sent, true, m = np.zeros(9), np.zeros(9), np.zeros(9)
    for number in range(1, 6):
        terms = {"server-round": number, **asked}
        [reply] = grid.send_and_receive([train_message(layout_of, 1, terms)])
        sent += read(reply, asked["compressor"])
        [reply] = plain.send_and_receive([train_message(layout_of, 1, {"server-round": number})])
        m = 0.5 * m + 0.5 * read(reply, None)
        true += m
    [context] = grid._contexts.values()
    [error] = to_numpy(context.state["fl-bgmd.compression-error"]).values()  # type: ignore[arg-type]
    np.testing.assert_allclose(sent + error, true, rtol=1e-4, atol=1e-6)
    assert np.abs(error).max() > 0


def read(reply: Message, compressor: Any) -> Any:
    made = None if compressor is None else build_compressor(compressor)
    trained = TrainedReply.read(reply.content, ModelLayout(regression_model()), made)
    return trained.update.double().numpy()


def test_packed_updates_are_refused() -> None:
    mods = [MomentumMod(0.5), CompressionMod("top-k:0.5")]
    [reply] = deliver(InProcessGrid(regression_app(mods), 1, {}))
    assert re.search(r"allowed: MomentumMod behind CompressionMod in mods", reply.error.reason)


# -------------------------------------------------------------------------- whole runs

SMALL: dict[str, Any] = {
    **{"dataset": "mnist", "model": "tiny-cnn", "partition": "iid", "num-server-rounds": 4},
    **{"local-steps": 1, "batch-size": 16, "strategy": "gmd", "client-momentum": 0.9},
}


def test_a_run_that_stopped_resumes_with_what_its_clients_had(tmp_path: Path) -> None:
    whole = run(validate(SMALL), backend="inprocess")
    folder = {"checkpoint-dir": str(tmp_path), "evaluate-every": 4}
    lines: list[int] = []

    class Stopped(BaseException):
        pass

    def stop(number: int, accuracy: float | None) -> None:
        lines.append(number)
        if number == 3 and len(lines) < 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(validate(SMALL | folder), backend="inprocess", on_round=stop)
    resumed = run(validate(SMALL | folder), backend="inprocess")
    assert resumed.last("loss", None) == whole.last("loss", None)
    without = run(validate(SMALL | {"client-momentum": 0.0}), backend="inprocess")
    assert without.last("loss", None) != whole.last("loss", None)


def test_hostile_clients_play_with_it_or_without() -> None:
    lies = SMALL | {"attack": "sign-flip+label-shift+ipm", "byzantine-fraction": 0.4}
    results = [
        run(validate(lies | {"client-momentum-of-lies": moved}), backend="inprocess")
        for moved in (False, True)
    ]
    for result in results:
        assert result.status == "finished"
        assert result.played == {"sign-flip": 8, "label-shift": 4, "ipm": 4}


def test_it_works_in_apps_of_the_older_api() -> None:
    plain, moved = (
        serve(GMD(**options()), mods, rounds=25)[1] for mods in ([], [MomentumMod(0.5)])
    )
    assert error_of(plain) < 0.5
    assert error_of(moved) < 0.5
    assert error_of(moved) != error_of(plain)
