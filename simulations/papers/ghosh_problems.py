"""What the workers of Ghosh et al., Section 8, minimize: a regression and a network on MNIST."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_bgmd.attacks import label_shift, random_labels
from fl_bgmd.data import load, normalize
from fl_bgmd.models import build
from fl_bgmd.training import gradients_together


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes
    ----------
    label : str
        In the legend.
    hostile : int
        Number of Byzantine workers, the first ones.
    dropped : int
        Number of workers that the threshold drops: the paper's beta m.
    rule : {"threshold", "majority", "trimmed-mean", "printed", "theorem-3"}
        l1-sign and norm thresholding, the paper's; signSGD with majority vote (Bernstein et al.);
        the trimmed mean of uncompressed gradients (Yin et al.), ``dropped`` at each end; Algorithm
        2 as it is printed, with the step size twice; the same with the step of Remark 11.
    feedback : bool
        Algorithm 2, with the step size once, instead of Algorithm 1.
    attack : {"gaussian", "ascent", "label-shift", "random-labels", "gaussian-after", \
"ascent-after"}
        N(0, 10 I) added to the gradient, -0.9 times it, or the gradient of wrong labels, which
        hostile workers compress as the others do (Option I). The last two are sent uncompressed
        (Option II, Algorithm 1 only): N(0, 10 I) added to what honest workers would send, and the
        gradient's opposite, 0.9 times as long as that.
    """

    label: str
    hostile: int
    dropped: int
    rule: str = "threshold"
    feedback: bool = False
    attack: str = "gaussian"


@dataclass(frozen=True)
class Regression:
    """``b = A w*``, ``A`` (N x d) and ``w*`` standard normal, the rows of A shared out equally.

    N, d, m are the paper's, the rest is ours.
    """

    examples: int = 4000
    dimensions: int = 1000
    workers: int = 200
    step: float = 0.2
    plain_step: float = 0.2
    sign_step: float = 0.01
    iterations: int = 250
    axis: str = "||w - w*||"

    @property
    def radius(self) -> float:
        """Of W, a ball around the start: twice as far as the optimum is to be expected."""
        return 2 * math.sqrt(self.dimensions)

    def draw(self, curve: Curve, generator: torch.Generator) -> "RegressionTask":
        """Return a task."""
        share = self.examples // self.workers
        data = torch.randn(self.workers, share, self.dimensions, generator=generator)
        return RegressionTask(data, torch.randn(self.dimensions, generator=generator))


class RegressionTask:
    """Workers' rows ``data`` (m, N / m, d) of A and ``target`` (d,)."""

    def __init__(self, data: Tensor, target: Tensor) -> None:
        self._data, self._target = data, target
        self._labels = data @ target
        self.start = torch.zeros_like(target)

    def gradients(self, weights: Tensor) -> Tensor:
        """Return each worker's gradient (m, d) of half its mean squared error."""
        errors = self._data @ weights - self._labels
        return torch.bmm(errors[:, None, :], self._data)[:, 0, :] / errors.shape[1]

    def measure(self, weights: Tensor) -> float:
        """Return the distance from ``w*``."""
        return float((weights - self._target).norm())


@dataclass(frozen=True)
class Network:
    """MNIST, 784-1000-10 with ReLU, 60,000 examples dealt out to the workers.

    Dataset, model and m are the paper's. Ours: mini-batches (300 are full ones), the step sizes (of
    l1-sign, of the uncompressed gradients, of the signs), the iterations, and that the training
    loss is that of every 30th example.
    """

    workers: int = 200
    batch: int = 30
    step: float = 1.0
    plain_step: float = 0.25
    sign_step: float = 0.0005
    iterations: int = 60
    axis: str = "training loss"

    def draw(self, curve: Curve, generator: torch.Generator) -> "NetworkTask":
        """Return a task."""
        return NetworkTask(self, curve, generator)


class NetworkTask:
    """Workers' shares of MNIST, the hostile ones' labels replaced."""

    def __init__(self, problem: Network, curve: Curve, generator: torch.Generator) -> None:
        dataset = load("mnist")
        self._images, true = normalize(dataset.train_images, dataset), dataset.train_labels
        order = torch.randperm(len(true), generator=generator)
        self._shares = order[: len(order) // problem.workers * problem.workers].view(
            problem.workers, -1
        )
        lies = true.copy()
        theirs = self._shares[: curve.hostile].flatten().numpy()
        if curve.attack == "label-shift":
            lies[theirs] = label_shift(true[theirs])
        elif curve.attack == "random-labels":
            rng = np.random.default_rng(generator.initial_seed())
            lies[theirs] = random_labels(true[theirs], dataset.num_classes, rng)
        self._labels, self._true = torch.from_numpy(lies), torch.from_numpy(true.copy())
        self._batch, self._generator = problem.batch, generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self._model = build("mlp")
        self.start = torch.nn.utils.parameters_to_vector(self._model.parameters()).detach()
        self._gradients = torch.empty(problem.workers, len(self.start))

    def gradients(self, weights: Tensor) -> Tensor:
        """Return each worker's gradient (m, d) of its cross-entropy on a mini-batch.

        The next call writes into the same memory: making room takes as long as computing.
        """
        torch.nn.utils.vector_to_parameters(weights, self._model.parameters())
        draws = torch.rand(self._shares.shape, generator=self._generator)
        chosen = self._shares.gather(1, draws.argsort(dim=1)[:, : self._batch])
        images, labels = self._images[chosen], self._labels[chosen]
        found, _, _ = gradients_together(self._model, images, labels, {})
        parts = [gradient.flatten(1) for gradient in found.values()]
        return torch.cat(parts, dim=1, out=self._gradients)

    def measure(self, weights: Tensor) -> float:
        """Return the cross-entropy on every 30th training example, true labels."""
        torch.nn.utils.vector_to_parameters(weights, self._model.parameters())
        with torch.inference_mode():
            outputs = self._model(self._images[::30])
            return float(torch.nn.functional.cross_entropy(outputs, self._true[::30]))


Problem = Regression | Network
