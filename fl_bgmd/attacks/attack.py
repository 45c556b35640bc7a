"""Attacks by name: what declares one, and what a text such as ``alie+bit-flip:5`` builds.

An attack is a function under :func:`attack`, which is all there is to adding one. What it is given,
what it knows and where it is played follow from the names of its parameters: the table at the top
of :mod:`.view`. All other parameters are options; the first is the attack's knob: ``bit-flip:5``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import NonNegative, OptionError, Options, check_all, declared, nearest
from fl_bgmd.registry import Registry, declared_under, parse_spec, split_specs, value_text

from .view import NEEDS_GRID, ON_DATA, ON_UPDATES, TELLS, Knowledge, View

P = ParamSpec("P")
R = TypeVar("R")

Place = Literal["update", "data"]

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

Strength = NonNegative
"""What scales a lie."""


@dataclass(frozen=True, eq=False)
class Attack:
    """An attack as it was declared.

    Attributes
    ----------
    name : str
        Kebab-case.
    source : str
        Where it was described.
    function : callable
        What makes the lie.
    takes : tuple of str
        What it is given: see :mod:`.view`.
    options : mapping of str to Option
        Its other parameters. The first is its knob.
    sweep : tuple
        Values of the knob in a full comparison, its default among them; empty without a knob.
    authors_code : mapping
        The knob's value in the BGMD authors' code by data set (``""``: all) where it is not the
        default, for the record.
    players : int
        How many hostile clients it takes.
    target : str
        The option that holds the label a model is to see in every image, which a run then measures.
    victim : str
        The option that holds the label whose images it is to see that in, where not in all others'.
    trigger : callable, optional
        ``(images, **options) -> images``: what test images are stamped with to measure it, given
        those of the attack's options that it names. Without, they are taken as they are.
    boost : str
        The option that holds what the update is multiplied by after training, None for n / f.
    untrained : bool
        Whether the model goes back as it came, byte for byte, statistics of its layers included.
    """

    name: str
    source: str
    function: Callable[..., Any]
    takes: tuple[str, ...]
    options: Options
    sweep: tuple[Any, ...] = ()
    authors_code: Mapping[str, Any] = field(default_factory=dict)
    players: int = 1
    target: str = ""
    victim: str = ""
    trigger: Callable[..., Images] | None = None
    boost: str = ""
    untrained: bool = False

    @property
    def place(self) -> Place:
        """Whether the update is replaced after training, or the examples before it."""
        return "data" if set(self.takes) & set(ON_DATA) else "update"

    @property
    def knows(self) -> Knowledge:
        """What a hostile client sees.

        ``own`` attacks run on the client, on a SuperNode as in a simulation; the others are played
        by a grid that sees all replies.
        """
        return next((knows for name, knows in TELLS.items() if name in self.takes), "own")

    @property
    def is_local(self) -> bool:
        """Whether a client plays it by itself, on the update that it has trained."""
        return self.place == "update" and self.knows == "own"

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def bound(self, given: Mapping[str, Any] | None = None, name: str = "") -> "Bound":
        """Return the attack with options by name, checked; the others have their defaults.

        ``name`` is what it goes by, where that is not its own: the path of somebody else's.
        """
        values = {option.parameter: option.default for option in self.options.values()}
        values |= check_all(self.name, given or {}, self.options)
        if self.victim and values[self.victim] == values[self.target]:
            raise OptionError(
                f"{self.victim} is {values[self.victim]} and {self.target} too; allowed: two labels"
            )
        return Bound(self, values, name)

    def swept(self, name: str = "") -> "list[Bound]":
        """Return the attack with each value of its sweep, as it is without a knob."""
        knob = next(iter(self.options), "")
        return [self.bound({knob: value}, name) for value in self.sweep] or [self.bound({}, name)]


@dataclass(frozen=True)
class Bound:
    """An attack with the values of its options; its text is its spec, by which it is told apart.

    Attributes
    ----------
    attack : Attack
        What is played.
    values : mapping of str to object
        Of the options, by their parameters' names.
    path : str
        ``package.module:NAME`` of somebody else's, empty for one of :data:`ATTACKS`.
    """

    attack: Attack
    values: Mapping[str, Any] = field(hash=False)
    path: str = ""

    @property
    def name(self) -> str:
        """The spec without options."""
        return self.path or self.attack.name

    @property
    def num_past(self) -> int:
        """How many of its own past updates a client has to keep for it."""
        return int(self.values["rounds"]) if "past" in self.attack.takes else 0

    @property
    def target(self) -> int | None:
        """The label that a model is to see in every image, None where there is no such aim."""
        return self.values[self.attack.target] if self.attack.target else None

    @property
    def victim(self) -> int | None:
        """The label whose images it is to see that in, None for all others."""
        return self.values[self.attack.victim] if self.attack.victim else None

    @property
    def is_normalized(self) -> bool:
        """Whether images come to it as the model sees them."""
        return bool(self.values.get("normalized", False))

    def stamp(self, images: Images) -> Images:
        """Return test images with the trigger, as they are where there is none."""
        trigger = self.attack.trigger
        if trigger is None:
            return images
        named = inspect.signature(trigger).parameters
        return trigger(images, **{k: value for k, value in self.values.items() if k in named})

    def boosted(self, update: Tensor, num_clients: int, num_byzantine: int) -> Tensor:
        """Return what is sent of an update (d,) that was trained on the attack's examples."""
        factor = self.values[self.attack.boost] if self.attack.boost else 1.0
        return update * (num_clients / num_byzantine if factor is None else factor)

    def lie(self, view: View) -> Tensor:
        """Return what is sent instead of the update (d,), for attacks on the update."""
        lie: Tensor = self.attack.function(**view.limited_to(self.attack.takes), **self.values)
        return lie

    def corrupt(
        self,
        images: Images,
        labels: Labels,
        num_classes: int,
        rng: np.random.Generator,
        player: int = 0,
    ) -> tuple[Images, Labels]:
        """Return what the client trains on, for attacks on the data, which leave theirs alone.

        Parameters
        ----------
        images : ndarray
            (B, H, W) or (B, H, W, C) uint8, before normalization; (B, C, H, W) float32 after it
            for an attack that :attr:`is_normalized`.
        labels : ndarray
            (B,) int64.
        num_classes : int
            How many labels there are.
        rng : numpy.random.Generator
            The client's own randomness.
        player : int
            Which of the clients who play the attack in this round it is, from 0.
        """
        takes = self.attack.takes
        inputs: dict[str, Any] = {"images": images, "labels": labels, "num_classes": num_classes}
        inputs |= {"rng": rng, "player": player}
        changed = self.attack.function(**{name: inputs[name] for name in takes}, **self.values)
        if "images" in takes and "labels" in takes:
            images, labels = changed
            return images, labels
        return (changed, labels) if "images" in takes else (images, changed)

    def __str__(self) -> str:
        """Return the spec."""
        told = {
            option.key: value_text(value)
            for option in self.attack.options.values()
            if (value := self.values[option.parameter]) != option.default
        }
        knob = next(iter(self.attack.options.values()), None)
        if knob is not None and list(told) == [knob.key]:
            return f"{self.name}:{told[knob.key]}"
        listed = ",".join(f"{key}={text}" for key, text in told.items())
        return f"{self.name}:{listed}" if listed else self.name


# ------------------------------------------------------------------------------- declarations


ATTACKS: Registry[Attack] = Registry("attack", declared_under("attack", Attack))
"""Attacks by name. ``ATTACKS["package.module:NAME"]`` imports one of your own."""


def attack(
    source: str,
    *,
    name: str = "",
    sweep: Sequence[Any] = (),
    authors_code: Mapping[str, Any] | None = None,
    players: int = 1,
    target: str = "",
    victim: str = "",
    trigger: Callable[..., Images] | None = None,
    boost: str = "",
    untrained: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a function as an attack: see the module, and :class:`Attack` for the arguments.

    ``name`` is the function's in kebab-case unless given. Called directly, the function checks its
    options. This package's attacks are listed in :data:`ATTACKS`; one of your own goes by
    ``package.module:NAME`` and clashes with none.

    Raises
    ------
    ValueError
        For a function whose parameters do not make an attack, naming it and them.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        takes = tuple(p for p in parameters if p in (*ON_UPDATES, *ON_DATA))
        options = declared(function, but=takes, positional=True)
        called = name or function.__name__.replace("_", "-")
        _refuse_impossible(called, takes, options)
        swept: tuple[Any, ...] = tuple(sweep)
        if options and (default := next(iter(options.values())).default) not in swept:
            swept = (default, *swept)
        found = Attack(
            called,
            source,
            function,
            takes,
            options,
            swept,
            authors_code or {},
            players,
            target,
            victim,
            trigger,
            boost,
            untrained,
        )
        found.swept()  # refuses values that are not allowed
        if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
            ATTACKS.add(called, found)
        return _public(function, found)

    return declare


def _public(function: Callable[P, R], declared_as: Attack) -> Callable[P, R]:
    """Return the function as it is called directly: it checks its options."""
    signature = inspect.signature(function)
    options = {option.parameter: option for option in declared_as.options.values()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in options:
                options[name].check(value)
        return function(*args, **kwargs)

    call.attack = declared_as  # type: ignore[attr-defined]
    return call


def _refuse_impossible(name: str, takes: Sequence[str], options: Options) -> None:
    """Raise ``ValueError`` for parameters that no client or grid could serve."""
    for option in options.values():
        if option.default is inspect.Parameter.empty:
            known = (*ON_UPDATES, *ON_DATA)
            raise ValueError(
                f"attack {name!r} takes {option.name!r}; {nearest(option.name, known)}; allowed: "
                f"{', '.join(known)}, and options, which have a default"
            )
    given, colludes = set(takes), any(tells in takes for tells in TELLS)
    problem = ""
    if given & set(ON_DATA) and given & set(ON_UPDATES):
        problem = "allowed: those of an attack on the update, or those of one on the data"
    elif not given & {"update", "colluders", "honest", "images", "labels"}:
        problem = "allowed: with update, colluders, honest, images or labels among them"
    elif "past" in given and (colludes or "rounds" not in options):
        problem = "allowed: past with an option 'rounds', and no more than its own update"
    elif not colludes and (kept := [name for name in NEEDS_GRID if name in given]):
        problem = f"allowed: {kept[0]} with colluders or honest; {NEEDS_GRID[kept[0]]}"
    if problem:
        raise ValueError(f"attack {name!r} takes {', '.join(takes) or 'nothing'}; {problem}")


# -------------------------------------------------------------------------------------- specs


def build_attacks(text: str) -> tuple[Bound, ...]:
    """Build attacks from their specs, joined by ``+``, such as ``alie+bit-flip:5``.

    ``name``, ``name:value`` (of the knob) or ``name:option=value,option=value``;
    ``package.module:NAME`` is a function of your own under :func:`attack`; ``none`` is none.

    Raises
    ------
    OptionError
        A ``ValueError``, for an unknown name or option and values that are not allowed.
    """
    return () if text == "none" else tuple(_build(part) for part in split_specs(text))


def _build(text: str) -> Bound:
    spec = parse_spec(text, ATTACKS)
    found = ATTACKS[spec.name]
    try:
        given = spec.values(found.options)
    except OptionError as error:
        raise OptionError(f"attack is {text!r}: {error}") from None
    return found.bound(given, "" if spec.name in ATTACKS else spec.name)


def base_name(text: str) -> str:
    """Return what the specs in a text are without their options: ``alie+bit-flip``."""
    return "+".join(parse_spec(part, ATTACKS).name for part in split_specs(text))
