"""Flower strategies that hold up when clients lie. Import them from ``fl_bgmd.strategies``."""

from .declared import options_of
from .errors import EmptyRoundsError, MissingNodesError, RowsError, RunEndedError
from .robust import RobustStrategy
from .rules import (
    BGMD,
    CMD,
    FLAME,
    GMD,
    QBGMD,
    Bulyan,
    CenteredClipping,
    DnC,
    FedBGMD,
    FLTrust,
    FoolsGold,
    GapFilter,
    Krum,
    Mean,
    MultiKrum,
    NormClipping,
    NormThreshold,
    RobustFilter,
    SignGuard,
    TrimmedMean,
)
from .settings import OWN_OPTIONS
from .step import Round
from .verdicts import RobustResult, Verdict, Verdicts

__all__ = [
    "BGMD",
    "CMD",
    "FLAME",
    "GMD",
    "OWN_OPTIONS",
    "QBGMD",
    "Bulyan",
    "CenteredClipping",
    "DnC",
    "EmptyRoundsError",
    "FLTrust",
    "FedBGMD",
    "FoolsGold",
    "GapFilter",
    "Krum",
    "Mean",
    "MissingNodesError",
    "MultiKrum",
    "NormClipping",
    "NormThreshold",
    "RobustFilter",
    "RobustResult",
    "RobustStrategy",
    "Round",
    "RowsError",
    "RunEndedError",
    "SignGuard",
    "TrimmedMean",
    "Verdict",
    "Verdicts",
    "options_of",
]
