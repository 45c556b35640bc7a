"""Models of the papers' experiments, and smaller ones for a laptop.

A model is built by its name, with the initial weights that torch draws from its global generator:
``torch.manual_seed`` before :func:`build` fixes them. All take float32 (B, C, H, W), or (B, d) for
``linear``, and return (B, num_classes) without softmax.
"""

import importlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fl_bgmd.extras import require

__all__ = ["IMAGE_MODELS", "MODELS", "build"]

Shape = tuple[int, ...]


def build(name: str, *, input_shape: Shape | None = None, num_classes: int = 10) -> nn.Module:
    """Build a model with fresh weights, in training mode.

    ============  ==========  ======================================================
    name          parameters  layers
    ============  ==========  ======================================================
    lenet          1,163,978  2 convolutions 5x5 of 64, 1024 units, dropout 0.5
    tiny-cnn             412  4 convolutions 3x3 of 3, stride 2, GELU
    mlp              795,010  1000 units, ReLU
    small-mlp        101,770  128 units, ReLU
    resnet18      11,173,962  torchvision's, 3x3 stride-1 stem, no max-pool
    small-cnn        111,378  2 convolutions 5x5 of 16 and 32, 120 units
    linear             7,840  linear regression without bias
    ============  ==========  ======================================================

    Parameters
    ----------
    name
        One of :data:`MODELS`. The counts above are for 10 classes and the default shapes.
    input_shape
        (channels, height, width), or (d,) for ``linear``. None means (1, 28, 28) for ``lenet``,
        ``tiny-cnn``, ``mlp`` and ``small-mlp``, (3, 32, 32) for ``resnet18`` and ``small-cnn``,
        and (784,) for ``linear``.
    num_classes
        Number of outputs, at least 1.

    Returns
    -------
    nn.Module
        Maps float32 (B, *input_shape) to float32 (B, num_classes).

    Raises
    ------
    ValueError
        If the name is not known, or the shape or number of classes does not suit the model.

    Notes
    -----
    The BGMD paper trains a LeNet of 1.16 M parameters on Fashion-MNIST and a ResNet of 11.2 M on
    CIFAR-10; ``linear`` is the regression of Ghosh et al. ``small-cnn`` is this project's own, for
    CIFAR-10 on two CPU cores, and so is ``small-mlp``, for MNIST many times over.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    natural, smallest, builder = _BUILDERS[name]
    shape = natural if input_shape is None else tuple(input_shape)
    if len(shape) != len(natural) or shape[0] < 1 or any(side < smallest for side in shape[1:]):
        allowed = "(d,)" if len(natural) == 1 else f"(channels, height, width) from {smallest} up"
        raise ValueError(f"input_shape of {name!r} must be {allowed}, got {shape}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return builder(shape, num_classes)


class _Convolution(nn.Conv2d):
    """A convolution that computes with channels last on a CPU, in two thirds of the time.

    The weights lie as ever: they are what is sent. That they are turned here makes torch keep the
    images so from one layer to the next, also those of one channel, of which it could not tell.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.device.type == "cpu":
            weight = weight.to(memory_format=torch.channels_last)
        output: Tensor = super()._conv_forward(input, weight, bias)
        return output


def _two_convolutions(
    shape: Shape, num_classes: int, filters: tuple[int, int], hidden: int, dropout: float
) -> nn.Module:
    """LeCun's layout: twice (5x5 convolution, max-pool, ReLU), then one hidden layer."""
    channels, height, width = shape
    # Each 5x5 convolution takes 4 pixels off a side, each pool halves what is left.
    height, width = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        _Convolution(channels, filters[0], 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        _Convolution(filters[0], filters[1], 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(filters[1] * height * width, hidden),
        nn.ReLU(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Linear(hidden, num_classes),
    )


def _lenet(shape: Shape, num_classes: int) -> nn.Module:
    return _two_convolutions(shape, num_classes, (64, 64), 1024, 0.5)


def _tiny_cnn(shape: Shape, num_classes: int) -> nn.Module:
    channels, height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, 3, 3, 3, 3)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * height * width, num_classes))


def _mlp(shape: Shape, num_classes: int, hidden: int = 1000) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def _resnet18(shape: Shape, num_classes: int) -> nn.Module:
    # Imported here because it takes a second, which the other models need not pay.
    require("torchvision", "the model resnet18", "vision")
    models = importlib.import_module("torchvision.models")
    model = cast(nn.Module, models.resnet18(weights=None, num_classes=num_classes))
    # The stem for 224x224 would leave 8x8 of a 32x32 image before the first block.
    stem = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model


def _small_cnn(shape: Shape, num_classes: int) -> nn.Module:
    return _two_convolutions(shape, num_classes, (16, 32), 120, 0.0)


def _linear(shape: Shape, num_classes: int) -> nn.Module:
    return nn.Linear(shape[0], num_classes, bias=False)


# For each model: its natural input shape, the smallest side it can take, and its builder.
_BUILDERS: dict[str, tuple[Shape, int, Callable[[Shape, int], nn.Module]]] = {
    "lenet": ((1, 28, 28), 16, _lenet),
    "tiny-cnn": ((1, 28, 28), 1, _tiny_cnn),
    "mlp": ((1, 28, 28), 1, _mlp),
    "small-mlp": ((1, 28, 28), 1, partial(_mlp, hidden=128)),
    "resnet18": ((3, 32, 32), 1, _resnet18),
    "small-cnn": ((3, 32, 32), 16, _small_cnn),
    "linear": ((784,), 1, _linear),
}

MODELS: tuple[str, ...] = tuple(_BUILDERS)
"""Names that :func:`build` knows."""

IMAGE_MODELS: tuple[str, ...] = tuple(
    name for name, (shape, _, _) in _BUILDERS.items() if len(shape) == 3
)
"""Those that take images, (channels, height, width)."""
