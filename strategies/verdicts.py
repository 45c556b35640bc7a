"""What the server made of each client in each round.

A verdict says whether a reply was accepted, or why not, what its update looked like and what weight
it got. They are kept as columns of numbers, the newest :data:`MOST` of them; how often each node
was rejected, and why, is counted for all of them.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray

from fl_bgmd.extras import pandas
from fl_bgmd.replies import Rejection

if TYPE_CHECKING:
    import pandas as pd

MOST = 2**20
"""Verdicts that are kept: those of 10,000 clients over 100 rounds, in about 40 MB."""

ACCEPTED, NO_REPLY, BENCHED = "accepted", "no-reply", "benched"
_NAMES = (ACCEPTED, NO_REPLY, BENCHED, *(reason.value for reason in Rejection))
_CODES = {name: code for code, name in enumerate(_NAMES)}

_COLUMNS = np.dtype(
    [
        ("node", "<u8"),
        ("partition", "<i4"),
        ("verdict", "u1"),
        ("norm", "<f8"),
        ("distance", "<f8"),
        ("weight", "<f8"),
        ("benched", "?"),
    ]
)


@dataclass(frozen=True)
class Verdict:
    """What the server made of a client in a round.

    Attributes
    ----------
    round : int
        From 1 up.
    node : int
        Its 64-bit id. As text in JSON: JavaScript and others round such numbers.
    partition : int or None
        The ``partition-id`` that the reply claims.
    verdict : str
        ``accepted``, the reason to reject the reply (see :class:`fl_bgmd.replies.Rejection`),
        ``no-reply``, or ``benched`` for a node that sat this round out.
    norm : float or None
        Euclidean norm of its update; None where there is none.
    distance : float or None
        Distance of its update from the aggregate, before mixing, right to about 2 %.
    weight : float or None
        What the rule gave it, where the rule says.
    benched : bool
        Whether it sits out the next round.
    """

    round: int
    node: int
    partition: int | None = None
    verdict: str = ACCEPTED
    norm: float | None = None
    distance: float | None = None
    weight: float | None = None
    benched: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the reply was used."""
        return self.verdict == ACCEPTED

    def to_json(self) -> str:
        """Return the verdict as a line of JSON, the node's id as text."""
        return json.dumps(asdict(self) | {"node": str(self.node)}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Verdict":
        """Undo :meth:`to_json`."""
        found = json.loads(line)
        return cls(**found | {"node": int(found["node"])})

    @classmethod
    def frame_of(cls, verdicts: Iterable["Verdict"]) -> "pd.DataFrame":
        """Return verdicts as a pandas frame, one line each."""
        columns = [*cls.__dataclass_fields__]
        frame: pd.DataFrame = pandas().DataFrame([asdict(v) for v in verdicts], columns=columns)
        return frame


@dataclass(frozen=True)
class Heard:
    """What is known of a reply when it has been screened: its node, partition, and a reason."""

    node: int
    partition: int | None = None
    verdict: str = ACCEPTED


class Verdicts(Sequence[Verdict]):
    """The verdicts of a run, oldest round first.

    Parameters
    ----------
    most : int
        How many are kept; the oldest rounds go first, the newest one always stays.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._rounds: deque[tuple[int, NDArray[Any]]] = deque()
        self._count = 0
        self._rejected: dict[int, Counter[str]] = {}
        self._num_rounds: Counter[int] = Counter()
        self.dropped = 0
        """How many of the oldest are not kept any more."""

    def add(
        self,
        number: int,
        heard: Sequence[Heard],
        *,
        asked: Iterable[int] = (),
        sat_out: Iterable[int] = (),
        benched: Iterable[int] = (),
        norms: Sequence[float] | None = None,
        distances: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Take in a round.

        Parameters
        ----------
        number : int
            The round.
        heard : sequence of Heard
            Its replies; ``norms``, ``distances`` and ``weights`` are of the accepted ones, in
            their order.
        asked, sat_out, benched : iterable of int
            The nodes that were asked, that sat this round out and that sit out the next one.
        """
        replied = {each.node for each in heard}
        silent = [Heard(node, None, NO_REPLY) for node in sorted(set(asked) - replied)]
        out = [Heard(node, None, BENCHED) for node in sorted(set(sat_out) - replied)]
        rows = [*heard, *silent, *out]
        table = np.zeros(len(rows), _COLUMNS)
        table["node"] = [each.node % 2**64 for each in rows]
        table["partition"] = [-1 if each.partition is None else each.partition for each in rows]
        table["verdict"] = [_CODES[each.verdict] for each in rows]
        accepted = table["verdict"] == _CODES[ACCEPTED]
        for name, values in (("norm", norms), ("distance", distances), ("weight", weights)):
            table[name] = np.nan
            if values is not None and len(values) == accepted.sum():
                table[name][accepted] = values
        table["benched"] = np.isin(table["node"], np.array([*benched], "<u8"))
        for each in rows:
            self._num_rounds[each.node] += 1
            if each.verdict not in (ACCEPTED, BENCHED):
                self._rejected.setdefault(each.node, Counter())[each.verdict] += 1
        self._rounds.append((number, table))
        self._count += len(table)
        while self._count > self._most and len(self._rounds) > 1:
            gone = len(self._rounds.popleft()[1])
            self._count, self.dropped = self._count - gone, self.dropped + gone

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Verdict]:
        for number, table in self._rounds:
            for row in table:
                yield _verdict(number, row)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        left = place + self._count if place < 0 else place
        for number, table in self._rounds:
            if 0 <= left < len(table):
                return _verdict(number, table[left])
            left -= len(table)
        raise IndexError(f"verdict {place} of {self._count}")

    @property
    def frame(self) -> "pd.DataFrame":
        """The verdicts as a pandas frame, one line each."""
        return Verdict.frame_of(self)

    def json_lines(self) -> Iterator[str]:
        """Yield the verdicts as lines of JSON."""
        return (verdict.to_json() for verdict in self)

    def write(self, path: Path) -> None:
        """Write the verdicts to a file, one line of JSON each."""
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.json_lines())

    def summary(self, most: int = 5) -> list[str]:
        """Return who was rejected most, a line for each of at most ``most`` nodes."""
        order = sorted(self._rejected.items(), key=lambda item: (-item[1].total(), item[0]))
        lines = []
        for node, reasons in order[:most]:
            told = ", ".join(
                name if len(reasons) == 1 else f"{name} {count}"
                for name, count in reasons.most_common(3)
            )
            lines.append(
                f"node {node} rejected in {reasons.total()} of {self._num_rounds[node]} rounds: "
                f"{told}"
            )
        if more := len(order) - len(lines):
            lines.append(f"and {more} nodes more")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the verdicts for a checkpoint."""
        return {
            "rounds": [[number, len(table)] for number, table in self._rounds],
            "table": b"".join(table.tobytes() for _, table in self._rounds),
            "rejected": {node: dict(reasons) for node, reasons in self._rejected.items()},
            "num-rounds": dict(self._num_rounds),
            "dropped": self.dropped,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], most: int = MOST) -> "Verdicts":
        """Undo :meth:`to_dict`."""
        verdicts = cls(most)
        table, start = np.frombuffer(found["table"], _COLUMNS), 0
        for number, length in found["rounds"]:
            verdicts._rounds.append((number, table[start : start + length]))
            start += length
        verdicts._count, verdicts.dropped = start, found["dropped"]
        verdicts._rejected = {node: Counter(told) for node, told in found["rejected"].items()}
        verdicts._num_rounds = Counter(found["num-rounds"])
        return verdicts


@dataclass
class RobustResult(Result):
    """Flower's ``Result`` with the verdicts of the run.

    Attributes
    ----------
    verdicts : Verdicts
        One for each client and round.
    """

    verdicts: Verdicts = field(default_factory=Verdicts)


def _verdict(number: int, row: Any) -> Verdict:
    partition = int(row["partition"])
    return Verdict(
        round=number,
        node=int(row["node"]),
        partition=None if partition < 0 else partition,
        verdict=_NAMES[row["verdict"]],
        norm=_told(row["norm"]),
        distance=_told(row["distance"]),
        weight=_told(row["weight"]),
        benched=bool(row["benched"]),
    )


def _told(value: float) -> float | None:
    """Return a number that JSON has: an update longer than that is as long as one can say."""
    if math.isnan(value):
        return None
    return min(float(value), float(np.finfo(np.float64).max))
