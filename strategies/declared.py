"""Strategy classes as declarations: a rule, and options by keyword, of which nothing is said twice.

What can be given follows from the class: :func:`help`, the checks, the attributes, configuration
keys and the older API are derived from it.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import torch
from flwr.serverapp.strategy import FedAvg

from fl_bgmd.aggregators import RULES, Aggregate, Rule, build_rule
from fl_bgmd.aggregators.rule import Bound, Kind, build_mixings
from fl_bgmd.compression import Compressor
from fl_bgmd.options import (
    Option,
    OptionError,
    Options,
    check_all,
    declared,
    nearest,
    unmarked,
    with_parameters,
)
from fl_bgmd.registry import split_specs

from .metrics import COMBINERS, Combine
from .settings import FLOWERS_OPTIONS, OWN_OPTIONS, Settings
from .step import Round


class DeclaredStrategy(FedAvg):
    """A rule with the options of all strategies, and Flower's.

    Attributes
    ----------
    given : dict
        The options as they were given.
    rule : Rule
        The rule behind its mixings, which calls :meth:`aggregate`.
    settings : Settings
        The options of all strategies.
    combiners : dict of str to callable
        The user's functions that combine metrics, by phase; None for medians.
    """

    spec: ClassVar[str] = ""
    """The rule of a subclass."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Options that a subclass sets where they are not given."""

    robust: bool
    """Whether it holds up against a hostile minority. By default True of a class with an
    :meth:`aggregate`, else what the rule says."""

    weightable: bool
    """Whether the rule makes use of weights; likewise, by default False."""

    weights_tell: bool
    """Whether a weight near zero is evidence against a client: not where honest ones are left out;
    likewise, by default False."""

    can_share_coordinates: bool
    """Whether rows may be of other coordinates in each round; likewise, by default True."""

    __signature__: ClassVar[inspect.Signature]

    given: dict[str, Any]
    rule: Rule
    settings: Settings
    combiners: Mapping[str, Combine | None]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Tell :func:`help` and :func:`inspect.signature` the options of a subclass."""
        super().__init_subclass__(**keywords)
        options = options_of(cls)
        cls.__signature__ = signature_of(cls, options, takes_spec=not cls.has_rule())
        if sys.flags.optimize < 2:  # -OO: without docstrings
            cls.__doc__ = docstring_of(cls, options)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the options before any constructor computes with them."""
        rule = cls.spec or (args[0] if args and isinstance(args[0], str) else "")
        check_all(cls.__name__, options, options_of(cls, rule))
        strategy = super().__new__(cls)
        strategy.given = options
        return strategy

    def __init__(self, rule: str = "", /, **options: Any) -> None:
        cls, options = type(self), {**self.defaults, **options}
        if bool(rule) == cls.has_rule():
            allowed = "none, the class has one" if rule else "a spec such as 'gmd+bucketing'"
            raise OptionError(f"rule is {rule!r} for {cls.__name__}; allowed: {allowed}")
        flowers, own = (
            {name: options.pop(name) for name in kind if name in options}
            for kind in (FLOWERS_OPTIONS, OWN_OPTIONS)
        )
        super().__init__(**flowers)
        self.combiners = {phase: flowers.get(option) for phase, option in COMBINERS.items()}
        settings = Settings(**own)
        share, spec = settings.first_share, rule or self.spec
        if spec:
            named = build_rule(spec, byzantine_fraction=share, mixing=settings.mixing, **options)
        else:
            named = Rule(Bound(self._kind(), {}), build_mixings(settings.mixing), share)
        self.rule = replace(named, call=lambda **inputs: self.aggregate(Round(**inputs)))
        self.settings = settings.fitted(named, cls.__name__ if self.spec else str(named))

    def _kind(self) -> Kind:
        """Return the rule that a class with an :meth:`aggregate` is."""
        said = {name: getattr(type(self), name, value) for name, value in _SAID.items()}
        uses = () if said["can_share_coordinates"] else ("memory",)
        return Kind(
            type(self).__name__,
            self.aggregate,
            {},
            {f.name: f.name for f in fields(Round) if f.name != "weights" or said["weightable"]},
            robust=said["robust"],
            weights_tell=said["weights_tell"],
            uses=lambda _: uses,
        )

    @classmethod
    def has_rule(cls) -> bool:
        """Whether the class has a rule, rather than takes one."""
        return bool(cls.spec) or cls.aggregate is not DeclaredStrategy.aggregate

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option, or what the rule says of itself."""
        known = vars(self)
        if name in OWN_OPTIONS and "settings" in known:
            return getattr(known["settings"], name)
        if "rule" in known:
            bound: Bound = known["rule"].rule
            if name in bound.kind.options:
                return bound.values[bound.kind.options[name].parameter]
            if name == "can_share_coordinates":
                rule: Rule = known["rule"]
                return not (rule.uses("memory") or rule.uses("last"))
            if name in _SAID:
                return getattr(bound.kind, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def compressor(self) -> Compressor | None:
        """What clients are asked to pack their updates with."""
        return self.settings.packing

    @property
    def device(self) -> torch.device:
        """Where the update matrix lives."""
        return self.settings.torch_device

    def aggregate(self, current: Round) -> Aggregate:
        """Apply the rule to the rows of a round.

        An override may keep what it remembers in the result's ``memory``: it comes back as
        ``current.memory``, is part of checkpoints, and of a round that fails nothing stays.
        """
        result: Aggregate = self.rule.rule(**vars(current))
        return result


_SAID: Mapping[str, bool] = {
    "robust": True,
    "weightable": False,
    "weights_tell": False,
    "can_share_coordinates": True,
}
"""What a class with a rule of its own may say of it."""


def options_of(cls: type, rule: str | Kind = "") -> dict[str, Option]:
    """Return what can be given to a strategy class by keyword, by name.

    Those of its constructors, of its rule (or of ``rule``, a spec or what was declared), of all
    strategies, and Flower's.
    """
    found: dict[str, Option] = {}
    for base in cls.__mro__:
        if base is DeclaredStrategy:
            break
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        found = declared(constructor, ("self",), positional=True) | found
        kinds = [p.kind for p in inspect.signature(constructor).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found
    spec = (getattr(cls, "spec", "") or rule) if isinstance(rule, str) else ""
    kind = rule if isinstance(rule, Kind) else None
    if spec:
        kind = RULES.parse(split_specs(spec)[0])[0]
    options = {**FLOWERS_OPTIONS, **OWN_OPTIONS, **(kind.options if kind else {})}
    for name, value in getattr(cls, "defaults", {}).items():
        if name not in options | found:
            raise OptionError(f"{cls.__name__}.defaults has {name!r}; {nearest(name, options)}")
        if name in options:
            options[name] = replace(options[name], default=value)
    return {**options, **found}


def signature_of(cls: type, options: Options, *, takes_spec: bool) -> inspect.Signature:
    """Return the signature of a strategy class: its constructor's, with each option by name.

    ``takes_spec`` says whether it is given a rule, whose options may be any.
    """
    rest = [*inspect.signature(cls.__init__).parameters.values()][1:]  # type: ignore[misc]
    others = [p for p in rest if p.kind is inspect.Parameter.VAR_KEYWORD and takes_spec]
    own = [
        p
        for p in rest
        if p.kind is not inspect.Parameter.VAR_KEYWORD
        and (takes_spec or p.kind is not inspect.Parameter.POSITIONAL_ONLY)
    ]
    names = {p.name for p in own}
    added = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=unmarked(option.annotation),
        )
        for option in options.values()
        if option.name not in names
    ]
    return inspect.Signature([*own, *added, *others])


def docstring_of(cls: type, options: Options) -> str:
    """Return the docstring of a strategy class, the rule's where it has none, with its options."""
    text, spec = cls.__doc__ or "", getattr(cls, "spec", "")
    if not text and spec:
        text = RULES.parse(split_specs(spec)[0])[0].summary
    changed = getattr(cls, "defaults", {})
    common = {**FLOWERS_OPTIONS, **OWN_OPTIONS}
    own = [o for name, o in options.items() if name not in common or name in changed]
    return with_parameters(text, own, _OTHERS)


_OTHERS = "Those of every strategy and Flower's, as for :class:`RobustStrategy`."
