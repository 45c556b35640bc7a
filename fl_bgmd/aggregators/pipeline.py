"""Rules composed with pre-aggregators."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .results import Aggregate


@dataclass(frozen=True, init=False)
class Pipeline:
    """Apply pre-aggregators in turn, then a rule: itself a rule.

    ``Pipeline(partial(bucketing, bucket_size=2), geometric_median)(updates)``

    Parameters
    ----------
    *steps : callable
        Pre-aggregators, (n, d) to (m, d) tensors, and last a rule that returns an
        :class:`Aggregate`. Bind their options with :func:`functools.partial`.

    Raises
    ------
    TypeError
        If there is no step, or one cannot be called.
    """

    before: tuple[Callable[[Tensor], Tensor], ...]
    rule: Callable[[Tensor], Aggregate]

    def __init__(self, *steps: Callable[[Tensor], Tensor | Aggregate]) -> None:
        if not steps:
            raise TypeError("steps is empty; allowed: pre-aggregators and last a rule")
        for step in steps:
            if not callable(step):
                raise TypeError(f"steps holds {step!r}; allowed: callables (see functools.partial)")
        object.__setattr__(self, "before", steps[:-1])
        object.__setattr__(self, "rule", steps[-1])

    def __call__(self, updates: Tensor) -> Aggregate:
        """Return the rule's result; its ``weights`` and ``kept`` refer to the rows it was given.

        Raises what the steps raise.
        """
        for step in self.before:
            updates = step(updates)
        return self.rule(updates)
