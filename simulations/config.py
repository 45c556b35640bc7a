"""The run configuration: which keys there are, what each may hold, and how they fit together.

Keys are declared here (:class:`RunSettings`) and with the strategies' options; the defaults of
``[tool.flwr.app.config]`` in ``pyproject.toml`` are written from them (``make config``). ``flwr
run`` and ``fl-bgmd`` share the keys and pass through :func:`validate` before anything starts.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt
from flwr.app import ArrayRecord
from pydantic import AfterValidator

from fl_bgmd.aggregators import MIXINGS, RECOMMENDED, RULES
from fl_bgmd.attacks import ATTACKS, AttackPlan, build_attacks
from fl_bgmd.attacks.plan import refuse_former
from fl_bgmd.attacks.roles import Selection
from fl_bgmd.data import DATASETS, SCHEMES, TRAINING_EXAMPLES, build_partition
from fl_bgmd.data.augmentation import Augmentation
from fl_bgmd.devices import resolve_device
from fl_bgmd.models import IMAGE_MODELS
from fl_bgmd.options import (
    Allowed,
    Count,
    Environment,
    NonNegative,
    Operation,
    Option,
    OptionError,
    Positive,
    declared,
    near,
)
from fl_bgmd.schedules import Schedule
from fl_bgmd.shares import FEWEST, floor_share
from fl_bgmd.strategies import OWN_OPTIONS, RobustStrategy

from .specs import RootUpdate, check_strategy, needs_root, strategy_of, takes_root

Value = bool | int | float | str
Config = dict[str, Any]


class ConfigError(ValueError):
    """A key or value of the run configuration that cannot be used."""


@dataclass(frozen=True)
class Folder:
    """In an annotation: a folder on this machine; ``~`` stands for home."""


def expand_home(folder: str) -> str:
    """Return a path whose ``~`` or ``~user`` at the beginning is that home folder.

    Raises ``ValueError`` for a user who is not there.
    """
    try:
        return str(Path(folder).expanduser()) if folder.startswith("~") else folder
    except RuntimeError as error:
        raise ValueError(f"no home folder is known for {folder!r}") from error


def _strategy(spec: str) -> str:
    check_strategy(spec)
    return spec


def _partition(spec: str) -> str:
    build_partition(spec)
    return spec


def _attack(text: str) -> str:
    build_attacks(text)
    return text


def _device(name: str) -> str:
    resolve_device(name)
    return name


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if text and not (host and colon and port.isdigit() and len(port) < 6 and "/" not in host):
        raise ValueError("it is no HOST:PORT")
    return text


def _some(folder: str) -> str:
    if not folder:
        raise ValueError("it is empty")
    return folder


_FOLDER = (AfterValidator(expand_home), Folder(), Allowed("a folder (~ stands for home), or empty"))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The keys of a run beside the strategies' options.

    Parameters
    ----------
    num_server_rounds : int
        Rounds of the run.
    num_clients : int
        Number of clients; see min-available-clients.
    local_steps : int
        Mini-batches that a client trains on in a round; 0: see local-epochs.
    local_epochs : int
        Passes over its data that a client trains for in a round, where local-steps is 0.
    batch_size : int
        Examples in a mini-batch.
    learning_rate : float
        Learning rate of the clients' SGD.
    momentum : float
        Momentum of the clients' SGD, within a round.
    weight_decay : float
        Weight decay of the clients' SGD.
    client_momentum : float
        Momentum of the updates that a client sends, across rounds; 0: none.
    client_momentum_of_lies : bool
        Whether the lies of hostile clients go through client-momentum, too.
    compress_lies : bool
        Whether the lies of hostile clients are compressed (Option I of Ghosh et al.).
    precision : str
        Precision of the clients' forward and backward passes.
    augmentation : str
        Random crops and mirror images in the clients' batches.
    lr_schedule : str
        Schedule of the clients' learning rate over the rounds.
    server_lr_schedule : str
        Schedule of the server's step over the rounds.
    lr_period : int
        Rounds in a cycle of cosine-restarts, or in a step of exponential.
    lr_decay : float
        Factor of each step of exponential.
    dataset : str
        Data set, always a real one.
    data_dir : str
        Folder of the data sets; empty: $FL_BGMD_DATA, or the cache.
    model : str
        Model to be trained.
    partition : str
        How the training examples are spread over the clients.
    validation_fraction : float
        Share of the training examples that no client gets: the server measures on them what a
        study may choose settings by.
    root_examples : int
        Training examples that the server has and no client, drawn at random; rules that ask for a
        root, as fltrust does, are given what it makes of them as a client would.
    strategy : str
        The server's rule and its mixings: rule:option=value+mixing+mixing.
    min_available_clients : int
        Connected clients that a round waits for; 0: num-clients.
    attack : str
        What hostile clients do.
    byzantine_fraction : float
        Hostile share of the clients.
    byzantine_selection : str
        Whether the hostile clients are redrawn in each round.
    seed : int
        Seed of everything.
    server_randomness : str
        Where the server's random numbers come from; clients can foresee seeded ones.
    device : str
        Device of clients and server.
    client_threads : int
        Torch threads of a client.
    evaluate_every : int
        Rounds between evaluations on all test examples.
    round_timeout : float
        Seconds to wait for replies.
    save_model : bool
        Whether the run's folder gets the final and the best model as safetensors.
    log_to : str
        Tracker for which the figures of each round are written, as files in the run's folder.
    checkpoint_dir : str
        Folder to save checkpoints to and resume from, one for each run.
    checkpoint_every : int
        Rounds between checkpoints.
    checkpoint_keep : int
        How many of the last checkpoints stay.
    ray_address : str
        Ray cluster that the clients of backend ray run on; empty: one of its own.
    results_dir : str
        Folder of the results.
    """

    num_server_rounds: Count = 25
    num_clients: Count = 10
    local_steps: Annotated[int, Ge(0)] = 10
    local_epochs: Annotated[int, Ge(0)] = 0
    batch_size: Count = 64
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: NonNegative = 0.0
    client_momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    client_momentum_of_lies: bool = False
    compress_lies: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    augmentation: Augmentation = "none"
    lr_schedule: Schedule = "constant"
    server_lr_schedule: Schedule = "constant"
    lr_period: Count = 1
    lr_decay: Annotated[Positive, Le(1)] = 0.99
    dataset: Literal[DATASETS] = "cifar10"  # type: ignore[valid-type]
    data_dir: Annotated[str, *_FOLDER, Operation(), Environment()] = ""
    model: Literal[IMAGE_MODELS] = "small-cnn"  # type: ignore[valid-type]
    partition: Annotated[
        str,
        AfterValidator(_partition),
        Allowed(f"one of {', '.join(SCHEMES)}, or package.module:NAME, with options: shards:80"),
    ] = "shards:80"
    strategy: Annotated[
        str,
        AfterValidator(_strategy),
        Allowed(
            f"one of {', '.join(RULES)}, or package.module:NAME, with options and mixings "
            f"({', '.join(MIXINGS)}) behind it: bgmd:block-fraction=0.3+nearest-neighbor"
        ),
    ] = RECOMMENDED
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    root_examples: Annotated[int, Ge(0)] = 0
    min_available_clients: Annotated[int, Ge(0), Operation()] = 0
    attack: Annotated[
        str,
        AfterValidator(_attack),
        Allowed(
            f"none, {', '.join(ATTACKS)}, or package.module:NAME, with options (bit-flip:5), or "
            "several joined by +"
        ),
    ] = "none"
    byzantine_fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    byzantine_selection: Selection = "per-round"
    seed: Annotated[int, Ge(0), Le(2**31), Allowed("a whole number, 0 to 2147483648")] = 0
    server_randomness: Literal["seeded", "secret"] = "seeded"
    device: Annotated[
        str,
        AfterValidator(_device),
        Environment(),
        Allowed("auto, cpu; cuda, cuda:N where there is such a GPU"),
    ] = "auto"
    # The client's machine is not this one; thousands of threads end a process without a word.
    client_threads: Annotated[Count, Le(256)] = 1
    evaluate_every: Count = 1
    round_timeout: Annotated[Positive, Operation()] = 3600.0
    save_model: Annotated[bool, Operation(), Environment()] = True
    log_to: Annotated[Literal["none", "tensorboard"], Operation(), Environment()] = "none"
    checkpoint_dir: Annotated[str, *_FOLDER, Operation(), Environment()] = ""
    checkpoint_every: Annotated[Count, Operation()] = 1
    checkpoint_keep: Annotated[Count, Operation()] = 3
    ray_address: Annotated[
        str,
        AfterValidator(_address),
        Operation(),
        Allowed("HOST:PORT of a running Ray cluster, or empty"),
    ] = ""
    results_dir: Annotated[
        str,
        AfterValidator(_some),
        *_FOLDER[:2],
        Operation(),
        Environment(),
        Allowed("a folder (~ stands for home)"),
    ] = "results"


_RENAMED = {"byzantine_fraction": "assumed-byzantine-fraction"}
"""Keys of strategy options that are not called like them: the attack has one of that name."""

_LEFT_OUT = ("mixing", "checkpoints", "seed", "device", "on_round", "root_update")
"""Strategy options that follow from other keys, or are functions."""

_APP_DEFAULTS = {"byzantine_fraction": 0.4, "model_average": 0.1}
"""Where the app differs from the strategies: its experiments are attacked, and measured at their
end."""

OLDER: Mapping[str, Any] = {"model-average": 0.0}
"""What runs had before there was a key whose default is another."""

_ANNOTATIONS: dict[str, Any] = {
    "server_learning_rate": Positive,
    "rows_dir": Annotated[str, *_FOLDER, Operation(), Environment()],
}
"""Strategy options that take less from a configuration: functions and paths are no text."""

STRATEGY_KEYS: dict[str, str] = {
    **{name: _RENAMED.get(name, o.key) for name, o in OWN_OPTIONS.items() if name not in _LEFT_OUT},
    "fraction_train": "fraction-train",
    "fraction_evaluate": "fraction-evaluate",
}
"""The keys of the strategies' options, by the options' names."""


def _settings() -> dict[str, Option]:
    found = {option.key: option for option in declared(RunSettings).values()}
    shares = {
        "fraction_train": Option("", "", Annotated[Positive, Le(1)], 1.0, _SAMPLED),
        "fraction_evaluate": Option(
            "", "", Annotated[NonNegative, Le(1), Operation()], 0.0, _ASKED
        ),
    }
    for name, key in STRATEGY_KEYS.items():
        option = shares.get(name) or OWN_OPTIONS[name]
        if name in _ANNOTATIONS:
            option = replace(option, annotation=_ANNOTATIONS[name])
        found[key] = replace(option, default=_APP_DEFAULTS.get(name, option.default))
    return {
        key: replace(option, name=key, annotation=_as_text(option)) for key, option in found.items()
    }


def _as_text(option: Option) -> Any:
    """Return an option's annotation, with Python's values in words as a configuration has them."""
    words = option.allowed.replace("True or False", "true, false").replace("None", "none")
    return Annotated[option.annotation, Allowed(words)]


_SAMPLED = "Share of the clients that train in a round"
_ASKED = "Share of the clients that evaluate in a round"

SETTINGS: dict[str, Option] = _settings()
"""Every key."""

_GONE: Mapping[str, str] = {
    "num-shards": "partition = 'shards:{}'",
    "alpha": "partition = 'dirichlet:{}'",
    "mixing": "strategy = 'bgmd+{}'",
    "bucket-size": "strategy = 'bgmd+bucketing:{}'",
    **{
        f"{rule}.{key}": f"strategy = '{rule}:{key}={{}}'"
        for rule, keys in {
            "gmd": ("solver",),
            "bgmd": ("solver", "block-fraction", "min-block-size", "selection", "score", "memory"),
            "norm-threshold": ("order", "norms"),
            "robust-filter": ("sigma0",),
            "multi-krum": ("num-selected",),
            "centered-clipping": ("radius",),
        }.items()
        for key in keys
    },
}
"""Keys of earlier versions, and the form that their values have now."""


def named(settings: Mapping[str, Any]) -> Config:
    """Return keyword arguments of Python as keys."""
    return {name.replace("_", "-"): value for name, value in settings.items()}


def defaults() -> Config:
    """Return the default of every key."""
    return {key: option.default for key, option in SETTINGS.items()}


def validate(given: Mapping[str, Any]) -> Config:
    """Return a complete configuration: ``given`` over the defaults.

    Raises
    ------
    ConfigError
        Naming the key, the value and what is allowed, for an unknown key, a wrong type, a value
        out of range, or values that do not fit together.
    """
    config = defaults()
    for key, value in given.items():
        _check_key(key, value)
        config[key] = _parsed(key, value)
    _check_combinations(config)
    return config


def parse(key: str, text: str) -> Any:
    """Turn a command-line string into a value of ``key``; :class:`ConfigError` if it is none."""
    _check_key(key, text)
    return _parsed(key, text)


def _parsed(key: str, value: Any) -> Any:
    try:
        return SETTINGS[key].parse(value)
    except OptionError as error:
        raise ConfigError(str(error)) from None


def _check_key(key: str, value: Any) -> None:
    try:
        refuse_former({key: value})
    except OptionError as error:
        raise ConfigError(str(error)) from None
    if key in _GONE:
        now = _GONE[key].format(value or "none").replace("+none", "")
        raise ConfigError(f"{key} ({value!r}) is no longer a key; use {now}")
    if key not in SETTINGS:
        hints = filter(None, (near(key, SETTINGS), f"allowed: {', '.join(SETTINGS)}"))
        raise ConfigError(f"unknown key {key!r} (value {value!r}); {'; '.join(hints)}")


def strategy_for(
    config: Config, root_update: RootUpdate | None = None, **options: Any
) -> RobustStrategy:
    """Build the strategy of a configuration; ``options`` are those that it does not hold.

    ``root_update`` is what the server makes of its ``root-examples``, for rules that ask for it;
    a strategy that is built without one cannot run with such a rule.

    Raises :class:`ConfigError` for options that do not fit together.
    """
    clients = config["min-available-clients"] or config["num-clients"]
    given = {name: config[key] for name, key in STRATEGY_KEYS.items()}
    given |= {
        # They must be there before a round samples any.
        "min_available_nodes": clients,
        "min_train_nodes": max(1, floor_share(config["fraction-train"], clients)),
        "min_evaluate_nodes": max(1, floor_share(config["fraction-evaluate"], clients)),
        "seed": None if config["server-randomness"] == "secret" else config["seed"],
        "device": config["device"],
    }
    if config["root-examples"] and takes_root(config["strategy"]):
        given["root_update"] = root_update or _no_root
    try:
        return strategy_of(config["strategy"], **(given | options))
    except ValueError as error:
        text = str(error)
        for name, key in STRATEGY_KEYS.items():
            text = re.sub(rf"\b{name}\b", key, text)
        raise ConfigError(text) from None


def _no_root(arrays: ArrayRecord, server_round: int) -> ArrayRecord:
    raise RuntimeError("a strategy was run that was only to be looked at")


def _check_combinations(config: Config) -> None:
    """Refuse values that are fine alone and not together."""
    clients, fraction = config["num-clients"], config["byzantine-fraction"]
    examples = TRAINING_EXAMPLES[config["dataset"]]
    if clients > examples:
        raise ConfigError(
            f"num-clients is {clients}; allowed: 1 to {examples}, the training examples of "
            f"{config['dataset']}"
        )
    withheld = int(config["validation-fraction"] * examples)
    root, most = config["root-examples"], max(0, examples - withheld - clients)
    least = 1 if needs_root(config["strategy"]) else 0
    if not least <= root <= most:
        why = f"which {config['strategy']!r} needs, " if least > root else ""
        raise ConfigError(
            f"root-examples is {root}; allowed: {least} to {most}, {why}training examples of "
            f"{config['dataset']} that are left with one for each client"
        )
    withheld += root
    try:
        build_partition(config["partition"]).check(examples - withheld, clients)
    except OptionError as error:
        raise ConfigError(f"partition is {config['partition']!r}: {error}") from None
    if bool(config["local-steps"]) == bool(config["local-epochs"]):
        raise ConfigError(
            f"local-steps is {config['local-steps']} and local-epochs is "
            f"{config['local-epochs']}; allowed: one of them 0, the other above 0"
        )
    if config["min-available-clients"] > clients:
        raise ConfigError(
            f"min-available-clients is {config['min-available-clients']}; allowed: 0 to "
            f"num-clients ({clients})"
        )
    hostile = floor_share(fraction, clients)
    if config["attack"] != "none" and hostile == 0:
        least = math.ceil(1e6 / clients) / 1e6
        raise ConfigError(
            f"attack is {config['attack']!r} with byzantine-fraction {fraction}: none of "
            f"{clients} clients is hostile; allowed: byzantine-fraction of {least:g} or more"
        )
    if config["attack"] == "none" and fraction > 0:
        raise ConfigError(
            f"byzantine-fraction is {fraction} with attack 'none'; allowed: 0, or an attack of "
            + ", ".join(ATTACKS)
        )
    _check_attack(config, hostile)
    asked = max(1, floor_share(config["fraction-train"], clients))
    least_replies = config["min-valid-replies"]
    if least_replies is not None and least_replies > asked:
        raise ConfigError(
            f"min-valid-replies is {least_replies}; allowed: none, or 1 to {asked}, the share "
            "fraction-train of num-clients"
        )
    strategy = strategy_for(config, fraction_evaluate=1.0)  # 0 makes Flower warn
    expects = strategy.robust and strategy.assumed_fraction > 0
    if expects and asked < FEWEST and least_replies is None:
        raise ConfigError(
            f"min-valid-replies is none with {asked} clients asked in a round, of whom nobody can "
            f"tell which one lies; allowed: {FEWEST} clients or more, where all can be trusted "
            f"assumed-byzantine-fraction 0, or min-valid-replies 1 to {asked}"
        )
    if strategy.rule.rule.uses("norms") and config["compressor"] == "none":
        raise ConfigError(
            f"compressor is 'none' with strategy {config['strategy']!r}; allowed: a compressor, "
            "since clients report norms with packed updates only"
        )
    if not config["compress-lies"] and config["client-momentum-of-lies"]:
        raise ConfigError(
            "compress-lies is False with client-momentum-of-lies True; allowed: True, since the "
            "momentum is within what is compressed"
        )
    restarts = "cosine-restarts" in (config["lr-schedule"], config["server-lr-schedule"])
    if restarts and config["lr-period"] < 2:
        raise ConfigError(
            f"lr-period is {config['lr-period']} with cosine-restarts; allowed: 2 or more"
        )


def beyond_guarantee(config: Config) -> list[str]:
    """Return what a validated configuration asks of its rule that nobody has proved it can do."""
    return list(strategy_for(config).rule.notes(config["num-clients"]).values())


def flower_defaults() -> str:
    """Return the ``[tool.flwr.app.config]`` table of ``pyproject.toml``, without its header."""
    lines = []
    for key, value in defaults().items():
        text = "none" if value is None else value
        lines.append(f"{json.dumps(key) if '.' in key else key} = {json.dumps(text)}")
    return "\n".join(lines)


def write_flower_defaults(pyproject: Path) -> None:
    """Rewrite that table in a ``pyproject.toml``, from its header to the next empty line."""
    table = re.compile(r"(?<=^\[tool\.flwr\.app\.config\]\n)(?:[^\n]+\n)*", re.M)
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(table.sub(lambda _: f"{flower_defaults()}\n", text), encoding="utf-8")


def _check_attack(config: Config, hostile: int) -> None:
    """Refuse attacks that could not be played as configured."""
    plan = AttackPlan.from_config(config)
    if len(plan.attacks) > max(1, hostile) or len(set(plan.attacks)) < len(plan.attacks):
        raise ConfigError(
            f"attack is {config['attack']!r} with {hostile} hostile clients; allowed: different "
            "attacks, at most one for each hostile client"
        )
    roles = list(plan.roles(int(config["num-clients"]), 1).values())
    for bound in plan.attacks:
        if (players := roles.count(bound)) < (least := bound.attack.players):
            raise ConfigError(
                f"attack is {config['attack']!r} with {bound} played by {players}; allowed: by "
                f"{least} hostile clients or more"
            )


if __name__ == "__main__":
    write_flower_defaults(Path("pyproject.toml"))
