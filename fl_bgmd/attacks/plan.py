"""A plan: which attacks a run plays, and by whom in each round."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_bgmd.options import OptionError

from .attack import Bound, build_attacks
from .roles import byzantine_clients, byzantine_roles


@dataclass(frozen=True)
class AttackPlan:
    """The attacks of a run, computed alike by every client and by the server's grid.

    Attributes
    ----------
    attacks : tuple of Bound
        See :func:`build_attacks`; several are dealt out to the hostile clients in turns.
    fraction : float
        Hostile fraction of the clients, 0 to 1.
    selection : {"per-round", "fixed"}
        Redrawn in each round, or the same in all.
    seed : int
        0 or more.

    Raises
    ------
    ValueError
        For an unknown selection, and numbers outside of the above.
    """

    attacks: tuple[Bound, ...]
    fraction: float = 0.0
    selection: str = "per-round"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a fraction, seed or selection that no round's roles can be drawn from."""
        byzantine_clients(1, self.fraction, 0, self.seed, self.selection)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AttackPlan":
        """Read the plan from a run configuration; missing keys mean no attack.

        Raises :class:`OptionError` for an attack that does not exist, options that it does not
        have, and keys that have given way to them.
        """
        refuse_former(config)
        return cls(
            attacks=build_attacks(str(config.get("attack", "none"))),
            fraction=float(config.get("byzantine-fraction", 0.0)),
            selection=str(config.get("byzantine-selection", cls.selection)),
            seed=int(config.get("seed", 0)),
        )

    def roles(self, num_clients: int, server_round: int) -> dict[int, Bound]:
        """Return the attack of each hostile client of a round, by partition id."""
        if not self.attacks:
            return {}
        return byzantine_roles(
            self.attacks, num_clients, self.fraction, server_round, self.seed, self.selection
        )

    def player(self, num_clients: int, server_round: int, partition: int) -> int:
        """Return which of those who play its attack in a round a hostile client is, from 0."""
        roles = self.roles(num_clients, server_round)
        return sum(roles[other] == roles[partition] for other in roles if other < partition)

    def client_seed(self, server_round: int, partition: int) -> int:
        """Return the seed of a hostile client's own randomness in a round."""
        sequence = np.random.SeedSequence([self.seed, server_round, partition])
        return int(sequence.generate_state(1)[0])

    @property
    def num_past(self) -> int:
        """How many of its past updates each client has to keep."""
        return max((bound.num_past for bound in self.attacks), default=0)

    @property
    def targeted(self) -> tuple[Bound, ...]:
        """The attacks that have a label for a model to see in images."""
        return tuple(bound for bound in self.attacks if bound.target is not None)


FORMER: Mapping[str, Any] = {"attack.scale": 0.0, "attack.preset": "paper"}
"""Keys that have given way to options of the attack, and the values that meant its defaults."""


def refuse_former(given: Mapping[str, Any], former: Iterable[str] = FORMER) -> None:
    """Raise :class:`OptionError` for a key, or argument, that has given way to an option."""
    for key in former:
        if key in given:
            raise OptionError(
                f"{key} ({given[key]!r}) is no longer supported; put the strength behind the "
                'attack\'s name, such as attack = "bit-flip:5"'
            )
