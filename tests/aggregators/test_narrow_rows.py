"""Rows of half the width: rules widen them as they read, to the bits of rows that were widened."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fl_bgmd.aggregators import MIXINGS, RULES, build_rule

SPECS = [
    *RULES,
    *(f"gmd+{mixing}" for mixing in MIXINGS),
    "bgmd:memory=per-client",
    "bgmd:memory=mean",
    "cmd+clipping+median-clipping+nearest-neighbor",
]


def bits(value: Any) -> Any:
    """Return a memory, whatever it is, as what can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    return {k: bits(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_reads_them_as_float32(spec: str, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    memories: list[Any] = [None, None]
    lasts: list[Any] = [None, None]
    for number in range(2):
        rows = torch.randn(11, 3000, generator=drawn).to(dtype)
        rows[:3] *= 50
        found = []
        for i, updates in enumerate((rows.clone(), rows.float())):
            rule = build_rule(spec, generator=torch.Generator().manual_seed(number))
            nodes = [(node + number) % 12 for node in range(11)]
            root, last = rows[5].float(), lasts[i]
            found.append(
                rule(updates, memories[i], nodes=nodes, root=root, last=last, overwrite=True)
            )
            memories[i], lasts[i] = found[-1].memory, found[-1].vector
        narrow, wide = found
        assert bits(narrow.vector) == bits(wide.vector)
        assert bits(narrow.weights) == bits(wide.weights)
        assert bits(narrow.memory) == bits(wide.memory)
