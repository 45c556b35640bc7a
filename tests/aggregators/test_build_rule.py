"""Rules by their specs, alone and behind mixings."""

import re
from functools import partial
from typing import Any

import pytest
import torch

from fl_bgmd.aggregators import (
    RULES,
    Rule,
    block_geometric_median,
    bucketing,
    build_rule,
    centered_clipping,
    coordinate_median,
    geometric_median,
    krum,
    mean,
    multi_krum,
    nearest_neighbor_mixing,
    norm_clip,
    norm_threshold,
    spectral_filter,
    trimmed_mean,
)


def test_mixings_are_applied_in_their_order_and_weights_are_those_of_the_clients() -> None:
    rows = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    rule = build_rule(
        "gmd+nearest-neighbor+bucketing:2",
        byzantine_fraction=0.2,
        generator=torch.Generator().manual_seed(1),
    )
    mixed = nearest_neighbor_mixing(rows, byzantine_fraction=0.2)
    buckets = bucketing(mixed, bucket_size=2, generator=torch.Generator().manual_seed(1))
    before = rows.clone()
    result = rule(rows)
    assert torch.equal(rows, before)
    assert torch.equal(result.vector, geometric_median(buckets).vector)
    assert result.weights is not None
    assert result.weights.shape == (10,)
    torch.testing.assert_close(result.weights @ rows.double(), result.vector.double())
    other_way = build_rule("gmd+bucketing+nearest-neighbor", byzantine_fraction=0.2)
    assert other_way(rows).vector.shape == (7,)


def test_a_spec_reads_back_as_itself() -> None:
    for spec in (
        "bgmd:block-fraction=0.3,memory=mean+nearest-neighbor",
        "centered-clipping:radius=0.5,iterations=2",
        "gmd+bucketing:bucket-size=3",
        "mean",
    ):
        assert str(build_rule(spec)) == spec
    assert str(build_rule("multi-krum:3")) == "multi-krum:num-selected=3"
    assert str(build_rule("robust-filter:sigma0=none")) == "robust-filter"


@pytest.mark.parametrize("name", RULES)
def test_every_rule_continues_from_its_own_memory(name: str) -> None:
    """What comes back as a memory goes in again, and makes a difference if there is one."""
    rows, later = torch.randn(2, 9, 2000, generator=torch.Generator().manual_seed(2))
    rows[1] = rows[0]

    def built() -> Rule:
        return build_rule(name, generator=torch.Generator().manual_seed(3))

    first = built()(rows, root=rows[0])
    second = built()(later, first.memory, root=rows[0])
    assert second.vector.shape == (2000,)
    assert torch.isfinite(second.vector).all()
    remembers = built().rule.uses("memory")
    assert (first.memory is not None) == remembers
    assert torch.equal(second.vector, built()(later, root=rows[0]).vector) != remembers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gmdd", "rule is 'gmdd'; did you mean 'gmd'"),
        ("gmd+buckets", "mixing is 'buckets'; did you mean 'bucketing'"),
        ("gmd:tol=0", "tol is '0'; allowed: a number, above 0"),
        ("gmd:tol=1e-3,tol=1e-4", "each option once"),
        ("gmd:", "ends with a colon"),
        ("cmd:3", "cmd has no option"),
        ("bgmd:memori=mean", "bgmd has no option 'memori'; did you mean 'memory'"),
        ("bgmd:0.1,block-fraction=0.2", "block-fraction is given twice"),
        ("bgmd:memory=per-client+bucketing", "allowed: none, nearest-neighbor, "),
        ("norm-threshold:norms=reported+nearest-neighbor", "mixed rows have other norms"),
        ("nowhere:rule", "nowhere:rule cannot be imported"),
        ("math:pi", "it is a float; allowed: a function under @rule"),
    ],
)
def test_specs_that_are_refused(spec: str, message: str) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=re.escape(message)):
            build_rule(spec)


def test_shares_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"byzantine_fraction is 0.5; allowed: 0 to below 0.5"):
        build_rule("gmd", byzantine_fraction=0.5)
    with pytest.raises(ValueError, match=r"tol is given beside 'gmd:tol=1e-3'"):
        build_rule("gmd:tol=1e-3", tol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rule",
    [
        *(mean, geometric_median, coordinate_median, krum, multi_krum, norm_clip, spectral_filter),
        *(centered_clipping, partial(block_geometric_median, block_fraction=1.0)),
        *(partial(norm_threshold, drop_fraction=0.2), partial(trimmed_mean, trim_fraction=0.2)),
        partial(norm_threshold, drop_fraction=0.2, order=1),
    ],
)
def test_rows_with_gradients_are_taken_without(rule: Any, dtype: torch.dtype) -> None:
    rows = torch.randn(10, 7, dtype=dtype, requires_grad=True)
    vector = rule(rows).vector
    assert not vector.requires_grad
    assert torch.equal(vector, rule(rows.detach()).vector)
