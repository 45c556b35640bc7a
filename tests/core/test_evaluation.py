"""What models make of the test examples."""

import numpy as np
import torch

from fl_bgmd.data import Dataset
from fl_bgmd.evaluation import evaluate, evaluate_once
from fl_bgmd.models import build


def test_what_was_evaluated_once_is_remembered_by_its_weights() -> None:
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 28, 28), np.uint8), draw.integers(0, 10, 40)
    dataset, cpu = Dataset("mnist", images, labels, images, labels, 10), torch.device("cpu")
    models = [build("tiny-cnn") for _ in range(2)]
    found = [evaluate_once(model, dataset, cpu) for model in models]
    for model, first in zip(models, found, strict=True):
        assert evaluate_once(model, dataset, cpu) is first
        assert first.loss == evaluate(model, dataset, None, cpu).loss
    assert found[0].loss != found[1].loss
    with torch.no_grad():
        next(models[0].parameters()).mul_(2)
    moved = evaluate_once(models[0], dataset, cpu)
    assert moved.loss == evaluate(models[0], dataset, None, cpu).loss != found[0].loss
