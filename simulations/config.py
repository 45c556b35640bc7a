"""The run configuration: which keys there are, what each may hold, and how they fit together.

The defaults are those of ``[tool.flwr.app.config]`` in ``pyproject.toml``; ``flwr run`` and
``python -m simulations`` share the keys and pass through :func:`validate` before anything starts.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clients.training import LR_SCHEDULES
from fl_bgmd.aggregators.block import MEMORY_RULES, SCORES
from fl_bgmd.aggregators.geometric_median import SOLVERS
from fl_bgmd.aggregators.sampling import SELECTIONS as BLOCK_SELECTIONS
from fl_bgmd.aggregators.spectral import PROVEN_FRACTION
from fl_bgmd.attacks import ATTACKS, PRESETS, AttackPlan, attack_names, is_attack
from fl_bgmd.attacks import SELECTIONS as BYZANTINE_SELECTIONS
from fl_bgmd.compression import COMPRESSORS, build_compressor, build_downlink, names_of
from fl_bgmd.data import DATASETS, SCHEMES, TRAINING_EXAMPLES
from fl_bgmd.models import MODELS
from fl_bgmd.plugins import is_path, load_object
from fl_bgmd.shares import FEWEST, floor_share, hostile_count, largest_bucket
from fl_bgmd.strategies import (
    MIXINGS,
    NORMS,
    TOO_FEW_NODES,
    WEIGHTINGS,
    RobustStrategy,
    resolve_device,
)

Value = bool | int | float | str
Config = dict[str, Value]

STRATEGIES = (
    "mean",
    "gmd",
    "bgmd",
    "cmd",
    "trimmed-mean",
    "norm-threshold",
    "robust-filter",
    "krum",
    "multi-krum",
    "centered-clipping",
)
ATTACK_NAMES = ("none", *ATTACKS)


class ConfigError(ValueError):
    """A key or value of the run configuration that cannot be used."""


@dataclass(frozen=True)
class Setting:
    """One key: its type, what it may hold, and what it means."""

    kind: type[int] | type[float] | type[str]
    allowed: str
    holds: Callable[[Value], bool]
    help: str
    is_folder: bool = False


def expand_home(folder: str) -> str:
    """Return a path whose ``~`` or ``~user`` at the beginning is that home folder.

    Raises ``ValueError`` for a user who is not there.
    """
    try:
        return str(Path(folder).expanduser()) if folder.startswith("~") else folder
    except RuntimeError as error:
        raise ValueError(f"no home folder is known for {folder!r}") from error


def own_strategy(name: str) -> type[RobustStrategy] | None:
    """Return the class that ``package.module:CLASS`` names, None for a name of another form.

    Raises ``ValueError`` for what cannot be imported or is no :class:`RobustStrategy`.
    """
    if not is_path(name):
        return None
    found = load_object(name)
    if not (isinstance(found, type) and issubclass(found, RobustStrategy)):
        raise ValueError(f"{name} is no subclass of RobustStrategy")
    return found


ON_OFF = ("on", "off")


def _number(
    kind: type[int] | type[float],
    help: str,
    low: float = 0,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Setting:
    """Build a numeric setting from low to high, each end excluded by ``above`` or ``below``."""
    allowed = f"{'above ' if above else ''}{low:g}"
    allowed += f" to {'below ' if below else ''}{high:g}" if high < math.inf else " or more"
    if above and high == math.inf:
        allowed = f"above {low:g}"

    def holds(value: Value) -> bool:
        if isinstance(value, int) and abs(value) > 2**63:
            return False
        number = float(value)
        inside = low <= number <= high and math.isfinite(number)
        return inside and not (above and number == low) and not (below and number == high)

    return Setting(kind, f"{'an integer, ' if kind is int else ''}{allowed}", holds, help)


def _choice(allowed: tuple[str, ...], help: str) -> Setting:
    return Setting(str, ", ".join(allowed), lambda value: value in allowed, help)


def _accepted_by(build: Callable[[str], object]) -> Callable[[Value], bool]:
    """Return the check that ``build`` makes something of a value and does not refuse it."""

    def holds(value: Value) -> bool:
        try:
            build(str(value))
        except ValueError:
            return False
        return True

    return holds


def _folder(help: str, *, empty: bool = True) -> Setting:
    allowed = "a folder (~ stands for home)" + (", or empty" if empty else "")
    is_path = _accepted_by(expand_home)
    return Setting(str, allowed, lambda v: is_path(v) and (empty or v != ""), help, is_folder=True)


SETTINGS: dict[str, Setting] = {
    "num-server-rounds": _number(int, "rounds of the run", 1),
    "num-clients": _number(int, "clients; see min-available-clients", 1),
    "fraction-train": _number(float, "share of clients that train in a round", 0, 1, above=True),
    "fraction-evaluate": _number(float, "share of the clients that evaluate in a round", 0, 1),
    "local-steps": _number(int, "mini-batches a client trains on in a round; 0: see local-epochs"),
    "local-epochs": _number(int, "passes over its data instead, when local-steps is 0"),
    "batch-size": _number(int, "examples in a mini-batch", 1),
    "learning-rate": _number(float, "of the clients' SGD", 0, above=True),
    "momentum": _number(float, "of the clients' SGD", 0, 1, below=True),
    "weight-decay": _number(float, "of the clients' SGD"),
    "lr-schedule": _choice(LR_SCHEDULES, "of the clients' learning rate over the rounds"),
    "server-lr-schedule": _choice(LR_SCHEDULES, "of the server's step over the rounds"),
    "lr-period": _number(int, "rounds of a cycle of cosine-restarts, of a step of exponential", 1),
    "lr-decay": _number(float, "factor of each step of exponential", 0, 1, above=True),
    "server-learning-rate": _number(float, "step of the server along the update", 0, above=True),
    "server-momentum": _number(float, "of the server", 0, 1, below=True),
    "server-nesterov": _choice(ON_OFF, "whether that momentum is Nesterov's"),
    "dataset": _choice(DATASETS, "real data"),
    "data-dir": _folder("where data sets are kept"),
    "model": _choice(MODELS, "what is trained"),
    "partition": _choice(SCHEMES, "how the training examples are spread over the clients"),
    "num-shards": _number(int, "of partition shards; a multiple of num-clients", 1),
    "alpha": _number(float, "of partition dirichlet", 0, 1e6, above=True),
    "strategy": Setting(
        str,
        f"{', '.join(STRATEGIES)}, or package.module:CLASS",
        lambda value: value in STRATEGIES or own_strategy(str(value)) is not None,
        "the server's rule",
    ),
    "mixing": _choice(MIXINGS, "pre-aggregation"),
    "bucket-size": _number(int, "of mixing bucketing", 1),
    "assumed-byzantine-fraction": _number(
        float, "hostile fraction the server prepares for", 0, 0.5, below=True
    ),
    "min-valid-replies": _number(
        int, "with fewer the round keeps the model; 0: 3, or 1 where nobody is expected to lie"
    ),
    "max-empty-rounds": _number(int, "so many of these in a row end the run", 1),
    "min-available-clients": _number(int, "connected clients a round waits for; 0: num-clients"),
    "weighting": _choice(WEIGHTINGS, "of the clients"),
    "compressor": Setting(
        str,
        f"{', '.join(COMPRESSORS)}, with :value or :option=value,...; package.module:CLASS",
        _accepted_by(build_compressor),
        "of the clients' updates",
    ),
    "error-feedback": _choice(ON_OFF, "whether clients keep what compression lost"),
    "downlink-compressor": Setting(
        str,
        f"none, {names_of(lambda kind: kind.carries_model)}, with :value or :option=value,...; "
        "package.module:CLASS",
        _accepted_by(build_downlink),
        "of the model on its way down",
    ),
    "gmd.solver": _choice(SOLVERS, "of the geometric median"),
    "bgmd.solver": _choice(SOLVERS, "of the geometric median of the block"),
    "bgmd.block-fraction": _number(float, "share of the coordinates in a block", 0, 1, above=True),
    "bgmd.min-block-size": _number(int, "coordinates that a block has at least", 1),
    "bgmd.selection": _choice(BLOCK_SELECTIONS, "how the block is chosen"),
    "bgmd.score": _choice(SCORES, "what a coordinate is worth"),
    "bgmd.memory": _choice(MEMORY_RULES, "what becomes of the rest"),
    "norm-threshold.order": _number(float, "of the norm", 1),
    "shared-coordinates": _choice(ON_OFF, "whether the server chooses those of rand-k"),
    "norm-threshold.norms": _choice(NORMS, "of the updates: Option II or I of the paper"),
    "robust-filter.sigma0": _number(float, "honest standard deviation; 0: estimated"),
    "multi-krum.num-selected": _number(int, "updates to average; 0: all but the hostile fraction"),
    "centered-clipping.radius": _number(float, "of the clipping; 0: the median distance"),
    "attack": Setting(
        str,
        f"{', '.join(ATTACK_NAMES)}, package.module:ATTACK, or several joined by +",
        lambda value: value == "none" or all(is_attack(n) for n in attack_names(str(value))),
        "what hostile clients do",
    ),
    "attack.scale": _number(float, "strength of the attack; 0: the preset's"),
    "attack.preset": _choice(PRESETS, "whose strengths"),
    "byzantine-fraction": _number(float, "hostile share of the clients", 0, 1),
    "byzantine-selection": _choice(BYZANTINE_SELECTIONS, "hostile clients: redrawn or the same"),
    "seed": _number(int, "of everything", 0, 2**31),
    "server-randomness": _choice(
        ("seeded", "secret"), "what the server draws (nodes, blocks, buckets); clients see the seed"
    ),
    "device": Setting(
        str,
        "auto, cpu; cuda, cuda:N where there is such a GPU",
        _accepted_by(resolve_device),
        "of clients and server",
    ),
    # The client's machine is not this one; thousands of threads end a process without a word.
    "client-threads": _number(int, "torch threads of a client", 1, 256),
    "evaluate-every": _number(int, "rounds between evaluations on all test examples", 1),
    "round-timeout": _number(float, "seconds to wait for replies", 0, above=True),
    "node-wait-timeout": _number(float, "seconds to wait for num-clients nodes", 0, above=True),
    "too-few-nodes": _choice(TOO_FEW_NODES, "what happens when they are not there by then"),
    "bench-after": _number(int, "bad rounds in a row after which a client sits out; 0: never"),
    "bench-rounds": _number(int, "for how many rounds", 1),
    "checkpoint-dir": _folder("to go on from; one a run"),
    "checkpoint-every": _number(int, "rounds between checkpoints", 1),
    "checkpoint-keep": _number(int, "how many of the last checkpoints stay", 1),
    "ray-address": Setting(
        str,
        "HOST:PORT of a running Ray cluster, or empty: a Ray of its own on this machine",
        lambda value: value == "" or bool(re.fullmatch(r"[^\s/]+:\d{1,5}", str(value))),
        "where the clients of backend ray run",
    ),
    "results-dir": _folder("where results are written", empty=False),
}


def defaults() -> Config:
    """Return the defaults of ``pyproject.toml``, checked against :data:`SETTINGS`."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))
    return _flatten(project["tool"]["flwr"]["app"]["config"])


def validate(given: Mapping[str, Value]) -> Config:
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
        config[key] = value
    for key, setting in SETTINGS.items():
        config[key] = _check(key, config[key], setting)
        if setting.is_folder:
            config[key] = expand_home(str(config[key]))
    _check_combinations(config)
    return config


def parse(key: str, text: str) -> Value:
    """Turn a command-line string into the type of ``key``; :class:`ConfigError` if it is not."""
    _check_key(key, text)
    kind = SETTINGS[key].kind
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{key} is {text!r}; allowed: {SETTINGS[key].allowed}") from None


def _check_key(key: str, value: Value) -> None:
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        allowed = ", ".join(SETTINGS)
        raise ConfigError(f"unknown key {key!r} (value {value!r}){hint}; allowed: {allowed}")


def _check(key: str, value: Value, setting: Setting) -> Value:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if setting.kind is float and is_number and setting.holds(value):
        value = float(value)
    why = ""
    try:
        if isinstance(value, setting.kind) and not isinstance(value, bool) and setting.holds(value):
            return value
    except ValueError as error:
        why = f" ({error})"
    raise ConfigError(f"{key} is {value!r}{why}; allowed: {setting.allowed}")


def _check_combinations(config: Config) -> None:
    """Refuse values that are fine alone and not together."""
    clients, fraction = int(config["num-clients"]), float(config["byzantine-fraction"])
    examples = TRAINING_EXAMPLES[str(config["dataset"])]
    for key in ("num-clients", *(("num-shards",) if config["partition"] == "shards" else ())):
        if int(config[key]) > examples:
            raise ConfigError(
                f"{key} is {config[key]}; allowed: 1 to {examples}, the training examples of "
                f"{config['dataset']}"
            )
    if bool(config["local-steps"]) == bool(config["local-epochs"]):
        raise ConfigError(
            f"local-steps is {config['local-steps']} and local-epochs is "
            f"{config['local-epochs']}; allowed: one of them 0, the other above 0"
        )
    if config["partition"] == "shards" and int(config["num-shards"]) % clients:
        raise ConfigError(
            f"num-shards is {config['num-shards']}; allowed: a multiple of num-clients ({clients})"
        )
    if int(config["min-available-clients"]) > clients:
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
    if config["server-nesterov"] == "on" and not config["server-momentum"]:
        raise ConfigError(
            "server-nesterov is 'on' with server-momentum 0; allowed: off, or a server-momentum "
            "above 0"
        )
    if config["shared-coordinates"] == "on":
        if not build_compressor(str(config["compressor"])).can_share_coordinates:
            raise ConfigError(
                f"shared-coordinates is 'on' with compressor {config['compressor']!r}; allowed: "
                + names_of(lambda kind: kind.can_share_coordinates)
            )
        remembers = config["strategy"] == "bgmd" and config["bgmd.memory"] != "none"
        if remembers or config["strategy"] == "centered-clipping":
            raise ConfigError(
                f"shared-coordinates is 'on' with strategy {config['strategy']!r}; allowed: "
                "strategies that remember no coordinates (bgmd with bgmd.memory none)"
            )
    memory = config["bgmd.memory"] if config["strategy"] == "bgmd" else ""
    if memory == "per-client" and config["mixing"] == "bucketing":
        raise ConfigError(
            "bgmd.memory is 'per-client' with mixing 'bucketing'; allowed with it: none, "
            "nearest-neighbor"
        )
    asked = max(1, floor_share(float(config["fraction-train"]), clients))
    if int(config["min-valid-replies"]) > asked:
        raise ConfigError(
            f"min-valid-replies is {config['min-valid-replies']}; allowed: 0 to {asked}, the share "
            "fraction-train of num-clients"
        )
    own = own_strategy(str(config["strategy"]))
    robust = own.robust if own else config["strategy"] != "mean"
    expects = robust and float(config["assumed-byzantine-fraction"]) > 0
    if expects and asked < FEWEST and not config["min-valid-replies"]:
        raise ConfigError(
            f"min-valid-replies is 0 with {asked} clients asked in a round, of whom nobody can "
            f"tell which one lies; allowed: {FEWEST} clients or more, where all can be trusted "
            f"assumed-byzantine-fraction 0, or min-valid-replies 1 to {asked}"
        )
    if config["strategy"] == "norm-threshold" and config["norm-threshold.norms"] == "reported":
        for key, allowed in (("norm-threshold.order", 2.0), ("mixing", "none")):
            if config[key] != allowed:
                raise ConfigError(
                    f"{key} is {config[key]!r} with norm-threshold.norms 'reported'; allowed: "
                    f"{allowed!r}, since clients report the Euclidean norms of their own updates"
                )
        if config["compressor"] == "none":
            raise ConfigError(
                "compressor is 'none' with norm-threshold.norms 'reported'; allowed: a compressor, "
                "since clients report norms with packed updates only"
            )
    weightable = own.weightable if own else config["strategy"] in ("mean", "gmd")
    if config["weighting"] != "uniform" and not weightable:
        raise ConfigError(
            f"weighting is {config['weighting']!r} with strategy {config['strategy']!r}; "
            "allowed: uniform (examples: mean, gmd)"
        )
    restarts = "cosine-restarts" in (config["lr-schedule"], config["server-lr-schedule"])
    if restarts and int(config["lr-period"]) < 2:
        raise ConfigError(
            f"lr-period is {config['lr-period']} with cosine-restarts; allowed: 2 or more"
        )
    if config["model"] == "linear":
        raise ConfigError(
            "model is 'linear'; allowed with images: "
            + ", ".join(name for name in MODELS if name != "linear")
        )


def beyond_guarantee(config: Config) -> list[str]:
    """Return what a validated configuration asks of its rule that nobody has proved it can do."""
    share, clients = float(config["assumed-byzantine-fraction"]), int(config["num-clients"])
    expected = f"assumed-byzantine-fraction is {share:g}"
    notes = []
    hostile, size = hostile_count(share, clients), int(config["bucket-size"])
    if config["strategy"] == "krum" and clients <= 2 * hostile + 2:
        notes.append(f"{expected} of {clients} clients; krum is proved for n > 2 f + 2")
    if config["strategy"] == "robust-filter" and share > PROVEN_FRACTION:
        notes.append(f"{expected}; robust-filter is proved for up to {PROVEN_FRACTION}")
    if config["mixing"] == "bucketing" and largest_bucket(size, hostile, clients) < size:
        notes.append(
            f"{expected} with bucket-size {size}: hostile buckets may be the majority, buckets of "
            f"{largest_bucket(size, hostile, clients)} are used"
        )
    return notes


def _check_attack(config: Config, hostile: int) -> None:
    """Refuse attacks that could not be played as configured."""
    attacks, scale = attack_names(str(config["attack"])), float(config["attack.scale"])
    if len(attacks) > max(1, hostile) or len(set(attacks)) < len(attacks):
        raise ConfigError(
            f"attack is {config['attack']!r} with {hostile} hostile clients; allowed: different "
            "attacks, at most one for each hostile client"
        )
    if scale and (len(attacks) > 1 or not all(ATTACKS[name].knob for name in attacks)):
        with_knob = ", ".join(name for name, attack in ATTACKS.items() if attack.knob)
        raise ConfigError(
            f"attack.scale is {scale:g} with attack {config['attack']!r}; allowed: 0, or one of "
            f"the attacks with a knob: {with_knob}"
        )
    for name, possible, allowed in (
        ("backdoor", scale.is_integer() and scale <= 9, "an integer, 1 to 9; 0: the preset's"),
        ("delayed", scale.is_integer(), "an integer, 1 or more; 0: the preset's"),
        ("impulse", scale <= 1, "up to 1; 0: the preset's"),
        ("fang", scale == 0 or scale >= 1, "1 or more; 0: searched"),
    ):
        if name in attacks and not possible:
            raise ConfigError(
                f"attack.scale is {scale:g} with attack {config['attack']!r}; allowed: {allowed}"
            )
    roles = AttackPlan.from_config(config).roles(int(config["num-clients"]), 1)
    players = list(roles.values()).count("alie")
    if "alie" in attacks and players < 2:
        raise ConfigError(
            f"attack is {config['attack']!r} with alie played by {players}; allowed: by 2 hostile "
            "clients or more, whose spread it takes"
        )


def _flatten(table: Mapping[str, object], prefix: str = "") -> Config:
    flat: Config = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            assert isinstance(value, bool | int | float | str)
            flat[prefix + key] = value
    return flat
