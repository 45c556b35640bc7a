"""What a spec of the key ``strategy`` names: a rule, or a strategy class of somebody's own."""

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord

from fl_bgmd.aggregators import RULES, build_mixings, build_rule
from fl_bgmd.aggregators.rule import Kind
from fl_bgmd.registry import is_path, load_object, parse_spec, split_specs
from fl_bgmd.strategies import RobustStrategy, options_of

RootUpdate = Callable[[ArrayRecord, int], ArrayRecord]
"""A strategy's ``root_update``."""


def own_strategy(spec: str) -> type[RobustStrategy] | None:
    """Return the class that the ``package.module:CLASS`` of a spec names, None for a rule.

    Raises ``ValueError`` for what cannot be imported and for a class that is no
    :class:`RobustStrategy`.
    """
    name = parse_spec(split_specs(spec)[0], RULES).name
    if not is_path(name):
        return None
    found = load_object(name)
    if isinstance(found, type) and not issubclass(found, RobustStrategy):
        raise ValueError(f"{name} is no subclass of RobustStrategy")
    return found if isinstance(found, type) else None


def strategy_of(spec: str, **options: Any) -> RobustStrategy:
    """Build the strategy that a spec names, a rule's or one of somebody's own."""
    own = own_strategy(spec)
    if own is None:
        return RobustStrategy(spec, **options)
    mixing = "+".join(split_specs(spec)[1:])
    return own(**options, **_own_values(own, spec), mixing=mixing or "none")


def _own_values(own: type[RobustStrategy], spec: str) -> dict[str, Any]:
    """Return the options in the spec of a class: its constructor's and its rule's."""
    shared = options_of(RobustStrategy)  # which have keys of their own
    options = {name: o for name, o in options_of(own).items() if name not in shared}
    return parse_spec(split_specs(spec)[0], RULES).values(options)


def check_strategy(spec: str) -> None:
    """Raise ``ValueError`` for a spec that names nothing, or with options that cannot be."""
    own = own_strategy(spec)
    if own is None:
        build_rule(spec)
    else:
        _own_values(own, spec)
        build_mixings("+".join(split_specs(spec)[1:]) or "none")


def takes_root(spec: str) -> bool:
    """Whether a strategy makes use of an update of the server's own."""
    kind = _kind_of(spec)
    # An aggregate of one's own sees all that there is of a round.
    return kind is None or "root" in kind.takes


def needs_root(spec: str) -> bool:
    """Whether a strategy is nothing without one."""
    kind = _kind_of(spec)
    return kind is not None and kind.needs_root


def _kind_of(spec: str) -> Kind | None:
    """Return the rule of a strategy, None for a class that has none."""
    own = own_strategy(spec)
    if own is not None and not own.spec:
        return None
    return build_rule(spec if own is None else own.spec).rule.kind
