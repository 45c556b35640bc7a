"""The options of all strategies: what is refused, with name, value and what is allowed."""

import math
import re
from typing import Any

import pytest

from fl_bgmd.strategies import (
    BGMD,
    GMD,
    CenteredClipping,
    Mean,
    MultiKrum,
    NormThreshold,
    RobustFilter,
    RobustStrategy,
    TrimmedMean,
)


@pytest.mark.parametrize(
    ("cls", "argument", "value", "allowed"),
    [
        (Mean, "server_learning_rate", 0.0, "above 0"),
        (Mean, "server_learning_rate", -1.0, "above 0"),
        (Mean, "server_learning_rate", math.nan, "above 0"),
        (Mean, "server_learning_rate", math.inf, "above 0"),
        (Mean, "server_momentum", 1.0, "0 to below 1"),
        (Mean, "server_momentum", -0.1, "0 to below 1"),
        (Mean, "server_momentum", math.nan, "0 to below 1"),
        (GMD, "mixing", "nnm", "nearest-neighbor, bucketing"),
        (GMD, "byzantine_fraction", 0.5, "0 to below 0.5"),
        (GMD, "byzantine_fraction", -0.1, "0 to below 0.5"),
        (GMD, "byzantine_fraction", math.nan, "0 to below 0.5"),
        (GMD, "weighting", "size", "uniform, examples"),
        (GMD, "min_valid_replies", 0, "a whole number, 1 or more"),
        (GMD, "seed", -1, "None, or 0 to below 2^63"),
        (GMD, "seed", 2**63, "None, or 0 to below 2^63"),
        (GMD, "device", "tpu", "auto, cpu, cuda"),
        (GMD, "device", "meta", "auto, cpu, cuda"),
        (GMD, "tol", 0.0, "above 0"),
        (GMD, "tol", math.nan, "above 0"),
        (GMD, "solver", "secant", "gram, newton, weiszfeld"),
        (BGMD, "block_fraction", 0.0, "above 0 to 1"),
        (BGMD, "block_fraction", 1.1, "above 0 to 1"),
        (BGMD, "min_block_size", 0, "a whole number, 1 or more"),
        (BGMD, "block_fraction", math.nan, "above 0 to 1"),
        (BGMD, "selection", "first", "sample, top-k, uniform"),
        (BGMD, "score", "variance", "clipped, squared-norm, norm"),
        (BGMD, "memory", "median", "robust, mean, per-client, none"),
        (BGMD, "tol", -1.0, "above 0"),
        (TrimmedMean, "trim_fraction", 0.5, "0 to below 0.5"),
        (TrimmedMean, "trim_fraction", -0.1, "0 to below 0.5"),
        (NormThreshold, "drop_fraction", 1.0, "0 to below 1"),
        (NormThreshold, "drop_fraction", -0.1, "0 to below 1"),
        (NormThreshold, "order", 0.5, "1 or more"),
        (RobustFilter, "sigma0", 0.0, "above 0"),
        (RobustFilter, "method", "median", "mean"),
        (MultiKrum, "num_selected", 0, "a whole number, 1 or more"),
        (CenteredClipping, "radius", 0.0, "above 0"),
        (CenteredClipping, "iterations", 0, "a whole number, 1 or more"),
    ],
)
def test_invalid_values_are_refused_with_name_value_and_what_is_allowed(
    cls: type[RobustStrategy], argument: str, value: Any, allowed: str
) -> None:
    expected = f"^{re.escape(argument)} is {re.escape(repr(value))}; allowed: {re.escape(allowed)}"
    with pytest.raises(ValueError, match=expected):
        cls(**{argument: value})


def test_per_client_memory_and_bucketing_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="mixing is 'bucketing' with bgmd:memory=per-client; all"):
        BGMD(memory="per-client", mixing="bucketing")
    with pytest.raises(ValueError, match="bucket-size is '0'; allowed: a whole number, 1 or more"):
        GMD(mixing="bucketing:0")
