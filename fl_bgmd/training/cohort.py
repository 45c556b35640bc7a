"""A model that takes the batches of many clients at once and keeps their gradients apart.

One forward and one backward pass serve the whole cohort; what differs is the last product of each
layer, the gradient of its weights, which every client's examples make alone. So private-training
libraries compute the gradients of single examples; here they are those of single clients. Between
the layers a model must treat every example alone, as all of :mod:`fl_bgmd.models` do.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""(m, ...) by the names of parameters or buffers: those of m clients."""


@dataclass(frozen=True, eq=False)
class Combined:
    """Where each client's ``beta * parameter + alpha * gradient`` goes, layer by layer.

    As a matrix product does it on the way: a step of SGD takes no pass over the weights of its own.

    Attributes
    ----------
    alpha, beta : float
        1 and 0 for the gradients themselves.
    found : dict of Tensor
        (m, ...) by the names of parameters.
    """

    alpha: float = 1.0
    beta: float = 0.0
    found: State = field(default_factory=dict)

    def put(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Take in a parameter's gradients, (m, ...), which are used up."""
        combined = gradient if self.alpha == 1 else gradient.mul_(self.alpha)
        self.found[name] = combined.add_(parameter, alpha=self.beta) if self.beta else combined

    def put_product(self, name: str, parameter: Tensor, outer: Tensor, inputs: Tensor) -> None:
        """Take in a matrix's gradients, the products of (m, k, rows) and (m, k, columns)."""
        into = self.found[name] = parameter.new_empty(len(outer), *parameter.shape)
        for one, left, right in zip(into, outer, inputs, strict=True):  # in the cache
            torch.addmm(parameter, left.t(), right, beta=self.beta, alpha=self.alpha, out=one)


_ALONE = (
    nn.ReLU, nn.GELU, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
)  # fmt: skip
"""Layers without parameters that treat every example alone."""


class _Layer(nn.Module):
    """A layer whose backward pass puts each client's gradients into :attr:`combined`."""

    def __init__(self, inner: Any, prefix: str, count: int, combined: Combined) -> None:
        super().__init__()
        self.inner, self.prefix, self.count, self.combined = inner, prefix, count, combined

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to (m b, ...)."""
        output: Tensor = _Apart.apply(inputs, self.inner.weight, self.inner.bias, self)
        return output

    def apply_to(self, inputs: Tensor) -> Tensor:
        """Return what the layer makes of its inputs."""
        raise NotImplementedError

    def back(self, inputs: Tensor, outer: Tensor, wanted: bool) -> Tensor | None:
        """Keep the weights' gradients; return the inputs' where they are wanted."""
        raise NotImplementedError


class _Apart(torch.autograd.Function):
    """A layer's function, whose weights have no gradient but those that the layer keeps."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Any:
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        return layer.apply_to(inputs)

    @staticmethod
    def backward(ctx: Any, outer: Any) -> Any:
        [inputs] = ctx.saved_tensors
        return ctx.layer.back(inputs, outer, ctx.needs_input_grad[0]), None, None, None


class _Linear(_Layer):
    """``nn.Linear``."""

    def apply_to(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.inner.weight, self.inner.bias)

    def back(self, inputs: Tensor, outer: Tensor, wanted: bool) -> Tensor | None:
        left, right = (part.reshape(self.count, -1, part.shape[-1]) for part in (outer, inputs))
        self.combined.put_product(f"{self.prefix}weight", self.inner.weight, left, right)
        if self.inner.bias is not None:
            self.combined.put(f"{self.prefix}bias", self.inner.bias, left.sum(1))
        return outer @ self.inner.weight if wanted else None


class _Convolution(_Layer):
    """``nn.Conv2d`` that pads with zeros."""

    def apply_to(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.inner._conv_forward(inputs, self.inner.weight, self.inner.bias)
        return output

    def back(self, inputs: Tensor, outer: Tensor, wanted: bool) -> Tensor | None:
        biased = self.inner.bias is not None
        found = [
            self._backward(x, g, [False, True, biased])[1:]
            for x, g in zip(inputs.chunk(self.count), outer.chunk(self.count), strict=True)
        ]
        weight, bias = zip(*found, strict=True)
        self.combined.put(f"{self.prefix}weight", self.inner.weight, torch.stack(weight))
        if biased:
            self.combined.put(f"{self.prefix}bias", self.inner.bias, torch.stack(bias))
        return self._backward(inputs, outer, [True, False, False])[0] if wanted else None

    def _backward(self, inputs: Tensor, outer: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        own, sizes = self.inner, [self.inner.out_channels]
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            outer, inputs, own.weight, sizes, own.stride, own.padding, own.dilation,
            False, [0, 0], own.groups, wanted,
        )  # fmt: skip
        return found


class _BatchNorm(nn.Module):
    """``nn.BatchNorm2d`` with statistics, and running ones, of each client's own."""

    def __init__(self, inner: nn.BatchNorm2d, prefix: str, count: int, combined: Combined) -> None:
        super().__init__()
        self.inner, self.count = inner, count
        self.own = {
            key: value.detach().repeat(count, *[1] * value.dim()).requires_grad_()
            for key, value in inner.named_parameters()
        }
        for key, value in self.own.items():
            shared = getattr(inner, key)
            value.register_hook(partial(_put, combined, f"{prefix}{key}", shared))  # type: ignore[no-untyped-call]
        self.statistics = {
            key: value.repeat(count, *[1] * value.dim()) for key, value in inner.named_buffers()
        }

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize (m b, C, H, W) over each client's examples."""
        size, channels, *rest = inputs.shape
        apart = inputs.reshape(self.count, -1, channels, *rest).transpose(0, 1)
        if "num_batches_tracked" in self.statistics:
            self.statistics["num_batches_tracked"] += 1
        mean, var, weight, bias = (
            None if value is None else value.reshape(-1)
            for value in (
                *(self.statistics.get(key) for key in ("running_mean", "running_var")),
                *(self.own.get(key) for key in ("weight", "bias")),
            )
        )
        output = nn.functional.batch_norm(
            apart.reshape(-1, self.count * channels, *rest),
            mean, var, weight, bias, True, self.inner.momentum or 0.0, self.inner.eps,
        )  # fmt: skip
        output = output.reshape(-1, self.count, channels, *rest).transpose(0, 1)
        return output.reshape(size, channels, *rest)


@torch.no_grad()
def _put(combined: Combined, name: str, parameter: Tensor, gradient: Tensor) -> None:
    combined.put(name, parameter, gradient.clone())


class Masked(nn.Module):
    """``nn.Dropout`` whose mask, of the shape of its inputs, was drawn before."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply by the mask."""
        return inputs * self.mask


def can_part(model: nn.Module) -> bool:
    """Whether the gradients of all layers of a model can be kept apart here."""
    return all(
        not [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if [*part.children()]
        else _is_known(part)
        for part in model.modules()
    )


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.BatchNorm2d):
        return layer.momentum is not None
    return type(layer) in (nn.Linear, nn.Dropout, *_ALONE)


class Cohort:
    """A model as m clients see it, each with a batch of b examples.

    Parameters
    ----------
    model : nn.Module
        One that :func:`can_part`. Its tensors stay as they are.
    count : int
        m.
    masks : dict of Tensor
        What its dropouts multiply by, (m, b, ...) by their names.
    combined : Combined
        Where the gradients go.
    """

    def __init__(self, model: nn.Module, count: int, masks: State, combined: Combined) -> None:
        self._combined = combined
        self._norms: dict[str, _BatchNorm] = {}
        self._count = count
        shared = {id(value): value for value in _tensors(model)}
        self._model = deepcopy(model, shared)
        for name, layer in list(self._model.named_modules()):
            part = self._part(f"{name}." if name else "", layer, masks.get(name))
            if part is not None and name:
                self._model.set_submodule(name, part)
            elif part is not None:
                self._model = part

    def _part(self, prefix: str, layer: nn.Module, mask: Tensor | None) -> nn.Module | None:
        if mask is not None:
            return Masked(mask.flatten(0, 1))
        if isinstance(layer, nn.Linear):
            return _Linear(layer, prefix, self._count, self._combined)
        if isinstance(layer, nn.Conv2d):
            return _Convolution(layer, prefix, self._count, self._combined)
        if isinstance(layer, nn.BatchNorm2d):
            norm = self._norms[prefix] = _BatchNorm(layer, prefix, self._count, self._combined)
            return norm
        return None

    def run(self, images: Tensor, labels: Tensor) -> tuple[Tensor, State]:
        """Put every client's gradients of its mean cross-entropy into ``combined``.

        Parameters
        ----------
        images, labels : Tensor
            (m b, C, H, W) and (m b,), client by client.

        Returns
        -------
        Tensor, dict
            The losses (m,), and the buffers after the forward pass.
        """
        outputs = self._model(images)
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        losses = losses.reshape(self._count, -1).mean(1)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        after = {
            f"{prefix}{key}": value
            for prefix, norm in self._norms.items()
            for key, value in norm.statistics.items()
        }
        return losses.detach(), after


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
