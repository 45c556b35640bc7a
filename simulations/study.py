"""What is run: rows against columns, each with several seeds.

A single run is a study of one cell. A study is declared in Python, on the command line or in a TOML
file: keys of the run configuration for all runs (``[config]``), rows and columns with keys of their
own, or lists of specs (``rows = ["gmd", "bgmd+nearest-neighbor"]`` are strategies,
``columns = ["none", "alie"]`` attacks). Tables of the papers are such files
(``simulations/papers/*.toml``), with what the paper printed.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from fl_bgmd.attacks import ATTACKS, base_name, build_attacks
from fl_bgmd.data import TRAINING_EXAMPLES
from fl_bgmd.options import OptionError

from .config import Config, ConfigError, Value, validate

PAPERS = Path(__file__).resolve().parent / "papers"
STUDIES = Path(__file__).resolve().parent / "studies"

Keys = Mapping[str, Value]

_CLEAN: Keys = {"attack": "none", "byzantine-fraction": 0.0}


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes
    ----------
    row, column : str
        Their names in the study.
    seed : int
        Seed of the run.
    config : dict
        The complete configuration.
    varies : tuple of str
        The keys that the study's rows and columns set.
    choice : dict
        What this variant of the row has for the keys that are chosen on validation data.
    """

    row: str
    column: str
    seed: int
    config: Config
    varies: tuple[str, ...] = ("strategy", "attack", "byzantine-fraction")
    choice: Keys = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Folder of the run within that of its study."""
        return cell_name(self.row, self.column, self.seed, self.choice)

    @property
    def group(self) -> str:
        """Column of the table: an attack's columns with other options are one."""
        attack = str(self.config["attack"])
        return base_name(attack) if self.column == attack else self.column


def cell_name(row: str, column: str, seed: int, choice: Keys) -> str:
    """Return the folder of a run within that of its study."""
    return "/".join([row, *told(choice), column, f"seed-{seed}"])


def told(choice: Keys) -> list[str]:
    """Return what a variant of a row is called: ``["learning-rate=0.1"]``, nothing without any."""
    return [",".join(f"{key}={value}" for key, value in choice.items())] if choice else []


@dataclass(frozen=True)
class Study:
    """Rows against columns.

    Attributes
    ----------
    rows, columns : mapping
        Names to run-configuration keys of their own; a row's prevail.
    config : mapping
        Keys of all runs.
    seeds : int
        Runs of each cell: ``config["seed"]`` and the next ones.
    name, title, source : str
        Of its file; what it is; where a paper has it.
    epochs : float, optional
        Length of all runs, in passes over the training set by all clients together; without it,
        ``num-server-rounds`` is.
    evaluations_per_epoch : float
        How often the model is evaluated on all test examples, where ``epochs`` is given.
    lr_period_epochs : float
        ``lr-period`` in epochs; 0: the configuration's own.
    curves : tuple of str
        Figures of the rounds to draw beside the accuracy.
    published : mapping
        Column to row to the paper's entry, as printed there.
    select : mapping
        Keys to values that are tried in every row: the table shows, of each row, the values with
        the best worst accuracy on the validation data (``validation-fraction``), over its columns.
    """

    rows: Mapping[str, Keys]
    columns: Mapping[str, Keys] = field(default_factory=lambda: {"none": _CLEAN})
    config: Keys = field(default_factory=dict)
    seeds: int = 1
    name: str = "study"
    title: str = ""
    source: str = ""
    epochs: float | None = None
    evaluations_per_epoch: float = 1
    lr_period_epochs: float = 0
    curves: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    select: Mapping[str, Sequence[Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what no single run would show."""
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; allowed: 1 or more")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ConfigError(f"epochs is {self.epochs:g}; allowed: above 0")
        for name in ("rows", "columns"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; allowed: one or more")
        for key, values in self.select.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ConfigError(f"select.{key} is {values!r}; allowed: a list of values")
        if self.select and not self.config.get("validation-fraction"):
            raise ConfigError(
                "validation-fraction is 0 with select; allowed: the share of the training examples "
                "to choose by, such as 0.1"
            )
        for column, entries in self.published.items():
            for row in entries:
                if column not in self.columns or row not in self.rows:
                    raise ConfigError(f"published {column!r}, {row!r} is not run")

    def changed(self, **changes: Any) -> Self:
        """Return the study with other values where they are not None.

        ``rows`` and ``columns`` may be lists of names, which choose some; ``config`` adds keys.
        Raises :class:`ConfigError` for a name that the study does not have.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        for name in ("rows", "columns"):
            if chosen := given.pop(name, None):
                given[name] = _chosen(name, getattr(self, name), chosen)
        given["config"] = {**self.config, **given.get("config", {})}
        if {"rows", "columns"} & given.keys():
            kept = {column: dict(entries) for column, entries in self.published.items()}
            rows, columns = given.get("rows", self.rows), given.get("columns", self.columns)
            given["published"] = {
                column: {row: text for row, text in entries.items() if row in rows}
                for column, entries in kept.items()
                if column in columns
            }
        return replace(self, **given)

    def cells(self) -> list[Cell]:
        """Return the runs, validated: all of the first seed come first.

        Raises :class:`ConfigError` for a run that cannot be configured.
        """
        first = int(self.config.get("seed", 0))
        own = [keys for names in (self.rows, self.columns) for keys in names.values()]
        varies = tuple(sorted({key for keys in own for key in keys} | self.select.keys()))
        choices = [
            dict(zip(self.select, values, strict=True)) for values in product(*self.select.values())
        ]
        cells = [
            Cell(row, column, seed, self._configure(row, column, seed, choice), varies, choice)
            for seed in range(first, first + self.seeds)
            for row in self.rows
            for choice in choices
            for column in self.columns
        ]
        if len(cells) > 1:
            for cell in cells:  # a run of its own needs a folder of its own
                if folder := cell.config["checkpoint-dir"]:
                    cell.config["checkpoint-dir"] = str(Path(folder) / cell.name)
        return cells

    def _configure(self, row: str, column: str, seed: int, choice: Keys) -> Config:
        keys: dict[str, Value] = {**self.config, **self.columns[column], **self.rows[row], **choice}
        keys["seed"] = seed
        if self.epochs is None:
            return validate(keys)
        if self.lr_period_epochs:
            keys["lr-period"] = 2  # any that is allowed, until the rounds are known
        per_epoch = rounds_per_epoch(validate(keys))
        keys["num-server-rounds"] = max(1, round(self.epochs * per_epoch))
        keys["evaluate-every"] = max(1, round(per_epoch / self.evaluations_per_epoch))
        if self.lr_period_epochs:
            keys["lr-period"] = max(2, round(self.lr_period_epochs * per_epoch))
        return validate(keys)


def rounds_per_epoch(config: Config) -> float:
    """Return how many rounds all clients together take for one pass over the training set."""
    per_round = int(config["num-clients"]) * int(config["batch-size"]) * int(config["local-steps"])
    if not per_round:
        raise ConfigError(
            f"local-steps is {config['local-steps']} with a length in epochs; allowed: 1 or more"
        )
    return TRAINING_EXAMPLES[config["dataset"]] / per_round


def _chosen(kind: str, known: Mapping[str, Keys], names: Iterable[str]) -> dict[str, Keys]:
    for name in names:
        if name not in known:
            raise ConfigError(f"{kind} is {name!r}; allowed: {', '.join(known)}")
    return {name: keys for name, keys in known.items() if name in set(names)}


# -------------------------------------------------------------------------- rows and columns


def strategy_rows(specs: Sequence[str]) -> dict[str, Keys]:
    """Return a row for each strategy. Raises :class:`ConfigError` for one that is there twice."""
    _refuse_twice("strategies", specs)
    return {spec: {"strategy": spec} for spec in specs}


def attack_columns(specs: Sequence[str], *, sweep: bool = False) -> dict[str, Keys]:
    """Return a column for each attack; ``none`` among others is without hostile clients.

    Parameters
    ----------
    specs : sequence of str
        Attacks; ``all`` stands for no attack and each one.
    sweep : bool
        Whether an attack that is named without options runs with each value of its sweep.

    Raises
    ------
    ConfigError
        For an attack that is none, or that is there twice.
    """
    named = [name for spec in specs for name in (("none", *ATTACKS) if spec == "all" else (spec,))]
    found = [text for spec in named for text in _variants(spec, sweep)]
    _refuse_twice("attack", found)
    if len(found) == 1:
        return {found[0]: {"attack": found[0]}}
    return {spec: _CLEAN if spec == "none" else {"attack": spec} for spec in found}


def split_attacks(text: str) -> list[str]:
    """Return the specs that are joined by commas."""
    # A comma within a spec stands before the next of its options.
    return re.split(r",(?![\w-]+=)", text)


def _variants(spec: str, sweep: bool) -> list[str]:
    """Return the specs that an attack runs with, in the form that names a column."""
    try:
        bounds = build_attacks(spec)
    except OptionError as error:
        raise ConfigError(str(error)) from None
    if sweep and len(bounds) == 1 and spec == bounds[0].name:
        return [str(bound) for bound in bounds[0].attack.swept(bounds[0].path)]
    return ["+".join(map(str, bounds)) or "none"]


def _refuse_twice(name: str, specs: Sequence[str]) -> None:
    if twice := [spec for spec in dict.fromkeys(specs) if specs.count(spec) > 1]:
        raise ConfigError(f"{name} holds {', '.join(twice)} twice; allowed: each once")


# ------------------------------------------------------------------------------------- files


def papers() -> list[str]:
    """Return the names of the papers' tables and figures that are study files."""
    return sorted(path.stem for path in PAPERS.glob("*.toml"))


def own_studies() -> list[str]:
    """Return the names of this project's own studies that are files."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def study_named(name: str) -> Study:
    """Read a table of the papers, or a study of this project's own."""
    return read_study((PAPERS if name in papers() else STUDIES) / f"{name}.toml")


def read_study(path: Path) -> Study:
    """Read a study's file.

    ``base`` in it names another file beside it, whose keys it has where it sets none; tables are
    merged.

    Raises :class:`ConfigError` for a file that is no TOML, and for a key that is unknown or
    missing.
    """
    table = _read_table(path)
    known = {f.name.replace("_", "-") for f in fields(Study)} - {"name"}
    for key in table:
        if key not in known:
            raise ConfigError(
                f"{path.name}: key {key!r} is unknown; allowed: {', '.join(sorted(known))}"
            )
    if "rows" not in table:
        raise ConfigError(f"{path.name}: key 'rows' is missing; allowed: strategies, or a table")
    given = {key.replace("-", "_"): value for key, value in table.items()}
    try:
        if isinstance(given["rows"], list):
            given["rows"] = strategy_rows(given["rows"])
        if isinstance(given.get("columns"), list):
            given["columns"] = attack_columns(given["columns"])
        given["curves"] = tuple(given.get("curves", ()))
        return Study(name=path.stem, **given)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def _read_table(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a file and the ones that it is based on say."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"study is {str(path)!r} ({error}); allowed: a TOML file with rows and columns"
        ) from None
    base = table.pop("base", None)
    if base is None:
        return table
    found = (path.parent / str(base)).resolve()
    if found in (*seen, path.resolve()):
        raise ConfigError(f"{path.name}: base is {base!r}; allowed: a file not based on this one")
    merged = _read_table(found, (*seen, path.resolve()))
    for key, value in table.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged
