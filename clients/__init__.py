"""The project's ClientApp: trains and evaluates a partition, misbehaves when told to."""

from .client_app import app, prepare_together
from .together import gradients_together
from .training import Job, LocalTraining, train

__all__ = ["Job", "LocalTraining", "app", "gradients_together", "prepare_together", "train"]
