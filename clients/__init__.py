"""The project's ClientApp: trains and evaluates a partition, misbehaves when told to."""

from .client_app import app, partitions, prepare_together
from .together import gradients_together
from .training import Evaluation, evaluate, threads

__all__ = [
    "Evaluation",
    "app",
    "evaluate",
    "gradients_together",
    "partitions",
    "prepare_together",
    "threads",
]
