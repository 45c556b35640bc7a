"""The ServerApp: federated averaging of a vector and a number."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpy_app.task import NUM_FEATURES, accuracy, split_tumors

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the model, print its accuracy and save it."""
    min_nodes = context.run_config["min-nodes"]
    strategy = FedAvg(min_train_nodes=min_nodes, min_available_nodes=min_nodes)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(
            {"weights": Array(np.zeros(NUM_FEATURES)), "bias": Array(np.zeros(()))}
        ),
        num_rounds=context.run_config["num-server-rounds"],
    )
    model = result.arrays.to_numpy_ndarrays()
    print(f"accuracy on the test tumors: {accuracy(*model, split_tumors()[1]):.3f}")
    np.savez("final_model.npz", *model)
