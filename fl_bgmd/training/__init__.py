"""What a client does with a model and its partition: train it, alone or all clients together."""

from .local import Corrupt, Job, LocalTraining, Trained, train
from .together import gradients_together, train_together

__all__ = [
    "Corrupt",
    "Job",
    "LocalTraining",
    "Trained",
    "gradients_together",
    "train",
    "train_together",
]
