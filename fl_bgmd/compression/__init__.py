"""Compression of updates: what travels from a client to the server."""

from collections.abc import Callable

from .compressors import QSGD, Compressor, LowRank, NoCompression, RandK, Sign, TopK, for_shapes

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "Compressor",
    "LowRank",
    "NoCompression",
    "RandK",
    "Sign",
    "TopK",
    "build_compressor",
    "for_shapes",
]

_BUILDERS: dict[str, tuple[Callable[[float], Compressor], bool]] = {
    "none": (lambda _: NoCompression(), False),
    "top-k": (TopK, True),
    "rand-k": (RandK, True),
    "scaled-rand-k": (lambda fraction: RandK(fraction, scaled=True), True),
    "qsgd": (lambda levels: QSGD(int(levels)), True),
    "l1-sign": (lambda _: Sign(), False),
    "low-rank": (lambda rank: LowRank(int(rank)), True),
    "sign": (lambda _: Sign(scaled=False), False),
}
COMPRESSORS = tuple(_BUILDERS)
"""Names that :func:`build_compressor` knows."""

_DEFAULTS = {"qsgd": 63.0, "low-rank": 2.0}


def build_compressor(name: str) -> Compressor:
    """Build a compressor from ``name`` or ``name:parameter``, such as ``top-k:0.01``.

    The parameter is the fraction of the coordinates (0.1 by default), or the number of levels of
    ``qsgd`` (63), or the rank of ``low-rank`` (2). Raises ``ValueError`` for anything else.
    """
    kind, _, text = name.partition(":")
    if kind not in _BUILDERS:
        raise ValueError(f"compressor is {name!r}; allowed: {', '.join(COMPRESSORS)}")
    build, has_parameter = _BUILDERS[kind]
    if text and not has_parameter:
        raise ValueError(f"compressor is {name!r}; allowed: {kind}, which has no parameter")
    try:
        parameter = float(text) if text else _DEFAULTS.get(kind, 0.1)
        if kind in ("qsgd", "low-rank") and parameter != int(parameter):
            raise ValueError(f"parameter is {text}; allowed: an integer")
        return build(parameter)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"compressor is {name!r}: {error}") from None
