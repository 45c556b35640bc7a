"""Flower strategies that hold up when clients lie. Import them from ``fl_bgmd.strategies``."""

from .bgmd import BGMD, QBGMD, FedBGMD
from .checks import resolve_device
from .clipping import CenteredClipping
from .cmd import CMD, TrimmedMean
from .gmd import GMD
from .intake import Round
from .krum import Krum, MultiKrum
from .mean import Mean
from .norm_threshold import NORMS, NormThreshold
from .robust import MIXINGS, WEIGHTINGS, RobustStrategy
from .robust_filter import RobustFilter
from .roster import TOO_FEW_NODES
from .rounds import EmptyRoundsError, MissingNodesError, RunEndedError

__all__ = [
    "BGMD",
    "CMD",
    "GMD",
    "MIXINGS",
    "NORMS",
    "QBGMD",
    "TOO_FEW_NODES",
    "WEIGHTINGS",
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
    "resolve_device",
]
