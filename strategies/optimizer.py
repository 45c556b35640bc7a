"""The server's optimizer: torch's, which takes what a rule made of the updates for a gradient.

Its state is a value beside the model, not an object: a step makes the next one of it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.sgd import sgd as step_of_sgd

from fl_bgmd.mapped import like
from fl_bgmd.options import OptionError, Positive, declared
from fl_bgmd.registry import Registry

Beta = Annotated[float, Ge(0), Lt(1)]
Build = Callable[..., "Optimizer | _SGD"]
"""Of a list of tensors, a learning rate, and ``momentum`` and ``nesterov`` where it takes them."""


def _accept(found: Any) -> Build:
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"it is a {kind}; allowed: what builds an optimizer of torch's")
    build: Build = found
    return build


OPTIMIZERS: Registry[Build] = Registry("server_optimizer", _accept)
"""Optimizers by name; ``torch.optim:Adagrad`` is one, too."""


class _SGD:
    """The step of torch's SGD, which is a function of torch's, too.

    Its class loads torch's compiler: every run would begin four seconds later.
    """

    def __init__(
        self, parameters: list[Tensor], learning_rate: float, momentum: float, nesterov: bool
    ) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {each: {} for each in parameters}
        self._settings: dict[str, Any] = {
            "lr": learning_rate,
            "momentum": momentum,
            "nesterov": nesterov,
        }

    def step(self) -> None:
        """Move the parameters along their gradients."""
        kept = list(self.state.values())
        buffers = [own.get("momentum_buffer") for own in kept]
        step_of_sgd(
            list(self.state),
            [each.grad for each in self.state if each.grad is not None],
            buffers,
            weight_decay=0.0,
            dampening=0.0,
            maximize=False,
            **self._settings,
        )
        for own, buffer in zip(kept, buffers, strict=True):
            own["momentum_buffer"] = buffer


def sgd(
    parameters: list[Tensor], learning_rate: float, momentum: float = 0.0, nesterov: bool = False
) -> _SGD:
    """Build torch's SGD."""
    return _SGD(parameters, learning_rate, momentum, nesterov)


def adam(
    parameters: list[Tensor],
    learning_rate: float,
    *,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    eps: Positive = 1e-8,
) -> Optimizer:
    """Build torch's Adam; with ``eps`` of about 1e-3 FedAdam of Reddi et al., Algorithm 2."""
    return Adam(parameters, learning_rate, (beta1, beta2), eps)


OPTIMIZERS.add("sgd", sgd)
OPTIMIZERS.add("adam", adam)


def build_optimizer(spec: str) -> Build:
    """Return what builds the optimizer of a spec such as ``adam:beta2=0.99,eps=1e-3``.

    Raises :class:`fl_bgmd.options.OptionError` if the spec names no optimizer.
    """
    build, parsed = OPTIMIZERS.parse(spec)
    made = partial(build, **parsed.values(declared(build)))
    if parsed.name in OPTIMIZERS:
        return made
    try:
        found: object = made([torch.zeros(1)], 1.0)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{spec} builds no optimizer of torch's: {error}") from None
    if not isinstance(found, Optimizer):
        raise OptionError(f"{spec} builds no optimizer of torch's: it is a {type(found).__name__}")
    return made


def takes_momentum(spec: str) -> bool:
    """Whether an optimizer has a momentum that can be set."""
    return "momentum" in inspect.signature(OPTIMIZERS.parse(spec)[0]).parameters


def descend(
    values: NDArray[Any],
    update: Tensor,
    state: Mapping[str, Any],
    build: Callable[[list[Tensor]], "Optimizer | _SGD"],
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return a model (d,) after an optimizer's step along an update (d,), and its next state.

    ``state`` is torch's of one parameter, empty at first, and stays as it is.
    """
    before = torch.from_numpy(values)
    parameter = like(before, before.shape, before.dtype)  # in a file where the model is in one
    parameter = before.clone() if parameter is None else parameter.copy_(before)
    parameter.grad = update.cpu().to(parameter.dtype)
    optimizer = build([parameter])
    optimizer.state[parameter] = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }
    optimizer.step()
    return parameter.numpy(), dict(optimizer.state[parameter])
