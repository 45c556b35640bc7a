"""Models: the published sizes, shapes in and out, and what is refused."""

import pytest
import torch
from torch import nn

from fl_bgmd.models import IMAGE_MODELS, MODELS, build

NATURAL = {
    "lenet": (1, 28, 28),
    "tiny-cnn": (1, 28, 28),
    "mlp": (1, 28, 28),
    "small-mlp": (1, 28, 28),
    "resnet18": (3, 32, 32),
    "small-cnn": (3, 32, 32),
    "linear": (784,),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 64*(25+1) + 64*(64*25+1) + 1024*(64*4*4+1) + 10*(1024+1)
        ("lenet", 1_163_978),
        # 3*(9+1) + 3 * 3*(27+1) + 10*(12+1)
        ("tiny-cnn", 412),
        # 1000*(784+1) + 10*(1000+1)
        ("mlp", 795_010),
        # 128*(784+1) + 10*(128+1)
        ("small-mlp", 101_770),
        ("resnet18", 11_173_962),
        # 32*(27+1) + 64*(288+1) + 64*(576+1) + 10*(1024+1)
        ("small-cnn", 111_378),
        # 784 * 10, no bias
        ("linear", 7_840),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(build(name)) == parameters


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_both_image_shapes_and_any_number_of_classes(
    name: str, shape: tuple[int, int, int]
) -> None:
    model = build(name, input_shape=shape, num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_default_shape_and_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    output = model(torch.randn(4, *NATURAL[name]))
    assert output.shape == (4, 10)
    assert output.dtype == torch.float32
    nn.functional.cross_entropy(output, torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_linear_is_a_regression_without_bias() -> None:
    model = build("linear", input_shape=(5,), num_classes=1)
    (weight,) = model.parameters()
    rows = torch.randn(3, 5)
    torch.testing.assert_close(model(rows), rows @ weight.T)


def test_resnet18_keeps_a_small_image_large_through_its_stem() -> None:
    model = build("resnet18")
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    assert stem(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", [name for name in IMAGE_MODELS if name != "resnet18"])
def test_only_resnet18_has_buffers(name: str) -> None:
    assert list(build(name).buffers()) == []


@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_build_equal_models(name: str) -> None:
    torch.manual_seed(3)
    first = build(name).state_dict()
    torch.manual_seed(3)
    second = build(name).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name must be one of lenet, .*linear, got 'vgg'"):
        build("vgg")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet", (784,)),
        ("lenet", (1, 8, 28)),
        ("small-cnn", (3, 32, 15)),
        ("mlp", (0, 28, 28)),
        ("linear", (1, 28, 28)),
    ],
)
def test_unsuitable_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"input_shape of '{name}' must be .*got \("):
        build(name, input_shape=shape)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build("mlp", num_classes=0)


@pytest.mark.parametrize(
    ("name", "side"), [("lenet", 16), ("small-cnn", 16), ("tiny-cnn", 1), ("resnet18", 1)]
)
def test_smallest_allowed_side_works(name: str, side: int) -> None:
    model = build(name, input_shape=(1, side, side)).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, side, side)).shape == (2, 10)
