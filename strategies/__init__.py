"""Flower strategies that hold up when clients lie. Import them from ``fl_bgmd.strategies``."""

from .declared import options_of
from .errors import EmptyRoundsError, MissingNodesError, RunEndedError
from .robust import RobustStrategy
from .rules import (
    BGMD,
    CMD,
    GMD,
    QBGMD,
    CenteredClipping,
    FedBGMD,
    Krum,
    Mean,
    MultiKrum,
    NormThreshold,
    RobustFilter,
    TrimmedMean,
)
from .settings import OWN_OPTIONS
from .step import Round

__all__ = [
    "BGMD",
    "CMD",
    "GMD",
    "OWN_OPTIONS",
    "QBGMD",
    "CenteredClipping",
    "EmptyRoundsError",
    "FedBGMD",
    "Krum",
    "Mean",
    "MissingNodesError",
    "MultiKrum",
    "NormThreshold",
    "RobustFilter",
    "RobustStrategy",
    "Round",
    "RunEndedError",
    "TrimmedMean",
    "options_of",
]
