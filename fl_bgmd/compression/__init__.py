"""Compression of updates: what travels from a client to the server."""

from collections.abc import Callable

from .compressors import QSGD, Compressor, NoCompression, RandK, Sign, TopK

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "Compressor",
    "NoCompression",
    "RandK",
    "Sign",
    "TopK",
    "build_compressor",
]

_BUILDERS: dict[str, tuple[Callable[[float], Compressor], bool]] = {
    "none": (lambda _: NoCompression(), False),
    "top-k": (TopK, True),
    "rand-k": (RandK, True),
    "scaled-rand-k": (lambda fraction: RandK(fraction, scaled=True), True),
    "qsgd": (lambda levels: QSGD(int(levels)), True),
    "l1-sign": (lambda _: Sign(), False),
    "sign": (lambda _: Sign(scaled=False), False),
}
COMPRESSORS = tuple(_BUILDERS)
"""Names that :func:`build_compressor` knows."""

_DEFAULTS = {"qsgd": 63.0}


def build_compressor(name: str) -> Compressor:
    """Build a compressor from ``name`` or ``name:parameter``, such as ``top-k:0.01``.

    The parameter is the fraction of the coordinates (0.1 by default), or the number of levels of
    ``qsgd`` (63). Raises ``ValueError`` for anything else.
    """
    kind, _, text = name.partition(":")
    if kind not in _BUILDERS:
        raise ValueError(f"compressor is {name!r}; allowed: {', '.join(COMPRESSORS)}")
    build, has_parameter = _BUILDERS[kind]
    if text and not has_parameter:
        raise ValueError(f"compressor is {name!r}; allowed: {kind}, which has no parameter")
    try:
        parameter = float(text) if text else _DEFAULTS.get(kind, 0.1)
        if kind == "qsgd" and parameter != int(parameter):
            raise ValueError(f"levels is {text}; allowed: an integer")
        return build(parameter)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"compressor is {name!r}: {error}") from None
