"""The benchmark of the worst case: its rules, its search, its file of cells, its tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from tables import cells_of
from torch import Tensor

from benchmarks import collusion, searched_run
from benchmarks.searched_run import (
    CLIENTS,
    HOSTILE,
    Cell,
    Deployed,
    Federation,
    Network,
    Outcome,
    dealt,
    make_rule,
    measure,
)
from fl_bgmd.aggregators import Aggregate, BlockMemory, block_geometric_median
from strategies.averaging import ModelAverage

PIXELS = 8
SHORT = Cell("bgmd", "none", steps=14, hidden=200)  # d = 3,810: above the least block


@pytest.fixture
def federation() -> Federation:
    """Ten classes that a line tells apart, in few dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(10, PIXELS, generator=generator)
    labels = torch.arange(700) % 10
    images = centers[labels] + torch.randn(700, PIXELS, generator=generator)
    return Federation(images, labels, images, labels, dealt(labels.numpy(), seed=0))


def rows(seed: int = 0) -> Tensor:
    return torch.randn(CLIENTS, 3000, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["bgmd", "gmd", "bgmd+nearest-neighbor"])
def test_a_preview_leaves_the_rule_as_it_was(name: str) -> None:
    tried, other = (make_rule(name, torch.Generator().manual_seed(5)) for _ in range(2))
    for number in range(4):
        before, drawn = tried.memory, tried.generator.get_state()
        kept = None if before is None else replace(before, vector=before.vector.clone())
        moved = tried.preview(rows(100 + number), 6)
        assert tried.memory is before
        assert torch.equal(tried.generator.get_state(), drawn)
        if before is not None and kept is not None:
            assert torch.equal(before.vector, kept.vector)
        assert moved.any()
        assert torch.equal(tried(rows(number)), other(rows(number)))


@pytest.mark.parametrize("name", ["bgmd", "gmd"])
def test_a_preview_is_what_the_rounds_would_have_been(name: str) -> None:
    tried, played = (make_rule(name, torch.Generator().manual_seed(5)) for _ in range(2))
    promised = tried.preview(rows(), 3)
    torch.testing.assert_close(promised, played(rows()) + played(rows()) + played(rows()))


def test_a_preview_puts_back_what_an_error_left() -> None:
    generator = torch.Generator().manual_seed(0)

    def breaks(updates: Tensor, memory: BlockMemory | None) -> Aggregate:
        if memory is not None:
            raise RuntimeError
        return block_geometric_median(updates, generator=generator)

    rule, drawn = Deployed(breaks, generator), generator.get_state()
    with pytest.raises(RuntimeError):
        rule.preview(rows(), 2)
    assert rule.memory is None
    assert torch.equal(generator.get_state(), drawn)


def test_every_example_has_one_client_and_a_third_is_alike() -> None:
    labels = torch.arange(10).repeat_interleave(420)
    parts = dealt(labels.numpy(), seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        counts = labels[part].bincount(minlength=10)
        assert counts.min() > 0
        assert counts.topk(2).values.sum() > len(part) / 2


def test_gradients_are_those_of_each_client(federation: Federation) -> None:
    network = Network(PIXELS, 16, seed=0)
    images, labels = federation.batch(torch.Generator().manual_seed(0))
    found = network.gradients(network.start, images, labels)
    assert found.shape == (CLIENTS, len(network.start))
    for client in (0, CLIENTS - 1):
        network.module.zero_grad()
        torch.nn.functional.cross_entropy(network.module(images[client]), labels[client]).backward()
        wanted = torch.cat([values.grad.flatten() for values in network.module.parameters()])
        torch.testing.assert_close(found[client], wanted)


@pytest.mark.parametrize("attack", collusion.ATTACKS)
@pytest.mark.parametrize("rule", collusion.RULES)
def test_every_cell_of_the_table_runs_and_again_alike(
    rule: str, attack: str, federation: Federation
) -> None:
    cell = replace(SHORT, rule=rule, attack=attack, momentum=0.9)
    outcome = measure(cell, federation)
    assert 0 <= outcome.accuracy <= 100
    # Searched in rounds 0 and 12.
    assert len(outcome.strengths) == (0 if attack == "none" else 2)
    assert replace(measure(cell, federation), seconds=outcome.seconds) == outcome


def test_the_average_is_over_the_last_tenth_of_the_models(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the strategies average: of the first rounds little is left."""
    cell, models = replace(SHORT, steps=30), []
    whole = Network.accuracy

    def watched(network: Network, vector: Tensor, *examples: Tensor) -> float:
        models.append(vector)
        return whole(network, vector, *examples)

    monkeypatch.setattr(Network, "accuracy", watched)
    measure(cell, federation)
    last, averaged = models
    models.clear()
    average = ModelAverage(0.1)
    for steps in range(1, cell.steps + 1):
        measure(replace(cell, steps=steps), federation)
        record = average.after(steps, ArrayRecord({"w": models[-2]}))
    torch.testing.assert_close(record.to_torch_state_dict()["w"], averaged, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(averaged, last, atol=1e-6, rtol=1e-4)


def test_the_search_finds_what_harms(federation: Federation) -> None:
    """Averaging follows the largest lie, and is lost; without a lie it learns."""
    cell = replace(SHORT, rule="mean", steps=60)
    attacked = measure(replace(cell, attack="ipm"), federation)
    assert set(attacked.strengths) == {20.0}
    assert attacked.accuracy < 30 < 90 < measure(cell, federation).accuracy


def test_the_lie_is_sent_by_the_hostile_only(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(searched_run, "lie", lambda attack, view: torch.ones_like(view.update))

    def watched(spec: str, generator: torch.Generator) -> Deployed:
        rule = make_rule(spec, generator)
        return Deployed(
            lambda sent, memory: (seen.append(sent), rule.rule(sent, memory))[1], generator
        )

    monkeypatch.setattr(searched_run, "make_rule", watched)
    measure(replace(SHORT, rule="mean", attack="ipm", steps=2), federation)
    assert len(seen) == 2
    for sent in seen:
        assert (sent == 1).all(1).tolist() == [client < HOSTILE for client in range(CLIENTS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "gmdd"}, r"rule is 'gmdd'; did you mean"),
        ({"rule": "gmd+nothing"}, r"mixing is 'nothing'; did you mean .*allowed"),
        ({"attack": "bit-flip"}, r"attack is 'bit-flip'; allowed: none, ipm"),
        ({"momentum": 1.0}, r"momentum is 1.0; allowed: 0 to below 1"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0; allowed: above 0"),
        ({"steps": 0}, r"steps is 0; allowed: 1 or more"),
        ({"hidden": 0}, r"hidden is 0; allowed: 1 or more"),
        ({"seed": -1}, r"seed is -1; allowed: 0 or more"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **change)


# -------------------------------------------------------------------- the file and the tables


def fill(path: Path, accuracies: dict[Cell, float]) -> None:
    for cell, accuracy in accuracies.items():
        collusion.write(path, cell, Outcome(accuracy, accuracy + 2.0, (1.0,), 0.1))


def test_finished_cells_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    measured: list[Cell] = []

    def stand_in(cell: Cell) -> Outcome:
        measured.append(cell)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return Outcome(50.0 + cell.seed, 60.0, (2.0,), 0.0)

    monkeypatch.setattr(collusion, "measure", stand_in)
    wanted = [replace(SHORT, seed=seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        collusion.run(wanted, path, jobs=1)
    assert list(collusion.read(path)) == wanted[:2]
    collusion.run(wanted, path, jobs=1)
    assert measured == [*wanted[:3], *wanted[2:]]
    assert collusion.read(path) == {cell: 50.0 + cell.seed for cell in wanted}
    collusion.run(wanted, path, jobs=1)
    assert len(measured) == 5


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    fill(path, {SHORT: 50.0})
    whole = path.read_text()
    for damaged in (whole[:-9], "{}", whole.replace("bgmd", "gone")):
        path.write_text(f"{whole}{damaged}\n")
        with pytest.raises(ValueError, match=r"cells.jsonl, line 2 is no finished cell"):
            collusion.read(path)


def test_tables_have_the_mean_the_scatter_and_the_worst_case_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.jsonl"
    fill(
        path,
        {
            replace(SHORT, rule=rule, attack=attack, momentum=momentum, seed=seed): accuracy
            for rule, attack, momentum, seed, accuracy in [
                ("gmd", "none", 0.0, 0, 94.0),
                ("gmd", "ipm", 0.0, 0, 41.0),
                ("gmd", "none", 0.0, 1, 96.0),
                ("gmd", "ipm", 0.0, 1, 44.0),
                ("bgmd", "ipm", 0.0, 0, 60.0),
                ("bgmd", "none", 0.9, 1, 90.0),
            ]
        },
    )
    collusion.main(["--table", "--output", str(path)])
    assert cells_of(capsys.readouterr().out) == [
        ["Worker momentum 0, learning rate 0.2, 14 steps, 200 hidden units, seeds 0, 1:"],
        [""],
        ["rule", "ipm", "none", "worst case"],
        ["bgmd", "60.0 (60.0 to 60.0, 1 of 2 seeds)", "-", "60.0 (ipm, incomplete)"],
        ["gmd", "42.5 (41.0 to 44.0)", "95.0 (94.0 to 96.0)", "42.5 (ipm)"],
        [""],
        ["Worker momentum 0.9, learning rate 0.2, 14 steps, 200 hidden units, seeds 1:"],
        [""],
        ["rule", "none", "worst case"],
        ["bgmd", "90.0", "90.0 (none)"],
    ]
    # Lines of before have no averages: those cells are measured again where they are wanted.
    older = json.loads(path.read_text().splitlines()[0])
    del older["averaged"]
    path.write_text("".join([json.dumps(older) + "\n", *path.open().readlines()[2:]]))
    collusion.main(["--table", "--averaged", "--output", str(path)])
    entries = ["46.0 (46.0 to 46.0, 1 of 2 seeds)", "98.0 (98.0 to 98.0, 1 of 2 seeds)"]
    rows = cells_of(capsys.readouterr().out)
    assert ["gmd", *entries, "46.0 (ipm, incomplete)"] in rows


def test_the_command_line_asks_for_all_combinations_and_names_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collusion, "measure", lambda cell: Outcome(50.0, 60.0, (), 0.0))
    path = tmp_path / "cells.jsonl"
    options = "--rules gmd bgmd+nearest-neighbor --attacks fang none --seeds 3 4 --momentum 0.5"
    more = ["--learning-rate", "0.1", "0.2", "--steps", "5", "--hidden", "7"]
    collusion.main([*options.split(), *more, "--output", str(path)])
    found = collusion.read(path)
    assert len(found) == 16
    assert Cell("bgmd+nearest-neighbor", "none", 0.5, 0.1, 5, 7, 4) in found
    assert json.loads(path.read_text().splitlines()[0])["attack"] == "fang"
    with pytest.raises(SystemExit):
        collusion.main(["--attacks", "fangs", "--output", str(path)])
    assert "attack is 'fangs'; allowed: none, ipm" in capsys.readouterr().err
