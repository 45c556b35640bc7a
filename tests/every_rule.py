"""Every rule of the registry as a function of rows, for tests of what holds for all of them."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fl_bgmd.aggregators import RULES


def public(name: str) -> Callable[..., Any]:
    """Return the function that was declared as a rule, which checks its options."""
    declared = RULES[name].function
    found: Callable[..., Any] = vars(sys.modules[declared.__module__])[declared.__name__]
    return found


def call(name: str, rows: Tensor, **inputs: Any) -> Any:
    """Call the function of a rule with rows, and with those of the inputs that it takes.

    Unless they are given, its generator is seeded and a root that it cannot be without is the
    last row.
    """
    kind = RULES[name]
    inputs.setdefault("generator", torch.Generator().manual_seed(3))
    if kind.needs_root:
        inputs.setdefault("root", rows[-1])
    taken = {kind.takes[key]: value for key, value in inputs.items() if key in kind.takes}
    return public(name)(rows, **taken)
