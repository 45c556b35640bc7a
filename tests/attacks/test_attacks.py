"""Attacks: who is hostile when, what they send, and that the mod fits any ClientApp."""

import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    batch_norm_model,
    plain_model,
    regression_app,
    regression_model,
    reply_with,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
    train_message,
)
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import message_size_mod
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_bgmd.attacks import (
    SELECTIONS,
    AttackPlan,
    backdoor,
    bit_flip,
    byzantine_clients,
    gaussian,
)
from fl_bgmd.layout import ModelLayout
from fl_bgmd.mods import ByzantineMod
from fl_bgmd.replies import screen
from fl_bgmd.wire import ATTACK_RECORD
from simulations.config import validate
from simulations.grid import InProcessGrid

NODES = 10

# ---------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("clients", "fraction", "expected"),
    [
        (100, 0.29, 29),
        (100, 0.57, 57),
        (100, 0.58, 58),
        (10, 0.4, 4),
        (10, 0.39, 3),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (3, 0.33, 0),
        (3, 0.34, 1),
        (1, 0.99, 0),
        (1, 1.0, 1),
        (1000, 0.001, 1),
    ],
)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_exactly_the_floor_of_the_fraction_is_hostile(
    clients: int, fraction: float, expected: int, selection: str
) -> None:
    hostile = byzantine_clients(clients, fraction, 3, 0, selection)
    assert len(hostile) == expected
    assert hostile <= set(range(clients))


@settings(deadline=None)
@given(clients=st.integers(1, 400), hundredths=st.integers(0, 100), seed=st.integers(0, 2**32))
def test_the_count_is_that_of_exact_arithmetic(clients: int, hundredths: int, seed: int) -> None:
    expected = math.floor(Fraction(hundredths, 100) * clients)
    assert len(byzantine_clients(clients, hundredths / 100, 1, seed)) == expected


def test_ids_are_plain_integers() -> None:
    assert {type(client) for client in byzantine_clients(10, 0.5, 1, 0)} == {int}


def test_every_process_draws_the_same() -> None:
    call = "[sorted(byzantine_clients(50, 0.3, r, 7, s)) for r in (0, 1, 99) for s in SELECTIONS]"
    imports = "from fl_bgmd.attacks import SELECTIONS, byzantine_clients"
    here = eval(call, {"byzantine_clients": byzantine_clients, "SELECTIONS": SELECTIONS})
    there = subprocess.run(
        [sys.executable, "-c", f"import random; random.seed()\n{imports}\nprint({call})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
    )
    assert there.stdout.strip() == str(here)


def test_nothing_else_is_consumed_or_needed() -> None:
    """Neither numpy's nor torch's global generator takes part."""
    np.random.seed(1)
    torch.manual_seed(1)
    first = byzantine_clients(50, 0.3, 4, 7)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    np.random.seed(2)
    torch.manual_seed(2)
    assert byzantine_clients(50, 0.3, 4, 7) == first
    np.random.seed(1)
    torch.manual_seed(1)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


def test_fixed_means_the_same_in_every_round() -> None:
    drawn = {byzantine_clients(20, 0.4, server_round, 5, "fixed") for server_round in range(50)}
    assert len(drawn) == 1
    assert len({byzantine_clients(20, 0.4, 0, seed, "fixed") for seed in range(20)}) > 15


def test_per_round_means_another_set_in_each_round() -> None:
    drawn = [byzantine_clients(20, 0.4, server_round, 5) for server_round in range(50)]
    assert len(set(drawn)) > 45


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_each_client_is_hostile_its_share_of_the_rounds(fraction: float) -> None:
    rounds, clients = 2000, 20
    counts = np.zeros(clients)
    together = 0
    for server_round in range(1, rounds + 1):
        hostile = byzantine_clients(clients, fraction, server_round, 3)
        counts[list(hostile)] += 1
        together += {0, 1} <= hostile
    deviation = math.sqrt(rounds * fraction * (1 - fraction))
    assert np.abs(counts - rounds * fraction).max() < 5 * deviation
    # Without replacement: two given clients are hostile together f (f - 1) / (n (n - 1)).
    count = int(fraction * clients)
    share = count * (count - 1) / (clients * (clients - 1))
    assert abs(together - rounds * share) < 5 * math.sqrt(rounds * share * (1 - share)) + 1


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_client_is_hostile_under_its_share_of_the_seeds(selection: str) -> None:
    counts = np.zeros(10)
    for seed in range(1000):
        counts[list(byzantine_clients(10, 0.3, 1, seed, selection))] += 1
    assert np.abs(counts - 300).max() < 5 * math.sqrt(1000 * 0.21)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 0, 0), "num_clients is 0; allowed: 1 or more"),
        ((-3, 0.1, 0, 0), "num_clients is -3; allowed: 1 or more"),
        ((10, -0.1, 0, 0), "fraction is -0.1; allowed: 0 to 1"),
        ((10, 1.01, 0, 0), "fraction is 1.01; allowed: 0 to 1"),
        ((10, math.nan, 0, 0), "fraction is nan; allowed: 0 to 1"),
        ((10, 0.1, -1, 0), "round is -1 and seed is 0; allowed: 0 or more"),
        ((10, 0.1, 0, -1), "round is 0 and seed is -1; allowed: 0 or more"),
        ((10, 0.1, 0, 0, "often"), "selection is 'often'; allowed: per-round, fixed"),
    ],
)
def test_values_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        byzantine_clients(*arguments)


# -------------------------------------------------------------------------------- updates


def test_bit_flip_turns_and_inflates() -> None:
    update = torch.tensor([1.0, -2.0, 0.5])
    assert bit_flip(update).tolist() == [-100.0, 200.0, -50.0]
    assert bit_flip(update, 5.0).tolist() == [-5.0, 10.0, -2.5]
    assert update.tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [10.0, 100.0])
def test_gaussian_adds_noise_of_its_deviation(dtype: torch.dtype, std: float) -> None:
    d = 200_000
    update = torch.linspace(-1, 1, d, dtype=dtype)
    kept = update.clone()
    result = gaussian(update, std, torch.Generator().manual_seed(0))
    assert result.dtype == dtype
    assert torch.equal(update, kept)
    noise = (result - update).double() / std
    # Five standard errors of the mean, the variance and the kurtosis of d normal values.
    assert abs(float(noise.mean())) < 5 / math.sqrt(d)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / d)
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * math.sqrt(96 / d)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 / math.sqrt(d)


def test_a_backdoor_may_take_a_share_of_the_examples() -> None:
    labels = np.arange(10_000) % 10
    assert (backdoor(labels, 3) == 3).all()
    changed = backdoor(labels, 3, np.random.default_rng(0), share=0.4)
    hit = changed != labels
    assert (changed[hit] == 3).all()
    assert 0.34 < hit.mean() < 0.38  # 0.4, less those that were 3
    # In a run: all clients, of whose examples that share is corrupt.
    config = {"attack": "backdoor:8,share=0.4", "byzantine-fraction": 1.0}
    assert AttackPlan.from_config(validate(config)).roles(5, 1).keys() == set(range(5))


def test_gaussian_is_reproducible_from_its_generator() -> None:
    update = torch.zeros(100)
    first, second = (
        gaussian(update, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, gaussian(update, generator=torch.Generator().manual_seed(2)))


# ------------------------------------------------------------------------------------ mod


def deliver(
    app: ClientApp,
    model: ArrayRecord,
    *,
    server_round: int = 1,
    message_type: str = "train",
    run_config: dict[str, Any] | None = None,
) -> list[Message]:
    """Send a round to every client of an app; return the replies by partition."""
    grid = InProcessGrid(app, NODES, run_config or {})
    messages = [
        train_message(model, node, {"server-round": server_round}, message_type)
        for node in grid.get_node_ids()
    ]
    return list(grid.send_and_receive(messages))


def assert_lies(
    honest: list[Message], received: list[Message], model: ArrayRecord, hostile: set[int]
) -> None:
    """Exactly the hostile partitions reply with ``sent + 100 g``; the rest with the same bits."""
    assert len(honest) == len(received) == NODES
    sent = to_numpy(model)
    for partition, (true, reply) in enumerate(zip(honest, received, strict=True)):
        assert reply.metadata.src_node_id == partition + 1
        assert reply.content["metrics"] == true.content["metrics"]
        if partition not in hostile:
            assert same_bits(sent_arrays(reply), sent_arrays(true))
            continue
        trained, lie = to_numpy(sent_arrays(true)), to_numpy(sent_arrays(reply))
        for key, before in sent.items():
            expected = before - (-100.0 * (before - trained[key]))
            np.testing.assert_array_equal(lie[key], expected, err_msg=key)
            assert (lie[key].dtype, lie[key].shape) == (before.dtype, before.shape)


SETTINGS = {
    "attack": "bit-flip",
    "byzantine-fraction": 0.4,
    "byzantine-selection": "per-round",
    "seed": 6,
}


@pytest.mark.parametrize("server_round", [1, 2, 3])
def test_exactly_the_scheduled_clients_lie_by_the_run_config(server_round: int) -> None:
    honest = deliver(regression_app(), regression_model(), server_round=server_round)
    received = deliver(
        regression_app([ByzantineMod()]),
        regression_model(),
        server_round=server_round,
        run_config=SETTINGS,
    )
    hostile = byzantine_clients(NODES, 0.4, server_round, 6)
    assert_lies(honest, received, regression_model(), set(hostile))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_app_without_a_run_config_is_attacked_by_the_arguments(selection: str) -> None:
    mod = ByzantineMod(attack="bit-flip:100", fraction=0.3, selection=selection, seed=2)
    honest = deliver(regression_app(), regression_model(), server_round=5)
    received = deliver(regression_app([mod]), regression_model(), server_round=5)
    hostile = byzantine_clients(NODES, 0.3, 5, 2, selection)
    assert_lies(honest, received, regression_model(), set(hostile))


def test_arguments_come_before_the_run_config() -> None:
    mod = ByzantineMod(attack="bit-flip:100", fraction=0.1, selection="fixed", seed=1)
    config = {**SETTINGS, "attack": "bit-flip:3"}
    honest = deliver(regression_app(), regression_model())
    received = deliver(regression_app([mod]), regression_model(), run_config=config)
    hostile = byzantine_clients(NODES, 0.1, 1, 1, "fixed")
    assert_lies(honest, received, regression_model(), set(hostile))


def test_the_options_of_the_run_config_are_used() -> None:
    config = {**SETTINGS, "byzantine-fraction": 1.0, "attack": "bit-flip:2"}
    honest = deliver(regression_app(), regression_model())
    received = deliver(regression_app([ByzantineMod()]), regression_model(), run_config=config)
    for true, reply in zip(honest, received, strict=True):
        # The model starts at zero: the lie is sent + 2 (sent - trained) = -2 trained.
        trained, lie = to_numpy(sent_arrays(true)), to_numpy(sent_arrays(reply))
        np.testing.assert_array_equal(lie["weight"], -2 * trained["weight"])


@pytest.mark.parametrize(
    "config", [{}, {**SETTINGS, "attack": "none"}, {**SETTINGS, "byzantine-fraction": 0.0}]
)
def test_without_an_attack_the_mod_is_not_there(config: dict[str, Any]) -> None:
    honest = deliver(regression_app(), regression_model())
    received = deliver(regression_app([ByzantineMod()]), regression_model(), run_config=config)
    assert_lies(honest, received, regression_model(), set())


def test_evaluation_is_untouched() -> None:
    config = {**SETTINGS, "byzantine-fraction": 1.0}
    honest = deliver(regression_app(), regression_model(), message_type="evaluate")
    received = deliver(
        regression_app([ByzantineMod()]),
        regression_model(),
        message_type="evaluate",
        run_config=config,
    )
    for true, reply in zip(honest, received, strict=True):
        assert dict(reply.content) == dict(true.content)


def model_with_everything(app: ClientApp) -> None:
    """Register handlers that add 1 to every trained array, whatever the model."""

    def handle(message: Message, context: Context) -> Message:
        arrays = to_numpy(sent_arrays(message))
        for key, value in arrays.items():
            if value.dtype.kind == "f" and "running" not in key:
                arrays[key] = np.asarray(value + 1, dtype=value.dtype)
        arrays["bn.num_batches_tracked"] += 1
        return reply_with(message, arrays)

    app.train()(handle)
    app.train("special")(handle)
    app.query()(handle)


def test_buffers_shapes_and_dtypes_stay_as_they_are() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])
    model_with_everything(app)
    model = batch_norm_model()
    layout = ModelLayout(model)
    for reply in deliver(app, model):
        assert not reply.has_error()
        lie, sent = sent_arrays(reply), to_numpy(model)
        for key, array in lie.items():
            assert (array.dtype, array.shape) == (model[key].dtype, model[key].shape), key
        np.testing.assert_allclose(lie["weight"].numpy(), sent["weight"] - 100, rtol=1e-5)
        np.testing.assert_allclose(lie["scale"].numpy(), sent["scale"] - 100, rtol=1e-5)
        np.testing.assert_array_equal(lie["bn.running_mean"].numpy(), sent["bn.running_mean"])
        assert int(lie["bn.num_batches_tracked"].numpy()) == 8
        row, buffers = np.empty(layout.num_directions, np.float32), np.empty(layout.num_buffers)
        assert screen(reply, layout, row, buffers).reason is None


def test_named_train_actions_are_attacked_and_queries_are_not() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])
    model_with_everything(app)
    model = batch_norm_model()
    for message_type, moved in (("train", -100), ("train.special", -100), ("query", 1)):
        reply = deliver(app, model, message_type=message_type)[0]
        found = sent_arrays(reply)["weight"].numpy() - model["weight"].numpy()
        np.testing.assert_allclose(found, moved, rtol=1e-4)


def test_a_client_may_reply_in_another_order_of_keys() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {key: value + 1 for key, value in to_numpy(sent_arrays(message)).items()}
        return reply_with(message, dict(reversed(arrays.items())))

    model = plain_model()
    for reply in deliver(app, model):
        lie = to_numpy(sent_arrays(reply))
        for key, before in to_numpy(model).items():
            np.testing.assert_allclose(lie[key], before - 100, rtol=1e-4)


def test_a_client_may_reply_in_float64() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_numpy(sent_arrays(message))
        return reply_with(message, {key: value.astype(float) + 1 for key, value in arrays.items()})

    model = plain_model()
    for reply in deliver(app, model):
        for key, before in to_numpy(model).items():
            np.testing.assert_allclose(sent_arrays(reply)[key].numpy(), before - 100.0, rtol=1e-4)


def test_record_names_are_the_clients_own() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained = to_record({k: v + 1 for k, v in to_numpy(sent_arrays(message)).items()})
        records = {"my-model": trained, "stats": MetricRecord({"samples": 3})}
        return Message(RecordDict(records), reply_to=message)

    for reply in deliver(app, plain_model()):
        assert set(reply.content) == {"my-model", "stats", ATTACK_RECORD}
        assert reply.content[ATTACK_RECORD]["attack"] == "bit-flip"
        assert reply.content["stats"] == {"samples": 3}
        change = reply.content["my-model"]["bias"].numpy() - plain_model()["bias"].numpy()
        np.testing.assert_allclose(change, -100, rtol=1e-4)


def test_the_mod_works_among_others_and_on_one_handler() -> None:
    mod = ByzantineMod(attack="bit-flip:100", fraction=0.4, seed=6)
    honest = deliver(regression_app(), regression_model())
    hostile = set(byzantine_clients(NODES, 0.4, 1, 6))
    for mods in ([mod, message_size_mod], [message_size_mod, mod]):
        received = deliver(regression_app(mods), regression_model())
        assert_lies(honest, received, regression_model(), hostile)

    app, inner = ClientApp(), regression_app()

    @app.train(mods=[mod])
    def train(message: Message, context: Context) -> Message:
        return inner(message, context)

    assert_lies(honest, deliver(app, regression_model()), regression_model(), hostile)


def test_noise_differs_by_client_and_round_and_repeats_with_the_seed() -> None:
    def lies(server_round: int, seed: int = 0) -> list[bytes]:
        mod = ByzantineMod(attack="gaussian", fraction=1.0, seed=seed)
        replies = deliver(regression_app([mod]), regression_model(), server_round=server_round)
        return [sent_arrays(reply)["weight"].data for reply in replies]

    assert lies(1) == lies(1)
    assert len({*lies(1), *lies(2), *lies(1, seed=1)}) == 3 * NODES


def test_noise_on_the_grid_has_the_papers_deviation() -> None:
    model = to_record({"weight": np.zeros(20_000, np.float32)})
    app = ClientApp(mods=[ByzantineMod(attack="gaussian", fraction=1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply_with(message, sent_arrays(message))

    noise = [sent_arrays(reply)["weight"].numpy() for reply in deliver(app, model)]
    assert len({array.tobytes() for array in noise}) == NODES
    values = np.concatenate(noise)
    assert abs(values.std() / 10 - 1) < 5 / math.sqrt(2 * len(values))
    assert abs(values.mean()) < 5 * 10 / math.sqrt(len(values))


def test_an_unknown_attack_reaches_the_server_as_an_error() -> None:
    config = {"attack": "smile"}
    for reply in deliver(regression_app([ByzantineMod()]), regression_model(), run_config=config):
        assert reply.has_error()
        assert "attack is 'smile'; allowed: bit-flip" in reply.error.reason


@pytest.mark.parametrize("name", ["backdoor", "alie", "bit-flip+mimic", "my_lab:pull_back"])
def test_a_mod_refuses_attacks_that_it_would_not_play(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples/own")
    with pytest.raises(ValueError, match=r"allowed in a client mod: bit-flip, .*block-hijack$"):
        ByzantineMod(attack=name, fraction=0.4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attack": "bitflip"}, "attack is 'bitflip'; did you mean 'bit-flip'.*; allowed: bit-"),
        ({"fraction": 4.0}, "fraction is 4.0; allowed: 0 to 1"),
        ({"attack": "bit-flip:-1"}, "scale is '-1'; allowed: .*0 or more"),
        ({"strength": 100.0}, 'strength .100.0. is no longer .* attack = "bit-flip:5"'),
        ({"preset": "paper"}, "preset .'paper'. is no longer .* attack = \"bit-flip:5\""),
        ({"selection": "sometimes"}, "selection is 'sometimes'; allowed: per-round, fixed"),
        ({"seed": -1}, "seed is -1; allowed: 0 or more"),
    ],
)
def test_a_mod_refuses_impossible_settings(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByzantineMod(**{"attack": "bit-flip", "fraction": 0.4, **given})


def test_a_client_that_fails_is_left_alone() -> None:
    app = ClientApp(mods=[ByzantineMod(attack="bit-flip", fraction=1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ArithmeticError("on my own account")

    for reply in deliver(app, plain_model()):
        assert "on my own account" in reply.error.reason
