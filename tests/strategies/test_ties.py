"""Tied weights: one tensor under two keys counts once and stays one, whoever says otherwise."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import Arrays, honest_reply, to_numpy, to_record, train_message
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.layout import ModelLayout
from fl_bgmd.mods import CompressionMod
from fl_bgmd.strategies import (
    BGMD,
    CMD,
    GMD,
    CenteredClipping,
    Krum,
    Mean,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    Round,
)
from simulations.grid import InProcessGrid
from strategies.ties import Tied, equal_arrays, find_ties

NODES = 10
TOKENS, WIDTH = 12, 6
FIRST, COPY = "encoder.weight", "decoder.weight"

Edit = Callable[[int, int, dict[str, torch.Tensor]], None]


class LanguageModel(nn.Module):
    """Embedding, one layer, and a decoder whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(TOKENS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, TOKENS, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.hidden(self.encoder(tokens))))


class Stack(nn.Module):
    """Layers that start as copies of each other, as those of ``nn.TransformerEncoder`` do."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.encoder(tokens[:, None]))[:, 0])


def data(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and what follows them: a fixed permutation, a fifth of it noise."""
    draw = np.random.default_rng([7, partition])
    tokens = draw.integers(TOKENS, size=64)
    following = np.random.default_rng(1).permutation(TOKENS)[tokens]
    noisy = draw.random(64) < 0.2
    following[noisy] = draw.integers(TOKENS, size=noisy.sum())
    return torch.from_numpy(tokens), torch.from_numpy(following)


def app(
    build: Callable[[], nn.Module] = LanguageModel,
    edit: Edit = lambda number, partition, state: None,
    mods: list[Any] | None = None,
    steps: int = 3,
) -> ClientApp:
    """Return a client as anyone would write it; ``edit`` changes what single ones send."""
    made = ClientApp(mods=mods or [])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
        sent = message.content["arrays"]
        assert isinstance(sent, ArrayRecord)
        model = build()
        model.load_state_dict(sent.to_torch_state_dict(), strict=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tokens, following = data(partition)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), following).backward()
            optimizer.step()
        state = {key: value.clone() for key, value in model.state_dict().items() if key in sent}
        edit(number, partition, state)
        metrics = MetricRecord({"num-examples": len(tokens), "partition-id": partition})
        return Message(
            RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message
        )

    return made


def initial(build: Callable[[], nn.Module] = LanguageModel, *without: str) -> ArrayRecord:
    torch.manual_seed(3)
    state = build().state_dict()
    return ArrayRecord({key: value for key, value in state.items() if key not in without})


def run(
    strategy: RobustStrategy, client: ClientApp, arrays: ArrayRecord, rounds: int = 4
) -> dict[int, Arrays]:
    """Return the model after each round."""
    models: dict[int, Arrays] = {}

    def keep(number: int, found: ArrayRecord) -> None:
        models[number] = to_numpy(found)

    grid = InProcessGrid(client, NODES, {})
    strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=keep)  # type: ignore[arg-type]
    return models


def loss_of(arrays: Mapping[str, np.ndarray[Any, Any]], build: Any = LanguageModel) -> float:
    model = build()
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        parts = [data(partition) for partition in range(NODES)]
        return float(
            np.mean([nn.functional.cross_entropy(model(tokens), y).item() for tokens, y in parts])
        )


def same(first: Any, second: Any) -> bool:
    """Whether two arrays are equal to the bit."""
    return bool(first.tobytes() == second.tobytes())


OPTIONS: dict[str, tuple[type[RobustStrategy], dict[str, Any]]] = {
    "bgmd": (BGMD, {"block_fraction": 0.1}),
    "bgmd-paper": (BGMD, {"block_fraction": 0.3, "memory": "mean"}),
    "bgmd-per-client": (BGMD, {"block_fraction": 0.3, "memory": "per-client"}),
    "bgmd-momentum": (BGMD, {"server_momentum": 0.9, "server_nesterov": True}),
    "bgmd-mixing": (BGMD, {"mixing": "nearest-neighbor", "byzantine_fraction": 0.3}),
    "bgmd-bucketing": (BGMD, {"mixing": "bucketing"}),
    "gmd": (GMD, {}),
    "cmd": (CMD, {}),
    "mean": (Mean, {"weighting": "examples"}),
    "krum": (Krum, {}),
    "norm-threshold": (NormThreshold, {}),
    "robust-filter": (RobustFilter, {}),
    "centered-clipping": (CenteredClipping, {"radius": 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tied_weight_counts_once(name: str) -> None:
    """The run is to the bit that of the same model with the weight listed once."""
    cls, options = OPTIONS[name]
    options = {"seed": 1, "fraction_evaluate": 0.0} | options
    twice = run(cls(**options), app(), initial())
    once = run(cls(**options), app(), initial(LanguageModel, COPY))
    for number, model in twice.items():
        assert same(model[FIRST], model[COPY])
        assert all(same(model[key], value) for key, value in once[number].items())
    assert not same(twice[0][FIRST], twice[4][FIRST])


def test_the_rows_hold_it_once_and_bgmd_learns() -> None:
    widths = set()

    class Watched(BGMD):
        def aggregate(self, current: Round) -> Aggregate:
            widths.add(current.updates.shape[1])
            assert current.updates.is_contiguous()
            return super().aggregate(current)

    strategy = Watched(seed=1, fraction_evaluate=0.0)
    models = run(strategy, app(), initial(), rounds=30)
    assert widths == {TOKENS * WIDTH + WIDTH * WIDTH + WIDTH}
    assert strategy.state_dict()["ties"] == {COPY: FIRST}
    reference = run(GMD(fraction_evaluate=0.0), app(), initial(), rounds=30)
    assert loss_of(models[30]) < 1.1 * loss_of(reference[30]) < 0.6 * loss_of(models[0])


def liars(count: int, key: str = COPY) -> Edit:
    def edit(number: int, partition: int, state: dict[str, torch.Tensor]) -> None:
        if partition < count:
            state[key] = state[key] - 100.0 * torch.randn_like(state[key])

    return edit


def test_a_minority_cannot_break_a_tie() -> None:
    """What it sends under the second key is not looked at."""
    options: dict[str, Any] = {"seed": 1, "fraction_evaluate": 0.0}
    attacked = run(BGMD(**options), app(edit=liars(4)), initial())
    calm = run(BGMD(**options), app(), initial())
    for number, model in attacked.items():
        assert all(same(model[key], value) for key, value in calm[number].items())


def test_a_minority_that_lies_under_the_first_key_moves_both_alike() -> None:
    options: dict[str, Any] = {"seed": 1, "fraction_evaluate": 0.0}
    models = run(BGMD(**options), app(edit=liars(3, FIRST)), initial(), rounds=20)
    assert all(same(model[FIRST], model[COPY]) for model in models.values())
    assert loss_of(models[20]) < loss_of(models[0])


def test_layers_that_start_as_copies_are_not_tied() -> None:
    """Not even where a minority brings them back equal."""

    def edit(number: int, partition: int, state: dict[str, torch.Tensor]) -> None:
        if partition < 4:
            for key in state:
                if ".layers.1." in key:
                    state[key] = state[key.replace(".layers.1.", ".layers.0.")]

    arrays = initial(Stack)
    layout = ModelLayout(arrays)
    assert len(equal_arrays(layout.directions, layout.values)) > 4
    strategy = BGMD(seed=1, fraction_evaluate=0.0)
    models = run(strategy, app(Stack, edit), arrays, rounds=2)
    assert strategy.state_dict()["ties"] == {}
    for key, value in models[2].items():
        if ".layers.1." in key and "weight" in key:
            assert not same(value, models[2][key.replace(".layers.1.", ".layers.0.")])


def test_a_tie_that_most_clients_break_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """They have loaded two tensors after all: both are trained from then on, memory or not."""

    def edit(number: int, partition: int, state: dict[str, torch.Tensor]) -> None:
        if number > 2 and partition < 6:
            state[COPY] = state[COPY] + 0.1 * (1 + partition)

    caplog.set_level(logging.INFO, logger="flwr.fl_bgmd")
    for cls in (BGMD, CenteredClipping):
        caplog.clear()
        strategy = cls(seed=1, fraction_evaluate=0.0, server_momentum=0.5)
        models = run(strategy, app(edit=edit), initial(), rounds=5)
        assert same(models[2][FIRST], models[2][COPY])
        assert not same(models[5][FIRST], models[5][COPY])
        assert strategy.state_dict()["ties"] == {}
        assert caplog.text.count(f"'{FIRST}' and '{COPY}' are one tensor") == 1
        assert caplog.text.count("are no longer tied") == 1
        assert "keeps the model" not in caplog.text


def test_a_resumed_run_continues_with_its_ties(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 1, "fraction_evaluate": 0.0}
    whole = run(BGMD(**options), app(), initial(), rounds=5)
    run(BGMD(checkpoints=tmp_path, **options), app(), initial(), rounds=2)
    second = BGMD(checkpoints=tmp_path, **options)
    resumed = run(second, app(), initial(), rounds=5)
    assert all(same(resumed[5][key], value) for key, value in whole[5].items())
    assert second.state_dict()["ties"] == {COPY: FIRST}


def test_equal_packed_replies_count_once() -> None:
    models = run(
        BGMD(seed=1, compressor="sign", server_learning_rate=0.01, fraction_evaluate=0.0),
        app(mods=[CompressionMod()]),
        initial(),
    )
    assert all(same(model[FIRST], model[COPY]) for model in models.values())


@pytest.mark.parametrize(
    "options",
    [
        {"compressor": "rand-k:0.3"},
        {"compressor": "rand-k:0.3", "shared_coordinates": True},
        {"downlink_compressor": "qsgd"},
    ],
)
def test_compression_that_hides_a_tie_is_named_once(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    strategy = GMD(seed=1, fraction_evaluate=0.0, **options)
    models = run(strategy, app(mods=[CompressionMod()]), initial())
    assert strategy.state_dict()["ties"] == {}
    assert all(np.isfinite(value).all() for value in models[4].values())
    assert caplog.text.count(f"'{FIRST}' and '{COPY}' go out equal") == 1


def test_buffers_of_a_shared_layer_stay_equal() -> None:
    arrays = to_record(
        {
            "weight": np.arange(4.0),
            "a.running_mean": np.zeros(3, np.float32),
            "b.running_mean": np.zeros(3, np.float32),
            "c.running_mean": np.zeros(3, np.float32),
        }
    )
    strategy = GMD(seed=1)
    strategy.open_round(1, arrays, ConfigRecord())
    replies = []
    for node in range(1, 11):
        message = train_message(arrays, node)
        draw = np.random.default_rng(node)
        update = {key: draw.normal(size=value.shape) for key, value in to_numpy(arrays).items()}
        if node > 4:
            update["b.running_mean"] = update["a.running_mean"]
        replies.append(honest_reply(message, update))
    found, _ = strategy.aggregate_train(1, replies)
    assert found is not None
    model = to_numpy(found)
    assert same(model["a.running_mean"], model["b.running_mean"])
    assert not same(model["a.running_mean"], model["c.running_mean"])


# ------------------------------------------------------------------------------- the parts


def judged(replies: Any, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the ties in replies of (n, 2, 3) to a model of two equal arrays of 3."""
    rows = np.asarray(replies, dtype=np.float32).reshape(len(replies), -1)
    layout = ModelLayout(to_record({k: np.zeros(3, np.float32) for k in "ab"}))
    return find_ties(layout.directions, layout.values, rows, known or {})


ALIKE, APART, STILL = [[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 2, 4]], [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("case", "replies", "made", "kept"),
    [
        ("more than half alike", [ALIKE] * 3 + [APART] * 2, True, True),
        ("half alike", [ALIKE] * 2 + [APART] * 2, False, True),
        ("most apart", [ALIKE] * 2 + [APART] * 3, False, False),
        ("nobody has trained them", [STILL] * 5, False, True),
        ("few have", [STILL] * 3 + [ALIKE] * 2, False, True),
        ("few have, apart", [STILL] * 3 + [APART] * 2, False, True),
    ],
)
def test_who_decides(case: str, replies: Any, made: bool, kept: bool) -> None:
    tie = {"b": "a"}
    assert judged(replies) == (tie if made else {}), case
    assert judged(replies, tie) == (tie if kept else {}), case


def test_three_keys_and_a_copy_that_is_not_tied() -> None:
    layout = ModelLayout(to_record({k: np.ones(2, np.float32) for k in "abcd"}))
    rows = np.array([[1, i, 9, i, 1, i, 1, i] for i in range(5)], dtype=np.float32)
    ties = find_ties(layout.directions, layout.values, rows, {})
    assert ties == {"c": "a", "d": "a"}
    tied = Tied(layout.directions, ties)
    merged = tied.merge(torch.from_numpy(rows.copy()))
    assert merged.tolist() == rows[:, :4].tolist()
    assert tied.spread(merged[3]).tolist() == rows[3].tolist()
    values = np.arange(8.0)
    tied.level(values)
    assert values.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_merging_in_place_is_taking_the_columns(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, 5, size=6)
    layout = ModelLayout(
        to_record({str(i): np.zeros(size, np.float32) for i, size in enumerate([2, *sizes])})
    )
    copies = {str(i): "0" for i in range(1, 7) if sizes[i - 1] == 2 and draw.random() < 0.7}
    rows = torch.from_numpy(draw.normal(size=(5, layout.num_directions)).astype(np.float32))
    kept = [
        column
        for spec in layout.directions
        if spec.key not in copies
        for column in range(spec.offset, spec.offset + spec.size)
    ]
    expected = rows[:, kept].clone()
    assert torch.equal(Tied(layout.directions, copies).merge(rows), expected)


def test_arrays_are_equal_in_shape_dtype_and_value() -> None:
    ones = np.ones((2, 10), np.float32)
    late = ones.copy()
    late[-1, -1] = 2
    model = {"a": ones, "b": ones.T.copy(), "c": ones.astype(np.float64), "d": late, "e": ones}
    model |= {"f": np.zeros(0, np.float32), "g": np.zeros(0, np.float32)}
    layout = ModelLayout(to_record(model))
    [group] = equal_arrays(layout.directions, layout.values)
    assert [spec.key for spec in group] == ["a", "e"]
