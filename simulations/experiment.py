"""One federated run: build everything from a configuration, run the rounds, keep the history."""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import flwr
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from fl_bgmd import __version__
from fl_bgmd.attacks import AttackPlan, Bound
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.data import Dataset, held_out, load, partitions
from fl_bgmd.devices import resolve_device
from fl_bgmd.evaluation import Evaluation, evaluate, evaluate_once
from fl_bgmd.extras import pandas
from fl_bgmd.held import held
from fl_bgmd.models import build
from fl_bgmd.schedules import scheduled_learning_rate
from fl_bgmd.shares import floor_share
from fl_bgmd.strategies import RobustStrategy, RunEndedError, Verdict

from .adversary import AdversarialGrid
from .config import SETTINGS, Config, strategy_for
from .grid import InProcessGrid
from .pooled_grid import PooledGrid
from .specs import RootUpdate
from .trackers import FigureLog, check_log

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OnRound = Callable[[int, float | None], None]


_SUMMED = ("seconds", "cpu-seconds", "bytes-up", "bytes-down", "accepted", "rejected")
_AVERAGED = ("train-loss", "residual-ratio", "memory-norm", "compression-error")


@dataclass
class RunResult:
    """What a run left behind.

    Attributes
    ----------
    config : dict
        The complete configuration.
    rounds : list of dict
        One for each round: test accuracy and loss (where evaluated), seconds, diagnostics; where
        the clients run in this process ``cpu-seconds`` of all its threads, evaluation left out.
    status : str
        ``finished``, ``diverged`` (the model could not be moved any more) or ``failed``.
    played : dict
        How many lies of each attack the server received, by their specs.
    backend : str
        Where the clients were: one of :data:`simulations.backends.BACKENDS`, ``flwr`` under
        ``flwr run``.
    verdicts : sequence of Verdict
        What the server made of each client in each round (see :mod:`fl_bgmd.strategies`).
    environment : dict
        Versions and hardware, of a run that has been read.
    models : dict of str to bytes
        The ``final`` and the ``best`` model as safetensors, with ``save-model``.
    """

    config: Config
    rounds: list[dict[str, Any]] = field(default_factory=list)
    status: str = "finished"
    error: str = ""
    seconds: float = 0.0
    played: dict[str, int] = field(default_factory=dict)
    backend: str = "flwr"
    verdicts: Sequence[Verdict] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    models: dict[str, bytes] = field(default_factory=dict)

    @property
    def frame(self) -> "pd.DataFrame":
        """The rounds as a pandas frame, one line each."""
        frame: pd.DataFrame = pandas().DataFrame(self.rounds).set_index("round")
        return frame

    @property
    def verdict_frame(self) -> "pd.DataFrame":
        """The verdicts as a pandas frame, one line each."""
        return Verdict.frame_of(self.verdicts)

    def figure(self, metric: str = "accuracy", axis: str = "rounds") -> "Figure":
        """Return a matplotlib figure of a number of the rounds.

        ``axis`` is ``rounds``, ``seconds``, ``bytes`` or, where the clients ran in this process,
        ``cpu-seconds``. Raises ``ValueError`` for another one, and for a ``metric`` that no round
        has.
        """
        pandas()
        from .report.notebook import run_figure

        return run_figure(self, metric, axis)

    def __repr__(self) -> str:
        """Return what a run came to: its rounds and models would fill the screen."""
        cell = f"{self.config.get('strategy')} under {self.config.get('attack')}"
        return f"<RunResult: {cell}, {self.status}, final accuracy {self.final_accuracy:.4f}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        pandas()
        from .report.notebook import run_html

        return run_html(self)

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy by round, round 0 included."""
        return {
            int(entry["round"]): float(entry["accuracy"])
            for entry in self.rounds
            if "accuracy" in entry
        }

    @property
    def milestones(self) -> list[dict[str, Any]]:
        """The evaluated rounds, each with sums and means over the rounds since the one before."""
        found, sums, counts = [], Counter[str](), Counter[str]()
        for entry in self.rounds:
            given = [key for key in (*_SUMMED, *_AVERAGED) if key in entry]
            sums.update({key: float(entry[key]) for key in given})
            counts.update(given)
            if "accuracy" in entry:
                means = {key: sums[key] / counts[key] for key in _AVERAGED if key in sums}
                told = {"round": entry["round"], "accuracy": entry["accuracy"]}
                found.append({**told, **sums, **means})
                sums.clear()
                counts.clear()
        return found

    @property
    def final_accuracy(self) -> float:
        """Test accuracy after the last evaluated round."""
        return self.accuracies[max(self.accuracies)] if self.accuracies else float("nan")

    @property
    def best_accuracy(self) -> float:
        """Highest test accuracy of any round."""
        return max(self.accuracies.values(), default=float("nan"))

    @property
    def seconds_per_round(self) -> float:
        """Mean wall clock of a round, evaluation included."""
        seconds = [float(entry["seconds"]) for entry in self.rounds if "seconds" in entry]
        return float(np.mean(seconds)) if seconds else float("nan")

    def bytes_up_to(self, number: int) -> int:
        """Return the bytes of arrays that clients had sent by the end of a round."""
        return sum(int(e.get("bytes-up", 0)) for e in self.rounds if int(e["round"]) <= number)

    def last(self, key: str, default: Any) -> Any:
        """Return the value of ``key`` in the last round that has it."""
        return next((entry[key] for entry in reversed(self.rounds) if key in entry), default)

    def total(self, key: str) -> int:
        """Sum a count (``accepted``, ``rejected``) over the rounds."""
        return sum(int(entry.get(key, 0)) for entry in self.rounds)

    def write(self, folder: Path) -> Path:
        """Write ``run.json`` and ``rounds.jsonl`` into ``folder``; return it."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry, sort_keys=True) for entry in self.rounds]
        (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        verdicts = "".join(f"{verdict.to_json()}\n" for verdict in self.verdicts)
        (folder / "verdicts.jsonl").write_text(verdicts, encoding="utf-8")
        for name, data in self.models.items():
            (folder / f"{name}.safetensors").write_bytes(data)
        record = {
            "status": self.status,
            "error": self.error,
            "final-accuracy": self.final_accuracy,
            "best-accuracy": self.best_accuracy,
            "seconds": self.seconds,
            "accepted": self.total("accepted"),
            "rejected": self.total("rejected"),
            "played": self.played,
            "backend": self.backend,
            "config": self.config,
            "environment": environment(),
        }
        # Last and at once: a folder with it is a whole run.
        draft = folder / "run.json.part"
        draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / "run.json")
        return folder

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what :meth:`write` wrote. Raises ``OSError`` where that is missing."""
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(
            record["config"],
            [json.loads(line) for line in lines if line],
            record["status"],
            record["error"],
            record["seconds"],
            record["played"],
            record.get("backend", ""),  # older runs do not say
            read_verdicts(folder / "verdicts.jsonl"),
            record.get("environment", {}),
        )


def read_verdicts(path: Path) -> list[Verdict]:
    """Read a ``verdicts.jsonl``; older runs have none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [Verdict.from_json(line) for line in file if line.strip()]


def environment() -> dict[str, Any]:
    """Return versions and hardware, for the record."""
    return {
        "fl-bgmd": __version__,
        "flwr": flwr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def run_experiment(
    grid: Grid, config: Config, on_round: OnRound | None = None, folder: Path | None = None
) -> RunResult:
    """Run a validated configuration on any grid, from its newest checkpoint where there is one.

    ``on_round(round, accuracy or None)`` is called after each round (0: before the first).
    ``folder`` is where the run's files go, for ``log-to``.
    """
    check_log(config, folder)
    dataset = load(str(config["dataset"]), str(config["data-dir"]) or None)
    torch.manual_seed(int(config["seed"]))
    model = build(
        str(config["model"]), input_shape=dataset.input_shape, num_classes=dataset.num_classes
    )
    log = FigureLog(config, folder)
    strategy = build_strategy(config, on_round=log, root_update=_root_update(config, dataset))
    # Shares that cannot be are refused before anything starts.
    validation = float(config["validation-fraction"])
    partitions(
        dataset,
        int(config["num-clients"]),
        scheme=str(config["partition"]),
        seed=int(config["seed"]),
        validation=validation,
        root=int(config["root-examples"]),
    )
    withheld = held_out(dataset, validation)
    device = resolve_device(str(config["device"]))
    num_rounds, every = int(config["num-server-rounds"]), int(config["evaluate-every"])
    plan = AttackPlan.from_config(config)
    adversary = AdversarialGrid(grid, plan, int(config["num-clients"]), strategy.preview)
    best: list[Any] = []  # how good, and the model
    started = clock = time.perf_counter()
    computes_here = isinstance(grid, InProcessGrid) and not isinstance(grid, PooledGrid)
    cpu = time.process_time()

    def measure(arrays: ArrayRecord, *, is_first: bool = False) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        if is_first:
            found = evaluate_once(model, dataset, device)
        else:
            found = evaluate(model, dataset, None, device)
        metrics = MetricRecord()
        metrics["accuracy"] = found.accuracy
        metrics["loss"] = found.loss
        metrics["class-accuracies"] = found.class_accuracies
        if len(withheld):
            metrics["validation-accuracy"] = evaluate(
                model, dataset, withheld, device, part="train"
            ).accuracy
        if plan.targeted:
            metrics["backdoor-success"] = max(success(bound, found) for bound in plan.targeted)
        quality = metrics["validation-accuracy" if len(withheld) else "accuracy"]
        if config["save-model"] and (not best or quality >= best[0]):
            best[:] = [quality, as_safetensors(arrays)]
        return metrics

    def success(bound: Bound, plain: Evaluation) -> float:
        target = bound.target
        assert target is not None
        if bound.attack.trigger is not None:
            others = np.flatnonzero(dataset.test_labels != target)
            plain = evaluate(model, dataset, others, device, stamp=bound.stamp)
        return plain.backdoor_success(target, bound.victim)

    def evaluate_model(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal clock, cpu
        spent = time.process_time() - cpu
        wanted = server_round % every == 0 or server_round == num_rounds
        metrics = measure(arrays, is_first=server_round == 0) if wanted else MetricRecord()
        if server_round > 0:
            metrics["seconds"] = time.perf_counter() - clock
            if computes_here:
                metrics["cpu-seconds"] = spent
        clock, cpu = time.perf_counter(), time.process_time()
        if on_round is not None:
            accuracy = metrics.get("accuracy")
            on_round(server_round, float(accuracy) if isinstance(accuracy, float) else None)
        return metrics

    initial = ArrayRecord(model.state_dict())
    if isinstance(grid, InProcessGrid):
        initial = held(initial)
    result = RunResult(config)
    outcome: Result
    try:
        outcome = strategy.start(
            grid=adversary,
            initial_arrays=initial,
            num_rounds=num_rounds,
            timeout=float(config["round-timeout"]),
            train_config=ConfigRecord(),
            evaluate_config=ConfigRecord(),
            evaluate_fn=evaluate_model,
        )
    except RunEndedError as error:
        outcome = error.result
        result.status, result.error = "failed", f"{type(error).__name__}: {error}"
    finally:
        log.close()
    result.rounds, result.verdicts = history_of(outcome), strategy.verdicts
    if "accuracy" not in result.rounds[-1] and outcome.arrays:  # it ended between evaluations
        result.rounds[-1] |= dict(measure(outcome.arrays))
    if config["save-model"] and outcome.arrays:
        result.models["final"] = as_safetensors(outcome.arrays)
    if best:
        result.models["best"] = best[1]
    result.seconds = time.perf_counter() - started
    result.played = dict(adversary.played)
    _set_status(result, plan)
    return result


def _root_update(config: Config, dataset: Dataset) -> RootUpdate | None:
    """Return the server's own training, None where it has no examples."""
    if not config["root-examples"]:
        return None
    # Here a server does what clients do; others know nothing of them.
    from .root import RootTraining

    return RootTraining(config, dataset)


def as_safetensors(arrays: ArrayRecord) -> bytes:
    """Return a model as a file's content; tensors that are shared are written twice."""
    state = arrays.to_torch_state_dict()
    return to_safetensors({key: value.contiguous().clone() for key, value in state.items()})


def evaluate_saved(folder: Path, name: str = "final") -> Evaluation:
    """Evaluate a model that a run has left in its folder on all test examples.

    Raises ``OSError`` where there is none.
    """
    config = RunResult.read(folder).config
    state = from_safetensors((folder / f"{name}.safetensors").read_bytes())
    dataset = load(str(config["dataset"]), str(config["data-dir"]) or None)
    shape, classes = dataset.input_shape, dataset.num_classes
    model = build(str(config["model"]), input_shape=shape, num_classes=classes)
    model.load_state_dict(state)
    return evaluate(model, dataset, None, resolve_device("auto"))


def history_of(outcome: Result) -> list[dict[str, Any]]:
    """Return one entry for each round: what the server measured, and what clients reported."""
    measured, trained = outcome.evaluate_metrics_serverapp, outcome.train_metrics_clientapp
    entries = []
    for number in sorted(measured.keys() | trained.keys()):
        evaluated = dict(outcome.evaluate_metrics_clientapp.get(number, {}))
        entries.append(
            {
                "round": number,
                **measured.get(number, {}),
                **trained.get(number, {}),
                **{f"clients-{key}": value for key, value in evaluated.items()},
            }
        )
    return entries


def checkpoints_of(config: Config) -> Checkpoints | None:
    """Return where a validated configuration wants its checkpoints, None for nowhere.

    Folders, machines and what is done when they fail are not part of what a run is; everything
    else must be as it was.
    """
    if not config["checkpoint-dir"]:
        return None
    return Checkpoints(
        str(config["checkpoint-dir"]),
        keep=int(config["checkpoint-keep"]),
        every=int(config["checkpoint-every"]),
        identity={k: v for k, v in config.items() if not SETTINGS[k].is_operation},
    )


def build_strategy(config: Config, **options: Any) -> RobustStrategy:
    """Build the strategy that a validated configuration names; ``options`` it does not hold."""
    return strategy_for(
        config,
        **options,
        server_learning_rate=_server_learning_rate(config),
        checkpoints=checkpoints_of(config),
    )


def _server_learning_rate(config: Config) -> float | Callable[[int], float]:
    """Return the server's step, or what it is in each round where it has a schedule."""
    rate, schedule = config["server-learning-rate"], config["server-lr-schedule"]
    if schedule == "constant":
        return float(rate)
    num_rounds, period, decay = (
        config[key] for key in ("num-server-rounds", "lr-period", "lr-decay")
    )
    return lambda number: scheduled_learning_rate(
        rate, schedule, number, num_rounds, period=period, decay=decay
    )


def _set_status(result: RunResult, plan: AttackPlan) -> None:
    """Say what became of a run: it may have diverged, have done nothing, or not been attacked."""
    if result.total("accepted") and _diverged(result):
        result.status, result.error = "diverged", ""
    idle = [str(bound) for bound in plan.attacks if not result.played.get(str(bound))]
    if idle and result.status != "failed":
        # Its accuracy would say nothing about the attack.
        result.status = "failed"
        result.error = f"attack {', '.join(idle)} was not played once"


def _diverged(result: RunResult) -> bool:
    """Whether the model left the range of its dtype, or honest replies to it were not finite."""
    last = result.rounds[-1]
    config = result.config
    hostile = floor_share(float(config["byzantine-fraction"]), int(config["num-clients"]))
    # A client whose model is NaN says so in its arrays.
    rejected, not_finite = (int(last.get(key, 0)) for key in ("rejected", "rejected-non-finite"))
    lost = int(last.get("accepted", 0)) == 0 and rejected == not_finite > hostile
    loss = float(last.get("loss", 0.0))
    return bool(last.get("diverged", 0)) or lost or not np.isfinite(loss)
