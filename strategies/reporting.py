"""What the log says of a run: what starts, each round's results, a table at the end."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Result

from .declared import options_of
from .figures import own_names
from .settings import OWN_OPTIONS
from .verdicts import RobustResult

if TYPE_CHECKING:
    from .robust import RobustStrategy

LOG = logging.getLogger("flwr.fl_bgmd")

_LONGEST_LIST = 10
_MOST_ROWS, _MOST_COLUMNS = 20, 12


def values_of(strategy: "RobustStrategy") -> dict[str, Any]:
    """Return every option of a strategy and the value in force.

    That is the setting or the attribute of its name where there is one (a default of None has been
    replaced there), else what was given, else the default.
    """
    values = {}
    for name, option in options_of(type(strategy), strategy.rule.rule.kind).items():
        given = strategy.given.get(name, option.default)
        own = getattr(strategy.settings if name in OWN_OPTIONS else strategy, name, given)
        simple = own is None or isinstance(own, bool | int | float | str) or callable(own)
        values[name] = own if simple else given
    return values


def log_start(
    strategy: "RobustStrategy",
    arrays: ArrayRecord,
    num_rounds: int,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
) -> None:
    """Log what is about to run, in the words of Flower's own strategies."""
    LOG.info("Starting %s strategy:", type(strategy).__name__)
    LOG.info("\t├── Number of rounds: %s", num_rounds)
    LOG.info("\t├── Model: %s", model_size(arrays))
    LOG.info("\t├── ConfigRecord (train): %s", dict(train_config) or "(empty!)")
    LOG.info("\t├── ConfigRecord (evaluate): %s", dict(evaluate_config) or "(empty!)")
    strategy.summary()


def log_options(strategy: "RobustStrategy") -> None:
    """Log the options that are not Flower's: those stand in its own summary."""
    own = set(values_of(strategy)) - set(inspect.signature(FedAvg).parameters)
    LOG.info("\t└──> Options of %s:", type(strategy).__name__)
    lines = [
        f"{name}: {getattr(value, '__qualname__', value)}"
        for name, value in values_of(strategy).items()
        if name in own
    ]
    lines.append(f"device in use: {strategy.device}")
    lines.extend(
        f"{phase} metrics: "
        + ("by the given function" if given else "the median of the clients' values, not weighted")
        for phase, given in strategy.combiners.items()
    )
    for line in lines[:-1]:
        LOG.info("\t\t├── %s", line)
    LOG.info("\t\t└── %s", lines[-1])


def log_metrics(label: str, metrics: MetricRecord) -> None:
    """Log a round's results; of a long list how long it is."""
    shown = {
        key: f"[{len(value)} values]"
        if isinstance(value, list) and len(value) > _LONGEST_LIST
        else value
        for key, value in metrics.items()
    }
    LOG.info("\t└──> %s: %s", label, shown)


def log_end(result: RobustResult, num_rounds: int, seconds: float) -> None:
    """Log how long a run took and a table of its results."""
    LOG.info("")
    LOG.info("Strategy execution finished in %.2fs (%s rounds)", seconds, num_rounds)
    LOG.info("")
    LOG.info("Final results:")
    LOG.info("")
    LOG.info("\tGlobal model: %s", model_size(result.arrays))
    for line in table(result):
        LOG.info("\t%s", line)
    for line in result.verdicts.summary():
        LOG.info("\t%s", line)
    LOG.info("")


def model_size(arrays: ArrayRecord) -> str:
    """Return the size of a model in words."""
    parameters = sum(math.prod(array.shape) for array in arrays.values())
    size = sum(len(array.data) for array in arrays.values())
    return f"{parameters:,} parameters, {size:,} bytes ({size / 2**20:.2f} MB)"


def table(result: Result) -> list[str]:
    """Return the results as aligned lines, one a round, evenly chosen where there are many.

    Of the strategy's own figures the counts of replies; the others stand in each round's line.
    """
    columns: dict[str, Mapping[int, Any]] = {}
    figures = own_names()
    for phase, history in (
        ("train", result.train_metrics_clientapp),
        ("evaluate", result.evaluate_metrics_clientapp),
        ("server", result.evaluate_metrics_serverapp),
    ):
        for name in dict.fromkeys(name for metrics in history.values() for name in metrics):
            counts = name in ("accepted", "rejected")
            if phase == "train" and name in figures and not counts:
                continue
            values = {
                number: metrics[name]
                for number, metrics in history.items()
                if isinstance(metrics.get(name), int | float)
            }
            if values:
                columns[name if counts and phase == "train" else f"{phase} {name}"] = values
    rounds = sorted({number for values in columns.values() for number in values})
    if len(rounds) > _MOST_ROWS:
        last = len(rounds) - 1
        rounds = [rounds[i * last // (_MOST_ROWS - 1)] for i in range(_MOST_ROWS)]
    names = list(columns)[:_MOST_COLUMNS]
    rows = [["round", *names]]
    rows += [[str(r), *(_cell(columns[name].get(r)) for name in names)] for r in rounds]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    if hidden := list(columns)[_MOST_COLUMNS:]:
        lines.append(f"and {len(hidden)} metrics more")
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
