"""Experiments of the papers as files: what is run, and what the paper printed.

An experiment is a TOML file in ``simulations/experiments/``: run-configuration keys for all runs,
rows (strategies) and columns (what is done to them) with keys of their own, and the paper's
figures. Rounds follow from epochs: an epoch is one pass over the training set by all clients
together.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_bgmd.data import load

from .config import Config, ConfigError, Value, validate
from .laboratory import Cell

FOLDER = Path(__file__).resolve().parent / "experiments"

Keys = Mapping[str, Value]


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper.

    Attributes
    ----------
    name : str
        Of its file.
    title, source : str
        What it is, and where the paper has it.
    epochs, seeds : int
        Of the full protocol.
    evaluations_per_epoch : int
        How often the model is evaluated on all test examples.
    period_epochs : float
        ``lr-period`` in epochs; 0: the configuration's own.
    curves : tuple of str
        Per-round metrics to draw beside the accuracy.
    config : mapping
        Run-configuration keys of all runs.
    rows, columns : mapping
        Names to keys of their own; a column's go before a row's.
    published : mapping
        Column to row to the paper's entry, as printed there.
    """

    name: str
    title: str
    source: str
    epochs: float
    seeds: int
    evaluations_per_epoch: int
    period_epochs: float
    curves: tuple[str, ...]
    config: Keys
    rows: Mapping[str, Keys]
    columns: Mapping[str, Keys]
    published: Mapping[str, Mapping[str, str]]


def experiments() -> list[str]:
    """Return the names of all experiments that are files."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_experiment(name: str) -> Experiment:
    """Read an experiment's file.

    Raises :class:`ConfigError` for a key that is unknown or missing.
    """
    path = FOLDER / f"{name}.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    needed = {"title", "source", "epochs", "seeds", "config", "rows", "columns"}
    optional = {"evaluations-per-epoch", "lr-period-epochs", "curves", "published"}
    for key in sorted(table.keys() ^ needed):
        if key in needed or key not in optional:
            problem = "missing" if key in needed else "unknown"
            allowed = ", ".join(sorted(needed | optional))
            raise ConfigError(f"{path.name}: key {key!r} is {problem}; allowed: {allowed}")
    experiment = Experiment(
        name=path.stem,
        title=table["title"],
        source=table["source"],
        epochs=table["epochs"],
        seeds=table["seeds"],
        evaluations_per_epoch=table.get("evaluations-per-epoch", 1),
        period_epochs=table.get("lr-period-epochs", 0),
        curves=tuple(table.get("curves", ())),
        config=table["config"],
        rows=table["rows"],
        columns=table["columns"],
        published=table.get("published", {}),
    )
    for column, entries in experiment.published.items():
        for row in entries:
            if column not in experiment.columns or row not in experiment.rows:
                raise ConfigError(f"{path.name}: published {column!r}, {row!r} is not run")
    return experiment


def plan(
    experiment: Experiment, *, epochs: float, seeds: int, settings: Keys | None = None
) -> list[Cell]:
    """Return the experiment's runs, validated: all of the first seed come first.

    ``settings`` are keys over those of the experiment (``device``, ``precision``, ...).

    Raises :class:`ConfigError` for ``epochs`` or ``seeds`` out of range, or a run that cannot be
    configured.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; allowed: 1 or more")
    if not epochs > 0:
        raise ConfigError(f"epochs is {epochs:g}; allowed: above 0")
    return [
        Cell(row, column, seed, _configure(experiment, row, column, seed, epochs, settings))
        for seed in range(seeds)
        for row in experiment.rows
        for column in experiment.columns
    ]


def _configure(
    experiment: Experiment,
    row: str,
    column: str,
    seed: int,
    epochs: float,
    settings: Keys | None,
) -> Config:
    keys = {
        **experiment.config,
        **experiment.columns[column],
        **experiment.rows[row],
        **(settings or {}),
        "seed": seed,
    }
    if experiment.period_epochs:
        keys["lr-period"] = 2  # any that is allowed, until the rounds are known
    per_epoch = rounds_per_epoch(validate(keys))
    keys["num-server-rounds"] = max(1, round(epochs * per_epoch))
    keys["evaluate-every"] = max(1, round(per_epoch / experiment.evaluations_per_epoch))
    if experiment.period_epochs:
        keys["lr-period"] = max(2, round(experiment.period_epochs * per_epoch))
    return validate(keys)


def rounds_per_epoch(config: Config) -> float:
    """Return how many rounds all clients together take for one pass over the training set."""
    dataset = load(str(config["dataset"]), str(config["data-dir"]) or None)
    per_round = int(config["num-clients"]) * int(config["batch-size"]) * int(config["local-steps"])
    return len(dataset.train_labels) / per_round
