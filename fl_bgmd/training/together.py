"""The clients of a round trained together: many small gradients in a few large operations.

The batches, the dropout and the optimizer's steps are those of :func:`.local.train`, run
for one client after the other; only the order of sums differs, so the results agree to float
tolerance. In the first step all clients have one model, and one forward and one backward pass serve
them all (:mod:`.cohort`); from the second on each has its own, and ``torch.func`` runs them side by
side. That pays on a GPU, where the batch of one client is too little work; on a CPU it is the
first step that pays.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from ..devices import to_input
from .cohort import Cohort, Combined, Masked, can_part
from .local import Job, State, Trained, batches, placed, seed_torch

_EXAMPLES = {("cpu", False): 640, ("cpu", True): 64}
"""Examples of a step that are computed at once, by device and whether there are convolutions."""

_MANY = 2**14
"""Elsewhere: what fits a GPU's memory."""


def train_together(model: nn.Module, jobs: Sequence[Job]) -> list[Trained]:
    """Train ``model``, which stays as it is, for each job; results in the order of the jobs."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        groups[_shape(job)].append(number)
    convolves = any(isinstance(part, nn.Conv2d) for part in model.modules())
    found: dict[int, Trained] = {}
    for (size, *_), numbers in groups.items():
        most = max(1, _EXAMPLES.get((jobs[0].device.type, convolves), _MANY) // size)
        for start in range(0, len(numbers), most):
            chunk = numbers[start : start + most]
            found.update(zip(chunk, _train(model, [jobs[i] for i in chunk]), strict=True))
    return [found[number] for number in range(len(jobs))]


def _shape(job: Job) -> tuple[int, ...]:
    """Return what jobs must share to have batches of the same sizes: a batch's size first."""
    settings, count = job.settings, len(job.indices)
    size = min(settings.batch_size, count)
    return (size, settings.steps) if settings.steps else (size, settings.epochs, count)


def _train(model: nn.Module, jobs: Sequence[Job]) -> list[Trained]:
    """Train for jobs whose batches have the same sizes."""
    settings = jobs[0].settings
    rate, decay = settings.learning_rate, settings.weight_decay
    model = placed(model, jobs[0].device).train()
    dropout = _Dropout(model, jobs)
    values: State = {name: value.detach() for name, value in model.named_parameters()}
    buffers: State = {
        name: value.expand(len(jobs), *value.shape) for name, value in model.named_buffers()
    }
    velocities: State = {}
    losses: list[Tensor] = []
    for batch in zip(*map(batches, jobs), strict=True):
        images, labels = (torch.stack(parts) for parts in zip(*batch, strict=True))
        masks = dropout.draw(images[0])
        if not losses and can_part(model):
            named = {name.removesuffix(".mask"): mask for name, mask in masks.items()}
            # Without momentum the sums are the step itself.
            sums = Combined() if settings.momentum else Combined(-rate, 1 - rate * decay)
            cohort = Cohort(model, len(jobs), named, sums)
            loss, after = cohort.run(
                to_input(images.flatten(0, 1), images.device), labels.flatten()
            )
            gradients = sums.found
        else:
            sums = Combined()
            gradients, loss, after = gradients_together(
                dropout.model, images, labels, buffers | masks, values if losses else None
            )
        buffers = {name: after.get(name, value) for name, value in buffers.items()}
        if sums.alpha != 1:
            values |= gradients
        else:
            for name, direction in gradients.items():
                if decay:
                    direction.add_(values[name], alpha=decay)
                if settings.momentum and name in velocities:
                    direction.add_(velocities[name], alpha=settings.momentum)
                velocities[name] = direction
                values[name] = torch.add(values[name], direction, alpha=-rate)
        losses.append(loss)
    mean = torch.stack(losses).mean(0).tolist()
    states = {name: (values | buffers)[name].cpu() for name in model.state_dict()}
    return [
        Trained({name: value[i] for name, value in states.items()}, mean[i])
        for i in range(len(jobs))
    ]


def gradients_together(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    buffers: State,
    parameters: State | None = None,
) -> tuple[State, Tensor, State]:
    """Compute every client's gradient of the mean cross-entropy by ``torch.func``.

    Parameters
    ----------
    model : nn.Module
        Without layers that draw.
    images, labels : Tensor
        (m, b, C, H, W) float and (m, b) int64: a batch of b for each of m clients.
    buffers : dict of Tensor
        (m, ...) by name: every client's own.
    parameters : dict of Tensor, optional
        (m, ...) by name; by default all clients have the model's own.

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

    together = vmap(
        grad_and_value(loss_of, has_aux=True), in_dims=(0 if parameters else None, 0, 0, 0)
    )
    shared = {name: value.detach() for name, value in model.named_parameters()}
    # Not channels last: vmap has no rule for the average pool of that layout.
    images = images.contiguous()
    gradients, (losses, after) = together(parameters or shared, buffers, images, labels)
    return gradients, losses, after


class _Dropout:
    """What each client's dropout draws, from step to step: inside ``vmap`` none has a seed.

    Attributes
    ----------
    model : nn.Module
        The model with masks, as buffers, in the dropouts' place.
    """

    def __init__(self, model: nn.Module, jobs: Sequence[Job]) -> None:
        self._layers = {
            name: part for name, part in model.named_modules() if isinstance(part, nn.Dropout)
        }
        self._original, self._jobs = model, jobs
        self._states: list[Tensor] = []
        self._shapes: dict[tuple[int, ...], dict[str, torch.Size]] = {}
        self.model = model
        if self._layers:
            shared: dict[int, object] = {id(value): value for value in model.parameters()}
            self.model = deepcopy(model, shared)
            for name in self._layers:
                self.model.set_submodule(name, Masked(torch.ones(())))

    def draw(self, batch: Tensor) -> State:
        """Return the masks (m, b, ...) of the next step, by their names as buffers.

        They are those that the model draws for a batch of that shape, one client after the other.
        """
        if not self._layers:
            return {}
        device = batch.device
        shapes = self._shapes_for(batch)
        masks: dict[str, list[Tensor]] = {name: [] for name in shapes}
        states = []
        for number, job in enumerate(self._jobs):
            if self._states:
                _set_state(self._states[number], device)
            else:
                seed_torch(job.seed, device)
            for name, shape in shapes.items():
                masks[name].append(self._layers[name](torch.ones(shape, device=device)))
            states.append(_get_state(device))
        self._states = states
        return {f"{name}.mask": torch.stack(drawn) for name, drawn in masks.items()}

    def _shapes_for(self, batch: Tensor) -> dict[str, torch.Size]:
        """Return what the dropouts are given, in the order of the calls, without computing it."""
        known = self._shapes.get(tuple(batch.shape))
        if known is None:
            known = self._shapes[tuple(batch.shape)] = {}
            # A memory of what has no values: nothing is copied.
            empty: dict[int, object] = {
                id(value): nn.Parameter(value.to("meta")) for value in self._original.parameters()
            }
            empty |= {id(value): value.to("meta") for value in self._original.buffers()}
            dry = deepcopy(self._original, empty)
            for name, part in dry.named_modules():
                if isinstance(part, nn.Dropout):
                    part.register_forward_hook(
                        lambda _layer, inputs, _output, name=name: known.update(
                            {name: inputs[0].shape}
                        )
                    )
            with torch.no_grad():
                dry(batch.to("meta"))
        return known


def _get_state(device: torch.device) -> Tensor:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_rng_state(device) if on_gpu else torch.default_generator.get_state()


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.default_generator.set_state(state)
