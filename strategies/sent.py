"""What goes out to the clients of a round, and what their replies are held against."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators import Rule
from fl_bgmd.compression import Compressor
from fl_bgmd.held import num_bytes
from fl_bgmd.layout import ModelLayout, all_finite
from fl_bgmd.wire import MODEL_RECORD, Terms, pack_model

from .settings import Settings
from .ties import Tied

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sent:
    """What went out to the clients of a round, and what their replies are held against.

    Attributes
    ----------
    terms : Terms
        What they were asked.
    model : ArrayRecord
        The server's model.
    layout : ModelLayout
        Of the model as the clients have it: rounded where there is a downlink compressor.
    row_dtype : torch.dtype
        Of a row: that of the layout; float16 where all arrays that are trained are, their replies
        are not packed, and no mixing writes means into the rows.
    own_layout : ModelLayout
        Of ``model``.
    compressor : Compressor or None
        What they were asked to pack their updates with, with the round's seed.
    coordinates : ndarray or None
        int64 (k,): those that the server chose for all of them.
    num_bytes : int
        Of the model, for each client.
    root : Tensor or None
        (d,): how far the server's own training goes from ``model``.
    """

    terms: Terms
    model: ArrayRecord
    layout: ModelLayout
    own_layout: ModelLayout
    row_dtype: torch.dtype
    compressor: Compressor | None = None
    coordinates: Indices | None = None
    num_bytes: int = 0
    root: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: ArrayRecord,
        server_round: int,
        seed: int,
        settings: Settings,
        rule: Rule,
    ) -> Self:
        """Return what goes out where nothing rounds the model; clients draw from ``seed``.

        ``rule`` says which norms they are to report, and whether it mixes their updates.

        Raises ``ValueError`` for a model that holds a NaN or an infinity.
        """
        layout, compressor, coordinates = ModelLayout(model), settings.packing, None
        if not (all_finite(layout.values) and all_finite(layout.buffer_values)):
            raise ValueError("arrays of the global model hold a NaN or an infinity")
        terms = Terms(
            round=server_round,
            seed=seed,
            compressor=None if compressor is None else compressor.name,
            error_feedback=settings.error_feedback,
            compression_seed=seed if settings.shared_coordinates else None,
            norm_order=None if rule.norm_order == 2 else rule.norm_order,
        )
        if settings.shared_coordinates and compressor is not None:
            compressor = compressor.for_round(seed)
            coordinates = compressor.coordinates(layout.num_directions)
        is_narrow = layout.is_half and compressor is None and not rule.mixings
        dtype = torch.float16 if is_narrow else torch.from_numpy(layout.values[:0]).dtype
        size, root = _num_bytes(model), _root(model, server_round, layout, settings)
        return cls(terms, model, layout, layout, dtype, compressor, coordinates, size, root)

    def as_received(self, content: RecordDict, received: ArrayRecord) -> Self:
        """Return what went out by what :func:`packed` made of it."""
        [arrays] = content.array_records.values()
        layout = self.own_layout if received is self.model else ModelLayout(received)
        return replace(self, layout=layout, num_bytes=_num_bytes(arrays))

    def check_follows(self, before: "Sent") -> None:
        """Raise ``ValueError`` for a model with other keys, shapes or dtypes than that before."""
        own, other = self.own_layout, before.own_layout
        if (own.directions, own.buffers) != (other.directions, other.buffers):
            raise ValueError(
                "arrays are of another model than in the last round, whose state this strategy "
                "keeps; allowed: the same keys, shapes and dtypes, or a new strategy"
            )

    @property
    def width(self) -> int:
        """How many values a row has."""
        return self.layout.num_directions if self.coordinates is None else len(self.coordinates)

    def root_row(self, ties: Mapping[str, str], device: torch.device) -> Tensor | None:
        """Return the root as the rows of a rule are: see :meth:`spread`."""
        if self.root is None:
            return None
        row = self.root
        if self.coordinates is not None:
            row = row[torch.from_numpy(self.coordinates)]
        elif ties:
            row = Tied(self.layout.directions, ties).merge(row[None].clone())[0]
        return row.to(device)

    def spread(self, vector: Tensor, ties: Mapping[str, str]) -> Tensor:
        """Return what a rule made of rows as an update of all coordinates, (d,)."""
        if ties:
            vector = Tied(self.layout.directions, ties).spread(vector)
        if self.coordinates is None:
            return vector
        update = torch.zeros(self.layout.num_directions, dtype=vector.dtype)
        update[torch.from_numpy(self.coordinates)] = vector.cpu()
        return update


def _root(
    model: ArrayRecord, server_round: int, layout: ModelLayout, settings: Settings
) -> Tensor | None:
    """Return how far the server's own training goes from the model, (d,)."""
    if settings.root_update is None:
        return None
    trained = ModelLayout(settings.root_update(model, server_round))
    if (trained.directions, trained.buffers) != (layout.directions, layout.buffers):
        raise ValueError(
            f"root_update returned arrays {sorted(trained.keys)}; allowed: those of the model, "
            f"{sorted(layout.keys)}, of the same shapes and dtypes"
        )
    return torch.from_numpy(layout.values - trained.values)


def packed(
    content: RecordDict, key: str, downlink: Compressor | None, seed: int
) -> tuple[RecordDict, ArrayRecord]:
    """Return what goes to the clients, and the model that they make of it.

    ``content`` has the model under ``key``; ``downlink`` rounds it, drawing from ``seed``.
    """
    arrays = content.array_records[key]
    if downlink is None:
        return content, arrays
    rounded, received = pack_model(arrays, downlink, seed)
    content[key] = rounded["arrays"]
    content[MODEL_RECORD] = rounded[MODEL_RECORD]
    return content, received


def round_seed(seed: int, server_round: int, *phase: int, secret: bool) -> int:
    """Return what a round tells its clients to draw from.

    With ``secret`` it does not give away the run's ``seed``.
    """
    own = int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:8], "big") if secret else seed
    return int(np.random.SeedSequence([own, server_round, *phase]).generate_state(1)[0])


def _num_bytes(arrays: ArrayRecord) -> int:
    return sum(map(num_bytes, arrays.values()))
