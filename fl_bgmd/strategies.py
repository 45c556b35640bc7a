"""Re-exports ``strategies/`` in the source tree; in the wheel that folder takes this place."""

import sys

from strategies import (
    BGMD,
    CMD,
    GMD,
    QBGMD,
    CenteredClipping,
    EmptyRoundsError,
    FedBGMD,
    Krum,
    Mean,
    MissingNodesError,
    MultiKrum,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    Round,
    RunEndedError,
    TrimmedMean,
    legacy,
    resolve_device,
)

# As os does for os.path: `from fl_bgmd.strategies.legacy import BGMD` finds the one module, here
# where this is no package.
sys.modules[f"{__name__}.legacy"] = legacy

__all__ = [
    "BGMD",
    "CMD",
    "GMD",
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
    "resolve_device",
]
