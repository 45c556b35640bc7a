"""Re-exports ``strategies/`` in the source tree; in the wheel that folder takes this place."""

from strategies import (
    BGMD,
    CMD,
    GMD,
    MIXINGS,
    WEIGHTINGS,
    CenteredClipping,
    Krum,
    Mean,
    MultiKrum,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    TrimmedMean,
    resolve_device,
)

__all__ = [
    "BGMD",
    "CMD",
    "GMD",
    "MIXINGS",
    "WEIGHTINGS",
    "CenteredClipping",
    "Krum",
    "Mean",
    "MultiKrum",
    "NormThreshold",
    "RobustFilter",
    "RobustStrategy",
    "TrimmedMean",
    "resolve_device",
]
