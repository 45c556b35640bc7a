"""Compressors: what they keep, how many bytes they take, and that bad bytes are refused."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_bgmd.compression import (
    COMPRESSORS,
    QSGD,
    Compressor,
    LowRank,
    NoCompression,
    RandK,
    Sign,
    TopK,
    build_compressor,
)
from fl_bgmd.compression.bits import (
    indices_size,
    pack_indices,
    pack_planes,
    planes_size,
    unpack_indices,
    unpack_planes,
)

ALL: list[Compressor] = [
    NoCompression(),
    TopK(0.1),
    TopK(1.0),
    TopK(0.001),
    RandK(0.1),
    RandK(0.25, scaled=True),
    RandK(0.1, seed=5),
    QSGD(1),
    QSGD(16),
    QSGD(1000),
    QSGD(4, bucket=0),
    QSGD(4, bucket=8),
    Sign(),
    Sign(scaled=False),
    LowRank(1),
]
IDS = [repr(c) for c in ALL]


def vectors() -> st.SearchStrategy[Tensor]:
    values = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
    return st.lists(values, min_size=1, max_size=70).map(
        lambda v: torch.tensor(v, dtype=torch.float32)
    )


def through(compressor: Compressor, vector: Tensor) -> Tensor:
    return compressor.decode(compressor.encode(vector), len(vector))


# ------------------------------------------------------------------------------- bits


@given(data=st.data(), bits=st.integers(0, 17))
def test_planes_come_back(data: st.DataObject, bits: int) -> None:
    values = np.array(
        data.draw(st.lists(st.integers(0, max(0, 2**bits - 1)), max_size=40)), dtype=np.uint32
    )
    packed = pack_planes(values, bits)
    assert len(packed) == planes_size(len(values), bits)
    assert unpack_planes(packed, len(values), bits).tolist() == values.tolist()


@given(data=st.data(), size=st.integers(1, 500))
def test_indices_come_back(data: st.DataObject, size: int) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    indices = np.array(chosen, dtype=np.int64)
    packed = pack_indices(indices, size)
    assert len(packed) == indices_size(len(indices), size)
    assert unpack_indices(packed, len(indices), size).tolist() == chosen


def test_indices_are_close_to_the_fewest_bits() -> None:
    size, count = 11_173_962, 111_740
    bound = (
        math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    ) / math.log(2)
    assert 8 * indices_size(count, size) < 1.08 * bound


@given(data=st.binary(min_size=5, max_size=5))
def test_bytes_that_are_no_indices_are_refused_or_are_indices(data: bytes) -> None:
    size, count = 40, 8
    assert indices_size(count, size) == 5
    try:
        found = unpack_indices(np.frombuffer(data, np.uint8), count, size)
    except ValueError:
        return
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < size


# -------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("compressor", ALL, ids=IDS)
@given(vector=vectors())
@settings(max_examples=40, deadline=None)
def test_messages_have_the_length_they_declare_and_come_back_finite(
    compressor: Compressor, vector: Tensor
) -> None:
    kept = vector.clone()
    message = compressor.encode(vector)
    assert torch.equal(vector, kept)
    assert len(message) == compressor.num_bytes(len(vector))
    result = compressor.decode(message, len(vector))
    assert (result.shape, result.dtype) == (vector.shape, torch.float32)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("compressor", ALL, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zeros_stay_zeros(compressor: Compressor, dtype: torch.dtype) -> None:
    result = through(compressor, torch.zeros(33, dtype=dtype))
    if compressor != Sign(scaled=False):
        assert torch.equal(result, torch.zeros(33))


def laws(d: int) -> dict[str, Tensor]:
    """Return vectors of different kinds: dense, heavy-tailed, one spike, equal."""
    draw = torch.Generator().manual_seed(d)
    spike = torch.zeros(d)
    spike[d // 3] = -7.0
    return {
        "normal": torch.randn(d, generator=draw),
        "heavy": torch.randn(d, generator=draw) ** 5,
        "spike": spike,
        "equal": torch.full((d,), 0.3),
    }


@pytest.mark.parametrize("law", ["normal", "heavy", "spike", "equal"])
@pytest.mark.parametrize("d", [50, 1000])
@pytest.mark.parametrize("compressor", ALL, ids=IDS)
def test_what_is_lost_is_within_the_stated_bound(compressor: Compressor, d: int, law: str) -> None:
    vector = laws(d)[law].double()
    torch.manual_seed(0)
    trials = 400 if isinstance(compressor, RandK | QSGD) else 1
    if isinstance(compressor, RandK) and compressor.seed is not None:
        # The randomness is the server's: a new seed in each round.
        seeds: list[Compressor] = [RandK(0.1, seed=seed) for seed in range(trials)]
    else:
        seeds = [compressor] * trials
    lost = np.array(
        [float((through(c, vector).double() - vector).square().sum()) for c in seeds]
    ) / float(vector.square().sum())
    allowed = 1 - compressor.delta(d)
    if compressor == Sign(scaled=False):
        assert compressor.delta(d) == 0.0
        return
    if isinstance(compressor, QSGD):
        allowed = compressor.variance(d)
        assert compressor.delta(d) == max(0.0, 1 - allowed)
    if isinstance(compressor, RandK) and compressor.scaled:
        allowed = d / round(compressor.fraction * d) - 1
    error = lost.std() / math.sqrt(trials)
    assert lost.mean() <= allowed + 5 * error + 1e-6


@pytest.mark.parametrize("compressor", [QSGD(4), QSGD(100), RandK(0.25, scaled=True)])
def test_unbiased_ones_are_unbiased(compressor: Compressor) -> None:
    vector = laws(40)["normal"]
    torch.manual_seed(1)
    sent = torch.stack([through(compressor, vector) for _ in range(4000)]).double()
    error = sent.std(0) / math.sqrt(len(sent))
    assert ((sent.mean(0) - vector).abs() <= 5 * error + 1e-6).all()


# -------------------------------------------------------------------------------- by hand


def test_top_k_keeps_the_largest() -> None:
    result = through(TopK(0.5), torch.tensor([1.0, -5.0, 0.1, 3.0]))
    assert result.tolist() == [0.0, -5.0, 0.0, 3.0]


def test_l1_sign_is_the_mean_magnitude_with_the_signs() -> None:
    result = through(Sign(), torch.tensor([1.0, -5.0, 0.0, 2.0]))
    assert result.tolist() == [2.0, -2.0, 2.0, 2.0]


def test_plain_sign_takes_a_bit_a_value() -> None:
    assert Sign(scaled=False).num_bytes(80) == 10
    assert Sign().num_bytes(80) == 14
    assert through(Sign(scaled=False), torch.tensor([3.0, -2.0])).tolist() == [1.0, -1.0]


def test_server_chosen_coordinates_do_not_travel() -> None:
    compressor = RandK(0.1, seed=9)
    assert compressor.num_bytes(1000) == 400
    result = through(compressor, torch.arange(1.0, 1001.0))
    chosen = compressor.coordinates(1000)
    assert chosen is not None
    assert np.flatnonzero(result.numpy()).tolist() == chosen.tolist()


def test_values_beyond_float32_arrive_at_its_ends() -> None:
    vector = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    for compressor in (NoCompression(), TopK(1.0), RandK(1.0), QSGD(4), Sign()):
        assert torch.isfinite(through(compressor, vector)).all()


def test_bytes_at_the_size_of_resnet18() -> None:
    d = 11_173_962
    assert NoCompression().num_bytes(d) == 4 * d
    assert Sign().num_bytes(d) < d / 8 + 5
    assert QSGD(1, bucket=0).num_bytes(d) < d / 4 + 6
    assert QSGD(63).num_bytes(d) < d * (7 / 8 + 4 / 512) + 12
    assert TopK(0.01).num_bytes(d) < 0.01 * d * (4 + 8.7 / 8) + 8


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_low_rank_is_the_best_approximation_of_each_layer(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=draw)
    bias = torch.randn(5, generator=draw)
    vector = torch.cat((matrix.flatten(), bias))
    compressor = LowRank(rank).for_shapes(((rows, columns), (5,)))
    result = through(compressor, vector)
    assert len(compressor.encode(vector)) == compressor.num_bytes(len(vector))
    torch.testing.assert_close(result[-5:], bias)
    left, values, right = np.linalg.svd(matrix.numpy().astype(float), full_matrices=False)
    best = matrix.numpy()
    if rank * (rows + columns) < rows * columns:
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(result[:-5].view(rows, columns).numpy(), best, atol=1e-4)
    lost = float((result - vector).square().sum() / vector.square().sum())
    assert lost <= 1 - compressor.delta(len(vector)) + 1e-6


def test_low_rank_refuses_shapes_of_another_size() -> None:
    with pytest.raises(ValueError, match="shapes hold another number of values than 7"):
        LowRank(1).for_shapes(((2, 3),)).encode(torch.zeros(7))


# -------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("compressor", ALL, ids=IDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_decode_to_finite_values_or_are_refused(
    compressor: Compressor, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 60))
    right = compressor.num_bytes(size)
    length = data.draw(st.one_of(st.just(right), st.integers(0, 2 * right)))
    message = data.draw(st.binary(min_size=length, max_size=length))
    try:
        result = compressor.decode(message, size)
    except ValueError:
        return
    assert length == right
    assert result.shape == (size,)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("compressor", ALL, ids=IDS)
@pytest.mark.parametrize(
    "change", [lambda m: m[:-1], lambda m: m + b"\0", lambda m: b"", lambda m: m * 1000]
)
def test_another_length_is_refused(
    compressor: Compressor, change: Callable[[bytes], bytes]
) -> None:
    message = compressor.encode(torch.randn(100))
    with pytest.raises(ValueError, match=r"bytes of .*; expected"):
        compressor.decode(change(message), 100)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_and_norms_that_are_no_numbers_are_refused(value: float) -> None:
    bad = np.array([value], "<f4").tobytes()
    for compressor in (QSGD(4), Sign(), TopK(0.1), NoCompression()):
        message = compressor.encode(torch.randn(100))
        with pytest.raises(ValueError, match=r"allowed: finite|NaN or infinite|a norm is"):
            compressor.decode(bad + message[4:], 100)


def test_levels_beyond_the_last_are_refused() -> None:
    message = QSGD(16).encode(torch.randn(100))
    with pytest.raises(ValueError, match="beyond the 16"):
        QSGD(16).decode(message[:4] + b"\xff" * (len(message) - 4), 100)


def test_qsgd_rounds_to_the_levels_of_its_bucket() -> None:
    # Norms 5 and 13; levels are fifths of these, and these values lie on them.
    vector = torch.tensor([3.0, 4.0, -13.0, 0.0])
    assert through(QSGD(5, bucket=2), vector).tolist() == pytest.approx(vector.tolist(), abs=1e-6)
    assert QSGD(10, bucket=0).variance(400) == pytest.approx(2.0)
    assert QSGD(50, bucket=0).variance(400) == pytest.approx(0.16)


# ------------------------------------------------------------------------------ building


@pytest.mark.parametrize("name", COMPRESSORS)
def test_names_build_what_bears_them(name: str) -> None:
    compressor = build_compressor(name)
    assert build_compressor(compressor.name) == compressor
    assert compressor.name.partition(":")[0] == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qsgd:levels=15,bucket=0", QSGD(15, bucket=0)),
        ("qsgd:15,bucket=0", QSGD(15, bucket=0)),
        ("qsgd:bucket=8", QSGD(bucket=8)),
        ("top-k:fraction=0.01", TopK(0.01)),
        ("scaled-rand-k:0.5", RandK(0.5, scaled=True)),
        ("l1-sign", Sign()),
        ("sign", Sign(scaled=False)),
        ("low-rank:rank=3", LowRank(3)),
    ],
)
def test_every_option_is_within_reach(text: str, expected: Compressor) -> None:
    assert build_compressor(text) == expected
    assert build_compressor(expected.name) == expected


@pytest.mark.parametrize(
    ("compressor", "name"),
    [
        (NoCompression(), "none"),
        (TopK(), "top-k:0.1"),
        (RandK(1 / 3), f"rand-k:{1 / 3!r}"),
        (RandK(0.25, scaled=True, seed=4), "scaled-rand-k:0.25"),
        (QSGD(), "qsgd:63"),
        (QSGD(15, bucket=0), "qsgd:15,bucket=0"),
        (Sign(), "l1-sign"),
        (Sign(scaled=False), "sign"),
        (LowRank(shapes=((2, 3),)), "low-rank:2"),
    ],
)
def test_the_name_says_what_differs_from_the_defaults(compressor: Compressor, name: str) -> None:
    assert compressor.name == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "fraction is 0; allowed: above 0 to 1"),
        (lambda: RandK(1.5), "fraction is 1.5; allowed: above 0 to 1"),
        (lambda: QSGD(2**15), "levels is 32768; allowed: a whole number, 1 to 32767"),
        (lambda: QSGD(bucket=-1), "bucket is -1"),
        (lambda: LowRank(0), "rank is 0"),
    ],
)
def test_classes_check_their_options(make: Callable[[], Compressor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zip", "compressor is 'zip'.*; allowed: none, .*top-k.*, or package.module:NAME"),
        ("sign:3", "compressor is 'sign:3': sign has no option"),
        ("top-k:0", "fraction is '0'; allowed: a number, above 0 to 1"),
        ("top-k:x", "compressor is 'top-k:x'"),
        ("qsgd:1.5", "allowed: a whole number"),
        ("qsgd:0", "levels is '0'; allowed: a whole number, 1 to 32767"),
        ("qsgd:inf", "compressor is 'qsgd:inf'"),
        ("qsgd:bucket=-1", "bucket is '-1'; allowed: a whole number, 0 or more"),
        ("qsgd:levles=3", "qsgd has no option 'levles'; did you mean 'levels'"),
        ("rand-k:nan", "fraction is 'nan'"),
        ("rand-k:seed=3", "rand-k has no option 'seed'"),
        ("rand-k:scaled=on", "rand-k has no option 'scaled'"),
        ("low-rank:0", "rank is '0'; allowed: a whole number, 1 or more"),
        ("low-rank:2,shapes=3", "low-rank has no option 'shapes'"),
        (
            "fl_bgmd.compression:Compressor",
            "it is a Compressor; allowed: a class under @compressor",
        ),
        ("fl_bgmd.compression:RandK", "allowed: one of rand-k, scaled-rand-k"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_compressor(name)
