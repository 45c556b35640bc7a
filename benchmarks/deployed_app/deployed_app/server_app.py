"""A server with a robust strategy, rows in a file and checkpoints; says how long rounds take."""

import json
import time
from itertools import pairwise
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from deployed_app.model import first_model
from fl_bgmd.strategies import RobustStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; write what they come to into ``result.json`` in the folder of the run."""
    config = context.run_config
    folder, clients = Path(str(config["folder"])), int(config["num-clients"])
    strategy = RobustStrategy(
        str(config["strategy"]),
        byzantine_fraction=0.2,
        fraction_evaluate=0.0,
        min_train_nodes=clients,
        min_available_nodes=clients,
        rows=str(config["rows"]),
        rows_dir=folder,
        checkpoints=folder / "checkpoints",
        seed=1,
    )
    ends = [time.monotonic()]

    def note(number: int, result: Result) -> bool:
        ends.append(time.monotonic())
        rounds = [dict(metrics) for metrics in result.train_metrics_clientapp.values()]
        seconds = [round(end - start, 1) for start, end in pairwise(ends)]
        made = json.dumps({"seconds": seconds, "rounds": rounds})
        (folder / "result.json").write_text(made)
        return False

    strategy.start(
        grid,
        first_model(int(config["parameters"]), str(config["dtype"])),
        num_rounds=int(config["num-server-rounds"]),
        timeout=float(config["round-timeout"]),
        should_stop=note,
    )
