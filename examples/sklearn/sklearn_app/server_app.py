"""The ServerApp: federated averaging of coefficients."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearn_app.task import create_model, get_parameters, set_parameters, split_digits

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fit the model, print its accuracy and save it."""
    config = context.run_config
    model = create_model(config["local-epochs"])
    strategy = FedAvg(
        fraction_evaluate=0.5,
        min_train_nodes=config["min-nodes"],
        min_available_nodes=config["min-nodes"],
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_parameters(model)),
        num_rounds=config["num-server-rounds"],
    )
    set_parameters(model, result.arrays.to_numpy_ndarrays())
    print(f"accuracy on the test digits: {model.score(*split_digits()[1]):.3f}")
    np.savez("final_model.npz", *get_parameters(model))
