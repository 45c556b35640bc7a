"""The ServerApp of ``flwr run``: validate the run configuration, run, write results and report."""

import logging
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .config import validate
from .experiment import run_experiment

LOG = logging.getLogger("flwr.fl_bgmd")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run configuration describes."""
    config = validate(context.run_config)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config['strategy']}-{context.run_id}"
    folder = Path(str(config["results-dir"])).resolve() / name
    result = run_experiment(grid, config, folder=folder)
    result.write(folder)
    LOG.info(
        "%s: final accuracy %.4f, best %.4f, results in %s",
        result.status,
        result.final_accuracy,
        result.best_accuracy,
        folder,
    )
    _write_report(folder)
    if result.status == "failed":
        raise RuntimeError(result.error)  # or Flower would list the run as completed


def _write_report(folder: Path) -> None:
    """Write the report of the run in a folder, or log that it cannot be."""
    # Imported here, since runner and grids are of no use to a server.
    from .report.page import NO_PLOTLY, has_plotly, write_run_page

    if not has_plotly():
        LOG.warning(NO_PLOTLY)
        return
    LOG.info("report: %s", write_run_page(folder))
