"""What a strategy's settings cannot protect from, or give away: said once, where a run starts."""

from typing import TYPE_CHECKING

from fl_bgmd.shares import FEWEST

if TYPE_CHECKING:
    from .robust import RobustStrategy

TOO_FEW = (
    f"of fewer than {FEWEST} replies nobody can tell which one lies: use {FEWEST} nodes or more, "
    "or, where all clients can be trusted, byzantine_fraction=0 (min_valid_replies=1 takes the "
    "risk)"
)
"""What to do about it."""


def notes(strategy: "RobustStrategy") -> list[str]:
    """Return what an operator should know before the first round."""
    name, fraction = type(strategy).__name__, strategy.byzantine_fraction
    found = []
    if not strategy.robust:
        found.append(f"{name} tolerates no hostile client: one moves the model wherever it wants")
    elif not fraction:
        found.append("byzantine_fraction is 0: no client is expected to lie")
    elif strategy.min_valid_replies < FEWEST:
        found.append(
            f"min_valid_replies is {strategy.min_valid_replies}: in a round of fewer than {FEWEST} "
            "valid replies a hostile one moves the model wherever it wants"
        )
    drawn = strategy.drawn()
    if strategy.seed is not None and drawn:
        found.append(
            f"seed is given: clients can find it from what they are sent and foresee the "
            f"{' and '.join(drawn)} that it draws; without a seed nobody can"
        )
    return found
