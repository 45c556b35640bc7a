"""All clients' one-step rounds at once: many small gradients in a few large operations.

The batches, the dropout and the optimizer's step are those of :func:`clients.training.train`, run
for one client after the other; only the order of sums differs, so the results agree to float
tolerance. It pays on a GPU, where the batch of one client is too little work.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from .training import Job, State, Trained, first_batch, seed_torch


def train_together(model: nn.Module, jobs: Sequence[Job]) -> list[Trained]:
    """Take one SGD step from ``model`` for each job; results in the order of the jobs.

    Raises
    ------
    ValueError
        If a job has more than one step.
    """
    groups: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    for number, job in enumerate(jobs):
        if job.settings.steps != 1:
            raise ValueError(f"steps is {job.settings.steps}; allowed: 1, to train together")
        images, labels = first_batch(job)
        groups[len(labels)].append((number, images, labels))
    found: dict[int, Trained] = {}
    for group in groups.values():  # a small partition makes a smaller batch
        numbers = [number for number, _, _ in group]
        results = _step(
            model,
            [jobs[number] for number in numbers],
            # Not channels last: vmap has no rule for the average pool of that layout.
            torch.stack([images for _, images, _ in group]).contiguous(),
            torch.stack([labels for _, _, labels in group]),
        )
        found.update(zip(numbers, results, strict=True))
    return [found[number] for number in range(len(jobs))]


def gradients_together(
    model: nn.Module, images: Tensor, labels: Tensor, buffers: State
) -> tuple[State, Tensor, State]:
    """Compute every client's gradient of the mean cross-entropy at one model.

    Parameters
    ----------
    model : nn.Module
        Without layers that draw (see :func:`fixed_dropout`).
    images, labels : Tensor
        (m, b, C, H, W) float and (m, b) int64: a batch of b for each of m clients.
    buffers : dict of Tensor
        (m, ...) by name: every client's own.

    Returns
    -------
    dict, Tensor, dict
        Gradients (m, ...) by parameter, losses (m,), and the buffers after the forward pass.
    """

    def loss_of(
        parameters: State, buffers: State, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, State]:
        buffers = {name: value.clone() for name, value in buffers.items()}
        outputs = functional_call(model, (parameters, buffers), (images,))
        return nn.functional.cross_entropy(outputs, labels), buffers

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    together = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(None, 0, 0, 0))
    gradients, (losses, after) = together(parameters, buffers, images, labels)
    return gradients, losses, after


class FixedDropout(nn.Module):
    """Dropout whose mask was drawn before: inside ``vmap`` clients have no seeds of their own."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Multiply by the mask."""
        return images * self.mask


def fixed_dropout(model: nn.Module, batch: Tensor, seeds: Sequence[int]) -> tuple[nn.Module, State]:
    """Return a copy of ``model`` that drops what it is told to, and its buffers (m, ...).

    The masks among the buffers are those that ``model`` draws for a batch of that shape after
    :func:`clients.training.seed_torch` with each of the m ``seeds``.
    """
    copy, shapes = deepcopy(model), dict[str, torch.Size]()
    buffers = {name: value.expand(len(seeds), *value.shape) for name, value in copy.named_buffers()}
    dropouts = {name: part for name, part in copy.named_modules() if isinstance(part, nn.Dropout)}
    if not dropouts:
        return copy, buffers
    for name, layer in dropouts.items():
        layer.register_forward_hook(
            lambda _layer, inputs, _output, name=name: shapes.update({name: inputs[0].shape})
        )
    with torch.no_grad():
        deepcopy(copy)(batch)  # in the order of the calls; statistics of layers stay as they are
    masks: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for seed in seeds:
        seed_torch(seed, batch.device)
        for name, shape in shapes.items():
            masks[name].append(dropouts[name](torch.ones(shape, device=batch.device)))
    for name in dropouts:
        copy.set_submodule(name, FixedDropout())
    return copy, buffers | {f"{name}.mask": torch.stack(drawn) for name, drawn in masks.items()}


def _step(model: nn.Module, jobs: Sequence[Job], images: Tensor, labels: Tensor) -> list[Trained]:
    """Take the step of jobs whose batches have one size."""
    settings = jobs[0].settings
    model = model.to(jobs[0].device).train()
    undropped, buffers = fixed_dropout(model, images[0], [job.seed for job in jobs])
    gradients, losses, after = gradients_together(undropped, images, labels, buffers)
    states: State = {}
    for name, value in model.state_dict().items():
        if name in gradients:
            direction = gradients[name] + settings.weight_decay * value
            states[name] = (value - settings.learning_rate * direction).cpu()
        else:
            states[name] = after[name].cpu()
    return [
        Trained({name: values[i] for name, values in states.items()}, loss)
        for i, loss in enumerate(losses.tolist())
    ]
