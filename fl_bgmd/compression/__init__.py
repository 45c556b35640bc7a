"""Compression of updates: what travels from a client to the server."""

from .base import (
    COMPRESSORS,
    Compressor,
    Internal,
    NoCompression,
    Shapes,
    build_compressor,
    build_downlink,
    build_received,
    compressor,
    names_of,
)
from .low_rank import LowRank
from .quantized import QSGD, Sign
from .sparse import RandK, TopK

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "Compressor",
    "Internal",
    "LowRank",
    "NoCompression",
    "RandK",
    "Shapes",
    "Sign",
    "TopK",
    "build_compressor",
    "build_downlink",
    "build_received",
    "compressor",
    "names_of",
]
