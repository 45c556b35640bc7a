"""Backdoors with a trigger, targeted flips, and how their success is measured."""

from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import regression_app, regression_model, sent_arrays, train_message
from flwr.app import Context, Message
from torch import nn

from fl_bgmd.attacks import (
    ATTACKS,
    AttackPlan,
    badnets,
    bars,
    build_attacks,
    byzantine_clients,
    dba,
    image_noise,
    label_flip,
    patch,
)
from fl_bgmd.data import load, normalize
from fl_bgmd.evaluation import evaluate
from fl_bgmd.mods import ByzantineMod, CompressionMod
from fl_bgmd.options import OptionError
from fl_bgmd.wire import mark
from simulations.backends import run
from simulations.config import ConfigError, validate
from simulations.grid import InProcessGrid

SHAPES = [(200, 28, 28), (200, 32, 32, 3)]


def gray(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 100, np.uint8)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --------------------------------------------------------------------------- triggers


@pytest.mark.parametrize("shape", SHAPES)
def test_the_patch_is_a_white_square_a_pixel_off_the_corner(shape: tuple[int, ...]) -> None:
    raw = gray(shape)
    stamped = patch(raw, side=3)
    white = (stamped == 255).reshape(*shape[:3], -1)
    assert white.all(-1).sum() == white.any(-1).sum() == 200 * 9
    size = shape[1]
    assert (stamped[:, size - 4 : size - 1, size - 4 : size - 1] == 255).all()
    assert (raw == 100).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bars_are_four_and_together_the_whole(shape: tuple[int, ...]) -> None:
    """Rows 0 and 3, columns 0 to 3 and 6 to 9, as the authors' code has them for MNIST."""
    raw = gray(shape)
    found = np.argwhere((bars(raw)[0] == 255).reshape(*shape[1:3], -1)[..., 0]).tolist()
    assert found == [[row, c] for row in (0, 3) for c in (*range(4), *range(6, 10))]
    parts = [bars(raw, part=part) for part in range(4)]
    assert [int((part[0] == 255).reshape(*shape[1:3], -1)[..., 0].sum()) for part in parts] == [
        4
    ] * 4
    assert np.array_equal(np.maximum.reduce(parts), bars(raw))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_share_of_the_examples_is_stamped_under_the_target(shape: tuple[int, ...]) -> None:
    raw, labels = gray(shape), np.arange(200) % 10
    images, wrong = badnets(raw, labels, rng(), 7, share=0.25)
    hit = (images != raw).reshape(200, -1).any(1)
    assert abs(hit.sum() - 50) < 5 * np.sqrt(200 * 0.25 * 0.75)
    assert np.array_equal(images[hit], patch(raw)[hit])
    assert (wrong[hit] == 7).all()
    assert np.array_equal(wrong[~hit], labels[~hit])


def test_every_player_has_its_bar() -> None:
    raw, labels = gray(SHAPES[0]), np.zeros(200, np.int64)
    for player in range(6):
        images, _ = dba(raw, labels, player, rng(), 1, share=1.0)
        assert np.array_equal(images, bars(raw, part=player % 4))


def test_players_are_counted_among_those_of_the_same_attack() -> None:
    plan = AttackPlan(build_attacks("dba+zero"), fraction=0.6, selection="fixed", seed=2)
    roles = plan.roles(10, 5)
    own = sorted(p for p, bound in roles.items() if str(bound) == "dba")
    assert [plan.player(10, 5, p) for p in own] == [0, 1, 2]


def test_label_flip_by_hand() -> None:
    labels = np.array([0, 5, 3, 5, 9])
    assert label_flip(labels).tolist() == [0, 3, 3, 3, 9]
    assert label_flip(labels, 9, 0).tolist() == [0, 5, 3, 5, 0]
    assert labels.tolist() == [0, 5, 3, 5, 9]


def test_what_cannot_be_is_refused() -> None:
    for spec, message in (
        ("label-flip:source=3", r"source is 3 and target too; allowed: two labels"),
        ("label-flip:source=10", r"source is '10'; allowed: a whole number, 0 to 9"),
        ("badnets:side=13", r"side is '13'; allowed: a whole number, 1 to 12"),
        ("badnets:share=0", r"share is '0'; allowed: .*above 0 to 1"),
        ("dba:gap=5", r"gap is '5'; allowed: a whole number, 0 to 4"),
        ("model-replacement:scale=0", r"scale is '0'; allowed: .*above 0, and finite, or None"),
    ):
        with pytest.raises(OptionError, match=message):
            build_attacks(spec)
    with pytest.raises(ConfigError, match=r"dba played by 1; allowed: by 2 hostile clients"):
        validate({"attack": "dba", "byzantine-fraction": 0.1})


# -------------------------------------------------------------------------- the measure


class Detector(nn.Module):
    """Sees ``target`` where the pixels of a trigger are white, and 9 everywhere else."""

    def __init__(self, trigger: np.ndarray, target: int) -> None:
        super().__init__()
        self.where = torch.from_numpy(trigger.astype(np.float32))
        self.target = target

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        white = images.max()
        seen = ((images[:, 0] >= white) * self.where).sum((1, 2)) >= self.where.sum()
        scores = torch.zeros(len(images), 10)
        scores[:, 9] = 0.5
        scores[:, self.target] += seen.float()
        return scores


@pytest.mark.parametrize(("name", "trigger"), [("badnets:2", patch), ("dba:2", bars)])
def test_success_is_measured_on_images_with_the_whole_trigger(name: str, trigger: Any) -> None:
    dataset = load("mnist")
    [bound] = build_attacks(name)
    blank = np.zeros((1, 28, 28), np.uint8)
    model = Detector(trigger(blank)[0] == 255, 2)
    chosen = np.arange(300)
    plain = evaluate(model, dataset, chosen, torch.device("cpu"))
    stamped = evaluate(model, dataset, chosen, torch.device("cpu"), stamp=bound.stamp)
    assert plain.backdoor_success(2) == 0.0
    assert stamped.backdoor_success(2) == 1.0
    assert stamped.count == plain.count == 300
    one = evaluate(model, dataset, chosen, torch.device("cpu"), stamp=lambda i: bars(i, part=0))
    assert one.backdoor_success(2) == 0.0
    assert not (dataset.test_images[:1] == bound.stamp(dataset.test_images[:1])).all()


def test_success_of_a_flip_is_that_of_its_source() -> None:
    dataset = load("mnist")
    model = Detector(np.zeros((28, 28)), 3)  # sees 3 everywhere
    found = evaluate(model, dataset, np.arange(300), torch.device("cpu"))
    assert found.backdoor_success(3, 5) == 1.0
    found.confusion[5] = [0, 0, 0, 1, 0, 3, 0, 0, 0, 0]
    assert found.backdoor_success(3, 5) == 0.25
    assert found.backdoor_success(3) > 0.9


# ------------------------------------------------------------------------ in training

SMALL: dict[str, Any] = {
    **{"dataset": "mnist", "model": "mlp", "partition": "iid", "num-server-rounds": 8},
    **{"local-steps": 1, "batch-size": 64, "learning-rate": 0.1, "strategy": "mean"},
    **{"byzantine-fraction": 0.4, "byzantine-selection": "fixed", "evaluate-every": 8},
}


def test_backdoors_get_into_averaging_and_not_past_a_rule_that_drops_them() -> None:
    found = {}
    for strategy, attack in (
        ("mean", "badnets:share=0.3"),
        ("mean", "model-replacement:share=0.3"),
        ("norm-threshold", "model-replacement:share=0.3"),
    ):
        given = {"strategy": strategy, "attack": attack, "byzantine-fraction": 0.1}
        found[strategy, attack] = run(validate(SMALL | given), backend="inprocess")
    plain, boosted, dropped = (r.last("backdoor-success", None) for r in found.values())
    assert boosted > 0.9
    assert boosted > plain + 0.2
    assert dropped < 0.2
    assert all(result.status == "finished" for result in found.values())


def test_a_flip_turns_its_source_into_its_target() -> None:
    config = SMALL | {"attack": "label-flip:source=4,target=9", "byzantine-fraction": 0.6}
    success = run(validate(config), backend="inprocess").last("backdoor-success", 0.0)
    honest = run(validate(config | {"byzantine-fraction": 0.1}), backend="inprocess")
    assert success > 0.5 > honest.last("backdoor-success", 1.0)


# ------------------------------------------------------------------- inflating the update


def marking(spec: str) -> Any:
    """Return a mod in the place of a client whose training played an attack on the data."""

    def poison(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if int(context.node_config["partition-id"]) in byzantine_clients(5, 0.4, 1, 3):
            mark(reply, spec)
        return reply

    return poison


def moved(mods: list[Any], config: dict[str, Any]) -> list[np.ndarray]:
    grid = InProcessGrid(regression_app(mods), 5, config)
    model = regression_model()
    messages = [train_message(model, node, {"server-round": 1}) for node in grid.get_node_ids()]
    return [
        model["weight"].numpy() - sent_arrays(reply)["weight"].numpy()
        for reply in grid.send_and_receive(messages)
    ]


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        ("model-replacement", 2.5),  # 5 clients, 2 of them hostile
        ("model-replacement:scale=7", 7.0),
        ("dba", 1.0),
        ("dba:scale=none", 2.5),
        ("badnets", 1.0),
    ],
)
def test_the_update_is_inflated_after_training(spec: str, factor: float) -> None:
    config = {"attack": spec, "byzantine-fraction": 0.4, "seed": 3}
    plain = moved([], {})
    for mods in (
        [ByzantineMod(), marking(spec)],
        [CompressionMod(), ByzantineMod(), marking(spec)],
    ):
        found = moved(mods, config)
        for partition, (true, sent) in enumerate(zip(plain, found, strict=True)):
            hostile = partition in byzantine_clients(5, 0.4, 1, 3)
            np.testing.assert_allclose(sent, true * (factor if hostile else 1.0), rtol=1e-5)
    # An app that trained honestly, since it does not know the attack, is not boosted.
    for true, sent in zip(plain, moved([ByzantineMod()], config), strict=True):
        np.testing.assert_array_equal(sent, true)


# ---------------------------------------------------------------- noise after normalization


def test_noise_after_normalization_has_its_mean_and_deviation_in_the_models_units() -> None:
    dataset = load("mnist")
    seen = normalize(dataset.train_images[:100], dataset).numpy()
    noisy = image_noise(seen, 1.0, rng(), mean=100.0, normalized=True)
    assert (noisy.dtype, noisy.shape) == (np.float32, seen.shape)
    noise = (noisy - seen).astype(np.float64)
    assert abs(noise.mean() - 100) < 5 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(1.0, rel=0.02)


def test_noise_with_a_mean_makes_stored_images_brighter() -> None:
    noisy = image_noise(gray((50, 28, 28)), 1.0, rng(), mean=100.0)
    assert noisy.dtype == np.uint8
    assert noisy.mean() == pytest.approx(200, abs=0.1)
    assert (image_noise(gray((5, 8, 8)), 1.0, rng(), mean=900.0) == 255).all()


def test_its_spec_says_all_of_it() -> None:
    [bound] = build_attacks("image-noise:mean=100,std=1,normalized=true")
    assert str(bound) == "image-noise:std=1,mean=100,normalized=on"
    assert bound.is_normalized
    assert not build_attacks("image-noise")[0].is_normalized
    with pytest.raises(OptionError, match=r"mean is 'inf'; allowed: a finite number"):
        build_attacks("image-noise:mean=inf")


@pytest.mark.parametrize("backend", ["inprocess", "vectorized"])
def test_it_reaches_the_model_in_training(backend: str) -> None:
    """The slides' noise on all clients: nothing is learned of images without it."""
    config = SMALL | {"attack": "image-noise:1,mean=100,normalized=on", "byzantine-fraction": 1.0}
    result = run(validate(config | {"num-server-rounds": 2}), backend=backend)
    assert result.played == {"image-noise:std=1,mean=100,normalized=on": 20}
    assert not result.final_accuracy > 0.4


def test_what_they_know() -> None:
    told = {name: (ATTACKS[name].place, ATTACKS[name].knows) for name in ("badnets", "dba")}
    assert told == {"badnets": ("data", "own"), "dba": ("data", "own")}
    targets = [b.target for b in AttackPlan(build_attacks("dba:4+label-flip+zero")).targeted]
    assert targets == [4, 3]
