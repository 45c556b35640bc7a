"""The project's ClientApp: trains and evaluates a partition, misbehaves when told to."""

from .client_app import app, partitions, prepare_together
from .together import gradients_together
from .training import LR_SCHEDULES, evaluate, scheduled_learning_rate, threads

__all__ = [
    "LR_SCHEDULES",
    "app",
    "evaluate",
    "gradients_together",
    "partitions",
    "prepare_together",
    "scheduled_learning_rate",
    "threads",
]
