"""The strategies' options: names and types, derived from the signatures of their constructors."""

import copy
import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pytest
from flower_messages import needed

import fl_bgmd.strategies
from fl_bgmd.aggregators import Aggregate
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.options import OptionError
from fl_bgmd.strategies import BGMD, GMD, Krum, Mean, RobustStrategy, Round, legacy, options_of
from strategies.settings import OwnRounds

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]

CLASSES: list[type[RobustStrategy]] = [
    found
    for found in vars(fl_bgmd.strategies).values()
    if inspect.isclass(found) and issubclass(found, RobustStrategy) and found is not RobustStrategy
]
LEGACY: list[type[legacy.LegacyStrategy]] = [
    getattr(legacy, name) for name in legacy.__all__ if name != "LegacyStrategy"
]

# What nobody could mean, by type.
WRONG: dict[Any, list[Any]] = {
    int: ["3", 2.0, True, [3]],
    float: ["0.3", True, 1j, [0.3]],
    bool: ["on", 1, 0],
    str: [3, b"none", True],
}


def checked(cls: type) -> dict[str, list[Any]]:
    """Return the values of a wrong type for each option that has a plain one."""
    found = {}
    for name, option in options_of(cls).items():
        kind = option.annotation
        unions = (typing.Union, types.UnionType)
        while hasattr(kind, "__metadata__") or typing.get_origin(kind) in unions:
            plain = hasattr(kind, "__metadata__")
            kind = kind.__origin__ if plain else typing.get_args(kind)[0]
        if isinstance(kind, type) and kind in WRONG:
            found[name] = WRONG[kind]
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_checks_its_type(cls: type[RobustStrategy]) -> None:
    options = checked(cls)
    assert {"byzantine_fraction", "fraction_train", "mixing", "seed"} <= options.keys()
    for name, values in options.items():
        for value in values:
            with pytest.raises(OptionError, match=f"^{name} is .*; allowed: "):
                cls(**{name: value})
    for name in ("train_metrics_aggr_fn", "checkpoints", "server_learning_rate"):
        with pytest.raises(OptionError, match=rf"^{name} is \[\]; allowed: "):
            cls(**{name: []})


@pytest.mark.parametrize("cls", CLASSES)
def test_every_default_may_be_given(cls: type[RobustStrategy]) -> None:
    cls(**{name: option.default for name, option in options_of(cls).items()} | needed(cls))


@pytest.mark.parametrize("cls", LEGACY)
def test_the_older_api_checks_its_options_too(cls: type[legacy.LegacyStrategy]) -> None:
    own = {name: values for name, values in checked(cls.rule_type).items() if name != "seed"}
    fedavg = {"fraction_fit": ["1"], "min_fit_clients": [2.5], "accept_failures": [1]}
    foreign = ["weighted_by_key", "arrayrecord_key", "configrecord_key"]
    foreign += ["fraction_train", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"]
    foreign += [name for name, option in options_of(cls.rule_type).items() if option.has(OwnRounds)]
    assert "bench_after" in foreign
    for name, values in {**own, **fedavg, "parameter_names": ["weight"]}.items():
        for value in values if name not in foreign else ():
            with pytest.raises(OptionError, match=f"^{name} is .*; allowed: "):
                cls(**{name: value})
    for misspelled, nearest in (("fraction_ft", "fraction_fit"), ("mixin", "mixing")):
        message = f"{cls.__name__} has no option '{misspelled}'; did you mean '{nearest}'?"
        with pytest.raises(TypeError) as error:
            cls(**{misspelled: 1})
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (BGMD, {"blok_fraction": 0.1}, "BGMD has no option 'blok_fraction'; did you mean "),
        (GMD, {"fraction_fit": 0.1}, "GMD has no option 'fraction_fit'; did you mean 'fraction_"),
        (GMD, {"min_node": 3}, "GMD has no option 'min_node'; did you mean 'min_train_nodes'?"),
        (Mean, {"zzz": 1}, "Mean has no option 'zzz'; it has: arrayrecord_key, bench_after, "),
        (Krum, {"num_selected": 1}, "Krum has no option 'num_selected'; it has: "),
        (
            BGMD,
            {"byzantine_fraction": "0.3"},
            "byzantine_fraction is '0.3'; allowed: a number, 0 to below 0.5",
        ),
        (BGMD, {"checkpoints": 3}, "checkpoints is 3; allowed: a Checkpoints, or a string, or "),
        (
            BGMD,
            {"server_learning_rate": "1"},
            "server_learning_rate is '1'; allowed: a number, above 0, or a ",
        ),
        (BGMD, {"seed": 1.0}, "seed is 1.0; allowed: None, or 0 to below 2^63"),
    ],
)
def test_the_error_says_what_is_wrong(
    cls: type[RobustStrategy], given: dict[str, Any], message: str
) -> None:
    for kind in (TypeError, ValueError):  # one for each view of it
        with pytest.raises(kind) as error:
            cls(**given)
        assert str(error.value).startswith(message)


def test_what_stands_for_a_number_is_one() -> None:
    numbers: dict[str, Any] = {"byzantine_fraction": np.float64(0.25), "fraction_train": 1}
    assert BGMD(**numbers, server_learning_rate=1).byzantine_fraction == 0.25
    # torch takes no such seed, and a checkpoint could not hold it.
    with pytest.raises(OptionError, match=r"seed is .*3.*; allowed: None, or 0 to below"):
        BGMD(seed=np.int64(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"byzantine_fraction is nan; allowed: 0 to below 0.5"):
        BGMD(byzantine_fraction=math.nan)


def test_a_strategy_can_be_copied() -> None:
    assert copy.deepcopy(BGMD(block_fraction=0.5)).block_fraction == 0.5


class Loud(Protocol):
    def shout(self) -> None: ...


class Own(GMD):
    """A rule of somebody's own, whose options have all kinds of annotations, and none."""

    def __init__(
        self,
        radius: float,
        names: Sequence[str] = (),
        *,
        kind: Literal["a", "b"] = "a",
        loud: Loud | None = None,
        unsaid: Any = None,
        plain=3,  # type: ignore[no-untyped-def]
        call: Callable[[], int] = int,
        none: int = None,  # type: ignore[assignment]  # noqa: RUF013
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.given = (radius, names, kind, loud, unsaid, plain, call, none)

    def aggregate(self, current: Round) -> Aggregate:
        return super().aggregate(current)


class Closed(GMD):
    def __init__(self, *, radius: "float | Unknown" = 1.0) -> None:
        super().__init__(byzantine_fraction=0.3)


def test_rules_of_ones_own_are_checked_by_their_own_signatures() -> None:
    assert Own(2.0, ["a"], loud=None, unsaid="x", plain="y", none=None, tol=1e-3).tol == 1e-3
    for name, value in (
        ("radius", "2"),
        ("names", "abc"),
        ("call", 3),
        ("none", "3"),
        ("tol", "1e-3"),
        ("fraction_train", "1"),
    ):
        with pytest.raises(OptionError, match=f"^{name} is {value!r}; allowed: "):
            Own(**{"radius": 1.0, name: value})
    with pytest.raises(OptionError, match="Own has no option 'radios'; did you mean 'radius'"):
        Own(1.0, radios=2)
    # Its constructor hands nothing on, and its annotation is of type checkers only.
    with pytest.raises(OptionError, match="Closed has no option 'tol'; it has: radius"):
        Closed(tol=1.0)
    assert Closed(radius=2).byzantine_fraction == 0.3


def test_folders_are_paths_or_strings(tmp_path: Path) -> None:
    for folder in (tmp_path, str(tmp_path), Checkpoints(tmp_path), None):
        BGMD(checkpoints=folder)
