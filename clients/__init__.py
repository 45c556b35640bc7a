"""The project's ClientApp: trains and evaluates a partition, misbehaves when told to."""

from .client_app import app, prepare_together

__all__ = ["app", "prepare_together"]
