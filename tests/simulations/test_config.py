"""The run configuration: every key, every refusal, and the strategy that comes of it."""

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fl_bgmd.aggregators import RULES
from fl_bgmd.attacks import ATTACKS
from fl_bgmd.strategies import FedBGMD, RobustStrategy
from simulations.config import (
    SETTINGS,
    ConfigError,
    beyond_guarantee,
    defaults,
    flower_defaults,
    parse,
    validate,
    write_flower_defaults,
)
from simulations.experiment import build_strategy

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
NAN, INF = math.nan, math.inf

BAD: dict[str, list[Any]] = {
    "num-server-rounds": [0, -1, 2**63, 10**30],
    "num-clients": [0, -1],
    "fraction-train": [0.0, -0.1, 1.1, NAN, INF],
    "fraction-evaluate": [-0.1, 1.1, NAN, INF],
    "local-steps": [-1],
    "local-epochs": [-1],
    "batch-size": [0, -64],
    "learning-rate": [0.0, -0.1, NAN, INF],
    "momentum": [-0.1, 1.0, NAN],
    "weight-decay": [-0.1, NAN, INF],
    "precision": ["fp16", "", 32],
    "augmentation": ["flip", "", True],
    "lr-schedule": ["linear", "", "Constant"],
    "server-lr-schedule": ["linear", ""],
    "lr-period": [0, -1],
    "lr-decay": [0.0, 1.1, NAN],
    "server-learning-rate": [0.0, -1.0, NAN, INF],
    "server-optimizer": ["", "lamb", "adam:beta1=1", "adam:betas=0.9", "sgd:0.9", "math:floor"],
    "validation-fraction": [-0.1, 1.0, NAN],
    "root-examples": [-1, 1.5, "many"],
    "client-momentum": [-0.1, 1.0, NAN],
    "client-momentum-of-lies": ["maybe", "", 1, 0.0],
    "compress-lies": ["maybe", "", 1, 0.0],
    "projection-radius": [-1.0, "far", NAN, INF],
    "projection-center": ["start", "", 0],
    "model-average": [-0.1, 1.1, "last", NAN],
    "server-momentum": [-0.1, 1.0, NAN],
    "server-nesterov": ["maybe", "", 1, 0.0],
    "dataset": ["imagenet", "", "CIFAR10"],
    "data-dir": ["~nobody-of-this-name/data"],
    "model": ["vgg", ""],
    "partition": [
        *("random", "", "iid:3", "shards:", "shards:x", "shards:0", "shards:-80", "shards:80.0"),
        *("dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf", "dirichlet:1e7"),
        *("shards:alpha=1", "shards:81", "shards:100000", "nowhere:mine"),
    ],
    "strategy": [
        *("fedavg", "", "BGMD", "gmd+nnm", "gmd+", "gmd+bucketing:0", "gmd+bucketing:x"),
        *("gmd:solver=secant", "gmd:tol=0", "gmd:tol=inf", "bgmd:solver=secant", "bgmd:0"),
        *("bgmd:block-fraction=-0.1", "bgmd:block-fraction=1.1", "bgmd:block-fraction=nan"),
        *("bgmd:min-block-size=0", "bgmd:min-block-size=0.5", "bgmd:selection=first"),
        *("bgmd:score=variance", "bgmd:memory=median", "bgmd:memory=", "bgmd:blok-fraction=0.1"),
        *("norm-threshold:order=0.5", "norm-threshold:order=nan", "norm-threshold:norms=claimed"),
        *("robust-filter:sigma0=-1", "robust-filter:sigma0=nan", "robust-filter:sigma0=inf"),
        *("multi-krum:num-selected=-1", "multi-krum:num-selected=1.0", "krum:num-selected=1"),
        *("centered-clipping:radius=-1", "centered-clipping:radius=inf", "mean:3"),
        *("nowhere:Mine", "fl_bgmd.strategies:FedBGMD:block-fraction=2"),
        *("fl_bgmd.strategies:FedBGMD:seed=2", "fl_bgmd.strategies:GMD+nnm"),
    ],
    "assumed-byzantine-fraction": [-0.1, 0.5, 0.9, NAN, "", "automatic", "auto:", "auto:0.5"],
    "stale-updates": [-1, 0.5, 2**63],
    "stale-bytes": [0, -1, 1.5],
    "min-valid-replies": [0, -1, 1.5, 2**63],
    "max-empty-rounds": [0, -1],
    "min-available-clients": [-1],
    "weighting": ["size", ""],
    "compressor": ["zip", "", "top-k:0", "top-k:2", "qsgd:0", "none:1", "low-rank:x"],
    "error-feedback": ["maybe", "", 1, 0.0],
    "verdict-distances": ["maybe", "", 1, 0.0],
    "save-model": ["maybe", "", 1, 0.0],
    "log-to": ["tensorbord", "", "wandb"],
    "downlink-compressor": ["top-k:0.1", "qsgd:0", ""],
    "shared-coordinates": ["maybe", "", 1, 0.0],
    "attack": ["smile", "", "bit-flip:-1", "bit-flip:nan", "bit-flip:inf", "zero:1", "bit-flip:"],
    "byzantine-fraction": [-0.1, 1.1, NAN, INF],
    "byzantine-selection": ["often", ""],
    "seed": [-1, 2**31 + 1],
    "server-randomness": ["none", ""],
    "device": ["tpu", "", "meta", "cuda:99", "gpu"],
    "client-threads": [0, -1, 257, 100_000],
    "evaluate-every": [0, -1],
    "round-timeout": [0.0, -1.0, NAN, INF],
    "ray-address": ["auto", "10.0.0.1", "ray://10.0.0.1:10001"],
    "node-wait-timeout": [0.0, -1.0, NAN, INF],
    "too-few-nodes": ["wait", ""],
    "bench-after": [-1],
    "bench-rounds": [0, -1],
    "rows": ["disk", ""],
    "rows-dir": ["~nobody-of-this-name/rows"],
    "shards": ["dask", ""],
    "shards-address": ["auto", "10.0.0.1", "10.0.0.1:port"],
    "checkpoint-dir": ["~nobody-of-this-name/runs"],
    "checkpoint-every": [0, -1],
    "checkpoint-keep": [0, -1],
    "results-dir": ["", "~nobody-of-this-name/results"],
}


SPECS = {"server-optimizer", "attack", "compressor", "downlink-compressor", "partition", "strategy"}
"""Keys that hold things with options."""

OF_TYPE = {key: int if value is None else type(value) for key, value in defaults().items()}
"""What each key holds: min-valid-replies is none or a number."""


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        validate(given)
    return str(error.value)


# ------------------------------------------------------------------------------- defaults


def test_the_defaults_are_those_of_pyproject_and_complete() -> None:
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert table == tomllib.loads(flower_defaults())
    assert list(table) == list(SETTINGS)
    assert validate(table) == validate({}) == defaults()


def test_they_are_rewritten_in_their_place(tmp_path: Path) -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    for table in (f"{flower_defaults()}\n", "seed = 3\nold-key = 1\n", ""):
        copy = tmp_path / "pyproject.toml"
        copy.write_text(text.replace(f"{flower_defaults()}\n", table), encoding="utf-8")
        write_flower_defaults(copy)
        assert copy.read_text(encoding="utf-8") == text


def test_the_defaults_have_the_types_of_their_keys() -> None:
    for key, value in validate({}).items():
        assert value is None or type(value) is OF_TYPE[key], key


def test_every_key_is_kebab_case_and_explained() -> None:
    for key, setting in SETTINGS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)
        assert setting.help
        assert setting.allowed


def test_what_is_given_replaces_the_default_and_nothing_else() -> None:
    config = validate({"num-server-rounds": 3, "learning-rate": 1, "seed": 7})
    assert config == {**defaults(), "num-server-rounds": 3, "learning-rate": 1.0, "seed": 7}
    assert type(config["learning-rate"]) is float


def test_what_is_given_is_left_alone() -> None:
    given: dict[str, Any] = {"learning-rate": 1}
    validate(given)
    assert given == {"learning-rate": 1}
    assert type(given["learning-rate"]) is int


# --------------------------------------------------------------------------------- values


def test_every_key_has_its_bad_values() -> None:
    assert set(BAD) == set(SETTINGS)


@pytest.mark.parametrize(("key", "value"), [(key, bad) for key in BAD for bad in BAD[key]])
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key: str, value: Any) -> None:
    message = refusal({key: value})
    assert message.startswith(f"{key} is {value!r}")
    assert "allowed: " in message
    if key not in SPECS | {"device"}:  # there what is allowed of the part that is bad
        assert SETTINGS[key].allowed in message


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_type_is_refused(key: str) -> None:
    wrong: dict[type, list[Any]] = {
        int: [3.0, True, False, [3], {"a": 3}, b"3"],
        float: [True, False, [0.1], {}, 1j],
        bool: [1, 0, 1.0, [True]],
        str: [3, 0.1, True, ["bgmd"], {"name": "bgmd"}, b"bgmd"],
    }
    none = [] if defaults()[key] is None else [None]
    for value in wrong[OF_TYPE[key]] + none:
        message = refusal({key: value})
        assert message.startswith(f"{key} is {value!r}; allowed: ")


@pytest.mark.parametrize("key", [key for key in SETTINGS if OF_TYPE[key] in (int, float)])
def test_a_number_beyond_all_range_is_refused_like_any_other(key: str) -> None:
    for value in (10**400, -(10**400)):
        assert refusal({key: value}).startswith(f"{key} is {value!r}; allowed: ")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("fraction-train", [1e-9, 1.0, 1]),
        ("fraction-evaluate", [0.0, 1.0, 0]),
        ("momentum", [0.0, 0.999]),
        ("assumed-byzantine-fraction", [0.0, 0.49999]),
        ("min-valid-replies", [None, 1, 10]),
        ("server-nesterov", [False]),
        ("error-feedback", [False, True]),
        ("seed", [0, 2**31]),
        ("client-threads", [1, 256]),
        ("partition", ["iid", "shards", "shards:10", "shards:num-shards=50000"]),
        ("partition", ["dirichlet", "dirichlet:1e-9", "dirichlet:alpha=1e6"]),
        ("device", ["cpu", "auto"]),
        ("data-dir", ["", "/somewhere/else"]),
        ("checkpoint-dir", ["", "/somewhere/else"]),
        ("lr-schedule", ["constant", "cosine", "exponential"]),
        ("strategy", list(RULES)),
        ("strategy", ["bgmd:1e-9", "bgmd:block-fraction=1.0", "bgmd:block-fraction=1"]),
        ("strategy", ["norm-threshold:order=1", "norm-threshold:order=100.0"]),
    ],
)
def test_the_ends_of_a_range_are_allowed(key: str, values: list[Any]) -> None:
    for value in values:
        # Of the ten clients the least share asks one; some rules need examples of the server's.
        root = int(key == "strategy" and RULES[value.partition(":")[0]].needs_root)
        assert validate({"min-valid-replies": 1, "root-examples": root, key: value})[key] == value


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("num-client", "num-clients"),
        ("num_clients", "num-clients"),
        ("learning_rate", "learning-rate"),
        ("byzantine", "byzantine-fraction"),
    ],
)
def test_an_unknown_key_is_an_error_that_helps(key: str, hint: str) -> None:
    message = refusal({"seed": 1, key: 5})
    assert message.startswith(f"unknown key {key!r} (value 5); did you mean ")
    assert hint in message.partition(";")[2].partition("?")[0]
    assert message.endswith("allowed: " + ", ".join(SETTINGS))


def test_an_unknown_key_like_none_other_has_no_hint() -> None:
    message = refusal({"zzz": "y"})
    assert message.startswith("unknown key 'zzz' (value 'y'); allowed: num-server-rounds, ")


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [
        ("mixing", "nearest-neighbor", "strategy = 'bgmd+nearest-neighbor'"),
        ("mixing", "none", "strategy = 'bgmd'"),
        ("bucket-size", 3, "strategy = 'bgmd+bucketing:3'"),
        ("gmd.solver", "weiszfeld", "strategy = 'gmd:solver=weiszfeld'"),
        ("bgmd.block-fraction", 0.3, "strategy = 'bgmd:block-fraction=0.3'"),
        ("bgmd.memory", "mean", "strategy = 'bgmd:memory=mean'"),
        ("norm-threshold.order", 1.0, "strategy = 'norm-threshold:order=1.0'"),
        ("robust-filter.sigma0", 2.0, "strategy = 'robust-filter:sigma0=2.0'"),
        ("robust-filter.sigma0", 0.0, "strategy = 'robust-filter:sigma0=none'"),
        ("multi-krum.num-selected", 0, "strategy = 'multi-krum:num-selected=none'"),
        ("multi-krum.num-selected", 4, "strategy = 'multi-krum:num-selected=4'"),
        ("centered-clipping.radius", 0.5, "strategy = 'centered-clipping:radius=0.5'"),
        ("num-shards", 40, "partition = 'shards:40'"),
        ("alpha", 0.1, "partition = 'dirichlet:0.1'"),
    ],
)
def test_a_former_key_is_an_error_that_names_its_new_form(key: str, value: Any, now: str) -> None:
    assert refusal({key: value}) == f"{key} ({value!r}) is no longer a key; use {now}"
    with pytest.raises(ConfigError, match="is no longer a key"):
        parse(key, str(value))
    assert validate({now.split()[0]: now.split("'")[1]})


@pytest.mark.parametrize("key", ["attack.scale", "attack.preset"])
def test_former_keys_of_attacks_name_the_spec(key: str) -> None:
    assert 'attack = "bit-flip:5"' in refusal({key: "authors-code"})


# --------------------------------------------------------------------------- combinations


def test_either_steps_or_epochs() -> None:
    expected = "local-steps is {} and local-epochs is {}; allowed: one of them 0, the other above 0"
    for steps, epochs in ((6, 2), (0, 0)):
        given = {"local-steps": steps, "local-epochs": epochs}
        assert refusal(given) == expected.format(steps, epochs)
    assert validate({"local-steps": 0, "local-epochs": 2})["local-epochs"] == 2
    assert validate({"local-steps": 3, "local-epochs": 0})["local-steps"] == 3


def test_shards_are_a_multiple_of_the_clients() -> None:
    for shards, clients in ((81, 10), (80, 7), (80, 160)):
        given = {"num-clients": clients}
        assert refusal({**given, "partition": f"shards:{shards}"}) == (
            f"partition is 'shards:{shards}': num-shards is {shards}; allowed: a multiple of the "
            f"clients ({clients}), at most 50000, the examples"
        )
        assert validate({**given, "partition": "iid"})
        assert validate({**given, "partition": "dirichlet"})
    assert validate({"partition": "shards:84", "num-clients": 7})


@pytest.mark.parametrize(
    ("dataset", "examples"), [("cifar10", 50_000), ("mnist", 60_000), ("fashion-mnist", 60_000)]
)
@pytest.mark.parametrize("partition", ["shards:{}", "iid", "dirichlet"])
def test_there_is_an_example_for_each_client(dataset: str, examples: int, partition: str) -> None:
    given: dict[str, Any] = {"dataset": dataset, "partition": partition.format(examples)}
    for clients in (examples + 1, 10**9):
        assert refusal({**given, "num-clients": clients}) == (
            f"num-clients is {clients}; allowed: 1 to {examples}, the training examples of "
            f"{dataset}"
        )
    assert validate({**given, "num-clients": examples})


def test_there_is_an_example_in_each_shard() -> None:
    message = refusal({"dataset": "mnist", "partition": "shards:1000000000"})
    assert message.endswith("at most 60000, the examples")


@pytest.mark.parametrize("key", ["data-dir", "checkpoint-dir", "results-dir"])
def test_the_home_folder_is_meant_by_its_sign(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert validate({key: "~/x"})[key] == "/home/me/x"
    assert validate({key: "~"})[key] == "/home/me"
    assert validate({key: "x/~"})[key] == "x/~"


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_needs_hostile_clients(attack: str) -> None:
    for fraction in (0.0, 0.09):
        given = {"attack": attack, "byzantine-fraction": fraction, "num-clients": 10}
        message = refusal(given)
        assert message.startswith(f"attack is '{attack}' with byzantine-fraction {fraction}: ")
        assert message.endswith("allowed: byzantine-fraction of 0.1 or more")
    # alie takes the spread of the hostile clients' own updates, dba shares out its trigger.
    enough = ATTACKS[attack].players / 10
    assert validate({"attack": attack, "byzantine-fraction": enough, "num-clients": 10})


def test_alie_needs_two_hostile_clients() -> None:
    message = refusal({"attack": "alie", "byzantine-fraction": 0.1, "num-clients": 10})
    assert message.startswith("attack is 'alie' with alie played by 1; allowed: by 2 hostile")


def test_the_share_that_the_message_names_is_enough() -> None:
    given: dict[str, Any] = {"attack": "bit-flip", "partition": "iid", "min-valid-replies": 1}
    for clients in (1, 3, 7, 11, 49, 97, 1000):
        share = float(refusal({**given, "num-clients": clients}).split()[-3])
        assert validate({**given, "num-clients": clients, "byzantine-fraction": share})


def test_hostile_clients_need_an_attack() -> None:
    message = refusal({"byzantine-fraction": 0.4, "attack": "none"})
    assert message.startswith("byzantine-fraction is 0.4 with attack 'none'; allowed: 0, or ")
    assert message.endswith(", ".join(ATTACKS))


@pytest.mark.parametrize("strategy", RULES)
def test_weighting_needs_a_rule_that_weights(strategy: str) -> None:
    given = {"weighting": "examples", "strategy": strategy, "root-examples": 1, "partition": "iid"}
    if RULES[strategy].weightable:
        assert strategy in ("mean", "gmd")
        assert validate(given)["weighting"] == "examples"
    else:
        assert refusal(given) == f"weighting is 'examples' with {strategy}; allowed: uniform"


def test_an_error_of_the_strategy_names_the_keys_and_the_spec() -> None:
    given = {"compressor": "rand-k:0.5", "shared-coordinates": True}
    message = refusal({**given, "strategy": "bgmd:block-fraction=0.3+nearest-neighbor"})
    assert message.startswith(
        "shared-coordinates is True with bgmd:block-fraction=0.3+nearest-neighbor; allowed: False"
    )
    assert refusal({"server-nesterov": True}) == (
        "server-nesterov is True with server-momentum 0; allowed: False, or a server-momentum "
        "above 0"
    )


def test_linear_regression_takes_no_images() -> None:
    message = refusal({"model": "linear"})
    assert message.startswith("model is 'linear'; allowed: lenet, ")
    assert "linear" not in message.partition("allowed: ")[2]


def test_a_rule_that_needs_data_of_the_servers_is_refused_where_there_are_none() -> None:
    message = refusal({"strategy": "fltrust+clipping", "dataset": "mnist"})
    assert message == (
        "root-examples is 0; allowed: 1 to 59990, which 'fltrust+clipping' needs, training "
        "examples of mnist that are left with one for each client"
    )
    given = {"dataset": "mnist", "validation-fraction": 0.5, "partition": "iid"}
    assert refusal({**given, "root-examples": 29991}).startswith(
        "root-examples is 29991; allowed: 0 to 29990, training examples of mnist that are left"
    )
    for strategy in ("fltrust+clipping", "monna", "mean"):
        validate({**given, "strategy": strategy, "root-examples": 29990})


def test_per_client_memory_and_bucketing_are_refused_before_anything_starts() -> None:
    message = refusal({"strategy": "bgmd:memory=per-client+bucketing"})
    assert "per-client" in message
    assert "bucketing" in message
    assert validate({"strategy": "bgmd:memory=per-client+nearest-neighbor"})


# ---------------------------------------------------------------------------------- parse


@pytest.mark.parametrize("key", SETTINGS)
def test_parse_gives_back_what_is_printed(key: str) -> None:
    value = defaults()[key]
    text = "none" if value is None else str(value)
    assert parse(key, text) == value
    assert type(parse(key, text)) is type(value)


def test_texts_of_switches() -> None:
    for text, expected in (("true", True), ("on", True), ("false", False), ("off", False)):
        assert parse("error-feedback", text) is expected


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("num-clients", "ten"),
        ("num-clients", "10.0"),
        ("num-clients", ""),
        ("num-clients", "1e3"),
        ("seed", "0x10"),
        ("learning-rate", "fast"),
        ("learning-rate", ""),
        ("learning-rate", "0,1"),
    ],
)
def test_text_that_is_no_number_is_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(key, text)
    assert str(error.value).startswith(f"{key} is {text!r}; allowed: ")
    assert str(error.value).endswith(SETTINGS[key].allowed)


def test_parsed_values_are_checked() -> None:
    for key, text in (("learning-rate", "nan"), ("learning-rate", "-1"), ("strategy", "x")):
        with pytest.raises(ConfigError, match=f"^{key} is "):
            parse(key, text)
    assert parse("learning-rate", "1e-3") == 0.001


def test_an_unknown_key_cannot_be_parsed() -> None:
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        parse("learning_rate", "0.1")


# ------------------------------------------------------------------------------- strategy


@pytest.mark.parametrize("name", RULES)
def test_the_shared_settings_reach_the_strategy(name: str) -> None:
    strategy = build_strategy(
        validate(
            {
                "strategy": f"{name}+clipping:3",
                "root-examples": 1,
                "num-clients": 20,
                "partition": "iid",
                "fraction-train": 0.29,
                "fraction-evaluate": 0.5,
                "server-learning-rate": 0.5,
                "server-momentum": 0.25,
                "server-nesterov": True,
                "assumed-byzantine-fraction": 0.125,
                "min-valid-replies": 4,
                "seed": 9,
                "device": "cpu",
            }
        )
    )
    assert type(strategy) is RobustStrategy
    assert str(strategy.rule) == f"{name}+clipping:radius=3"
    expected = {
        "fraction_train": 0.29,
        "fraction_evaluate": 0.5,
        "min_available_nodes": 20,
        "min_train_nodes": 5,
        "min_evaluate_nodes": 10,
        "server_learning_rate": 0.5,
        "server_momentum": 0.25,
        "server_nesterov": True,
        "byzantine_fraction": 0.125,
        "min_valid_replies": 4,
        "weighting": "uniform",
        "seed": 9,
    }
    assert {key: getattr(strategy, key) for key in expected} == expected
    assert str(strategy.device) == "cpu"


@pytest.mark.parametrize(
    ("name", "given", "attributes"),
    [
        ("gmd:solver=weiszfeld,tol=0.5", {}, {"solver": "weiszfeld", "tol": 0.5}),
        (
            "bgmd:block-fraction=0.3,min-block-size=7,selection=top-k,score=norm,memory=mean,"
            "solver=weiszfeld",
            {},
            {
                "block_fraction": 0.3,
                "min_block_size": 7,
                "selection": "top-k",
                "score": "norm",
                "memory": "mean",
                "solver": "weiszfeld",
            },
        ),
        ("bgmd:0.3", {}, {"block_fraction": 0.3}),
        ("trimmed-mean", {"assumed-byzantine-fraction": 0.3}, {"byzantine_fraction": 0.3}),
        (
            "norm-threshold:order=1.5",
            {"assumed-byzantine-fraction": 0.3},
            {"order": 1.5, "byzantine_fraction": 0.3},
        ),
        ("robust-filter", {}, {"sigma0": None}),
        ("robust-filter:sigma0=2.0", {}, {"sigma0": 2.0}),
        ("multi-krum", {}, {"num_selected": None}),
        ("multi-krum:num-selected=4", {}, {"num_selected": 4}),
        ("multi-krum:num-selected=none", {}, {"num_selected": None}),
        ("centered-clipping", {}, {"radius": None}),
        ("centered-clipping:radius=0.5", {}, {"radius": 0.5}),
        ("mean", {"weighting": "examples"}, {"weighting": "examples"}),
        (
            "fl_bgmd.strategies:FedBGMD:block-fraction=0.3",
            {"compressor": "qsgd"},
            {"block_fraction": 0.3, "mixing": "none"},
        ),
        (
            "fl_bgmd.strategies:FedBGMD:0.3+nearest-neighbor",
            {"compressor": "qsgd"},
            {"block_fraction": 0.3, "mixing": "nearest-neighbor"},
        ),
    ],
)
def test_the_own_settings_reach_the_strategy(
    name: str, given: dict[str, Any], attributes: dict[str, Any]
) -> None:
    strategy = build_strategy(validate({"strategy": name, **given}))
    assert {key: getattr(strategy, key) for key in attributes} == attributes
    assert type(strategy) is (FedBGMD if "FedBGMD" in name else RobustStrategy)


def test_at_least_one_node_trains() -> None:
    strategy = build_strategy(
        validate({"fraction-train": 0.01, "num-clients": 10, "min-valid-replies": 1})
    )
    assert strategy.min_train_nodes == 1
    assert strategy.min_available_nodes == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"min-valid-replies": 11},
            "min-valid-replies is 11; allowed: none, or 1 to 10, the share",
        ),
        ({"attack": "backdoor:12"}, "attack is 'backdoor:12': target is '12'.* number, 0 to 9"),
        ({"attack": "backdoor:3.5"}, "attack is 'backdoor:3.5': target is '3.5'.* 0 to 9"),
        ({"attack": "delayed:0.5"}, "attack is 'delayed:0.5': rounds is '0.5'.* 1 or more"),
        (
            {"strategy": "norm-threshold:norms=reported+nearest-neighbor"},
            "mixing is 'nearest-neighbor' with norm-threshold:norms=reported; allowed: none",
        ),
        (
            {"strategy": "norm-threshold:norms=reported"},
            "compressor is 'none' with strategy 'norm-threshold:norms=reported'",
        ),
    ],
)
def test_values_that_would_fail_or_do_nothing_later_are_refused(
    given: dict[str, Any], message: str
) -> None:
    hostile = {"byzantine-fraction": 0.4} if "attack" in given else {}
    with pytest.raises(ConfigError, match=message):
        validate({**given, **hostile})


def test_own_strategies_may_be_weighted_if_they_can() -> None:
    validate({"strategy": "fl_bgmd.strategies:GMD", "weighting": "examples"})
    with pytest.raises(ConfigError, match="weighting is 'examples'"):
        validate({"strategy": "fl_bgmd.strategies:CMD", "weighting": "examples"})


def test_rounds_that_could_never_have_enough_replies_are_refused() -> None:
    few: dict[str, Any] = {"num-clients": 2, "strategy": "bgmd"}
    message = refusal(few)
    assert message.startswith("min-valid-replies is none with 2 clients asked in a round")
    assert "3 clients or more" in message
    refusal({"fraction-train": 0.2, "strategy": "fl_bgmd.strategies:GMD"})
    for given in (
        {"min-valid-replies": 1},
        {"min-valid-replies": 2},
        {"assumed-byzantine-fraction": 0.0},
        {"strategy": "mean"},
        {"strategy": "fl_bgmd.strategies:Mean"},
        {"num-clients": 4},
    ):
        assert validate(few | given)


def test_the_default_of_the_valid_replies_is_the_strategys() -> None:
    assert build_strategy(validate({"strategy": "gmd"})).min_valid_replies == 3
    assert build_strategy(validate({"strategy": "mean"})).min_valid_replies == 1
    assert build_strategy(validate({"min-valid-replies": 2})).min_valid_replies == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"strategy": "krum"}, ["4 of 10 clients may be hostile; krum is proved for n > 2 f"]),
        ({"strategy": "krum", "assumed-byzantine-fraction": 0.3}, []),
        (
            {"strategy": "robust-filter"},
            ["the guarantee of the robust filter (Data and Diggavi, Theorem 3) ends at 0.25"],
        ),
        ({"strategy": "gmd+bucketing"}, ["hostile buckets must not be the majority"]),
        ({"strategy": "bgmd"}, []),
    ],
)
def test_what_lies_beyond_a_guarantee_is_told(given: Any, told: list[str]) -> None:
    notes = beyond_guarantee(validate(given))
    assert len(notes) == len(told)
    assert all(part in note for part, note in zip(told, notes, strict=True))
