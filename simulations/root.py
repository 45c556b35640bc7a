"""What the server makes of examples of its own, for rules that trust them (key root-examples)."""

import numpy as np
import torch
from flwr.app import ArrayRecord

from fl_bgmd.data import Dataset, root_examples
from fl_bgmd.devices import repeatable, resolve_device
from fl_bgmd.models import build
from fl_bgmd.training import Job, LocalTraining, train

from .config import Config


class RootTraining:
    """A strategy's ``root_update``: trains as a client of this configuration does.

    Parameters
    ----------
    config : dict
        A validated configuration with ``root-examples`` above 0.
    dataset : Dataset
        Whose training examples they are of.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self._config, self._dataset = config, dataset
        self._seed = int(config["seed"])
        self._examples = root_examples(
            dataset,
            int(config["root-examples"]),
            seed=self._seed,
            validation=float(config["validation-fraction"]),
        )

    def __call__(self, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
        """Return what a round's training on the examples makes of a model."""
        config, dataset = self._config, self._dataset
        name, shape = str(config["model"]), dataset.input_shape
        with torch.device("meta"):  # not a draw of torch's generator
            model = build(name, input_shape=shape, num_classes=dataset.num_classes)
        model = model.to_empty(device="cpu")
        model.load_state_dict(arrays.to_torch_state_dict())
        sequence = np.random.SeedSequence([self._seed, server_round, 0, 2])
        job = Job(
            model,
            dataset,
            self._examples,
            LocalTraining.from_config(config, server_round),
            int(sequence.generate_state(1)[0]),
            resolve_device(str(config["device"])),
        )
        with repeatable(int(config["client-threads"])):
            state = train(job).state
        return ArrayRecord({key: value.cpu() for key, value in state.items()})
