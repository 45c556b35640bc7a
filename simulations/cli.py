"""The command line: ``run`` one configuration, ``compare`` several, list ``keys``."""

import argparse
import fnmatch
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fl_bgmd.aggregators import RULES
from fl_bgmd.checkpoints import make_folder
from fl_bgmd.data import DATASETS, DataUnavailableError, data_directory, load
from fl_bgmd.extras import MissingExtraError, require

from .backends import BACKENDS, ClientResources, run
from .config import (
    SETTINGS,
    Config,
    ConfigError,
    beyond_guarantee,
    defaults,
    expand_home,
    parse,
    validate,
)
from .diggavi import reproduce_diggavi
from .experiment import RunResult
from .figures import draw_complexity, draw_speedup, draw_toy
from .ghosh import GHOSH, reproduce
from .laboratory import (
    Cell,
    Line,
    accuracy_table,
    columns,
    detailed_table,
    finished_before,
    plan_grid,
    read_cells,
    run_grid,
)
from .report import (
    attacks_table,
    counted,
    grid_table,
    keys_table,
    plot_accuracy,
    plot_data_attacks,
    plot_grid,
    results_table,
    write_grid,
    write_markdown,
)
from .reproduce import experiments, plan, read_experiment
from .reproduce_report import write_report

# What draws each, and how many draws, calls or runs it takes by default.
FIGURES: dict[str, tuple[Callable[..., Path], int]] = {
    "fig-toy": (draw_toy, 200),
    "fig-complexity": (draw_complexity, 5),
    "fig-speedup": (draw_speedup, 2),
    "data-diggavi": (reproduce_diggavi, 3),
}

EXIT_RUN_FAILED, EXIT_BAD_CONFIG, EXIT_NO_DATA, EXIT_INTERRUPTED = 1, 2, 3, 130

CONSOLE = Console()
# Wide enough for any table: in a narrow terminal lines wrap, and no number is cut off.
TABLES = Console(width=1000)


def main(arguments: Sequence[str] | None = None, program: str = "fl-bgmd") -> int:
    """Run the command line, called ``program`` in its help; return the exit status.

    0: all runs finished or diverged (a diverged run is a result). 1: a run failed. 2: a bad
    option, or a package that it needs is not installed. 3: the data cannot be had. 130:
    interrupted.
    """
    warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")
    try:
        options, unknown = _parser(program).parse_known_args(arguments)
        if not getattr(options, "verbose", False):
            logging.getLogger("flwr").setLevel(logging.CRITICAL)
        _refuse_unknown(unknown)
        _require_extras(options)
        for name in ("output", "picture"):
            if (folder := getattr(options, name, None)) is not None:
                _make_folder(name, folder)
        return int(options.command(options))
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NO_DATA
    except KeyboardInterrupt:
        print(
            "interrupted: a grid goes on with the same --folder, a run with --checkpoint-dir",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _require_extras(options: argparse.Namespace) -> None:
    """Check what the command needs at its end before hours of computing."""
    if getattr(options, "backend", None) == "ray":
        require("ray", "backend ray", "simulation")
    draws = options.command not in (_data, _attacks, _keys) or getattr(options, "picture", None)
    if draws:
        require("matplotlib", "plots", "plots")


def _make_folder(option: str, folder: Path) -> Path:
    """Create the folder of an option; raise :class:`ConfigError` where nothing can be written."""
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{option} is {str(folder)!r} ({error.strerror}); allowed: a folder that can be written"
        ) from error
    return folder


def _refuse_unknown(unknown: list[str]) -> None:
    """Raise :class:`ConfigError` for an option that does not exist, with the nearest that do."""
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        value = unknown[0].partition("=")[2] or " ".join(unknown[1:2])
        if key in SETTINGS:
            raise ConfigError(
                f"{key} is {value!r}, which this command does not take; allowed: "
                + ("in --strategies" if key == "strategy" else "with run")
            )
        validate({key: value})


def _path(text: str) -> Path:
    return Path(expand_home(text))


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Byzantine-robust federated learning experiments."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("run", help="one run", allow_abbrev=False)
    one.set_defaults(command=_run)
    _add_settings(one)

    several = commands.add_parser(
        "compare", help="several strategies (and attacks) from the same seed", allow_abbrev=False
    )
    several.set_defaults(command=_compare)
    several.add_argument(
        "--strategies",
        nargs="+",
        default=["mean", "gmd", "bgmd+nearest-neighbor"],
        metavar="STRATEGY",
        help=f"{', '.join(RULES)}, with options and mixings as in bgmd:0.3+nearest-neighbor",
    )
    several.add_argument("--seeds", type=int, default=1, help="runs of each, from --seed on")
    several.add_argument("--jobs", type=int, default=1, help="runs at a time (not with ray)")
    several.add_argument(
        "--no-sweep",
        action="store_true",
        help="several attacks: each as it is named, not with all values of its sweep",
    )
    several.add_argument(
        "--folder",
        type=_path,
        help="of a grid; finished runs that it holds are not run again (default: a new one)",
    )
    _add_settings(several, leave_out=("strategy",))

    report = commands.add_parser("report", help="table and heat map of finished grids")
    report.set_defaults(command=_report)
    report.add_argument("results", nargs="+", type=_path, help="folders of compare with a grid")
    report.add_argument("--output", type=_path, default=Path(), help="folder; default: this one")
    report.add_argument("--title", default="", help="of the heat map")

    again = commands.add_parser("reproduce", help="an experiment of the papers", allow_abbrev=False)
    again.set_defaults(command=_reproduce)
    again.add_argument("name", choices=(*experiments(), *FIGURES, *GHOSH))
    again.add_argument("--seeds", type=int, help="default: as many as the paper")
    again.add_argument("--epochs", type=float, help="default: as many as the paper")
    again.add_argument("--jobs", type=int, help="runs at a time; default: 2")
    again.add_argument("--device", default="auto", help="of clients and server")
    again.add_argument("--backend", choices=BACKENDS[1:], default="inprocess", help="of the runs")
    again.add_argument("--no-run", action="store_true", help="report what has run so far")
    again.add_argument("--results-dir", type=_path, default=Path("results"))
    again.add_argument("--output", type=_path, help="folder of table and plots; default: results")

    keys = commands.add_parser("keys", help="list the keys of the run configuration")
    keys.set_defaults(command=_keys)
    keys.add_argument("pattern", nargs="?", default="", help="part of a key: lr, *-fraction")

    attacks = commands.add_parser("attacks", help="list the attacks, draw what they do to images")
    attacks.set_defaults(command=_attacks)
    attacks.add_argument("--dataset", choices=DATASETS, default="cifar10")
    attacks.add_argument("--data-dir", default="", help="default: $FL_BGMD_DATA or the cache")
    attacks.add_argument("--picture", type=_path, metavar="FOLDER", help="draw data-attacks.png")

    data = commands.add_parser("data", help="obtain and check data sets", allow_abbrev=False)
    data.set_defaults(command=_data)
    data.add_argument("--dataset", nargs="+", choices=DATASETS, default=["cifar10"])
    data.add_argument("--data-dir", default="", help="default: $FL_BGMD_DATA or ~/.cache/fl-bgmd")
    return parser


def _add_settings(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Add an option for every key of the run configuration, and how to run it."""
    parser.add_argument("--backend", choices=BACKENDS, default="ray", help="default: ray")
    parser.add_argument("--client-resources-num-cpus", type=float, default=1.0, metavar="X")
    parser.add_argument("--client-resources-num-gpus", type=float, default=0.0, metavar="X")
    parser.add_argument("--verbose", action="store_true", help="show Flower's log")
    group = parser.add_argument_group("run configuration")
    for key, value in defaults().items():
        if key not in leave_out:
            setting = SETTINGS[key]
            text = f"{setting.help}; {setting.allowed} (default: {value!r})"
            group.add_argument(f"--{key}", dest=key, metavar="V", help=text.replace("%", "%%"))


def _given(options: argparse.Namespace) -> Config:
    """Return the run-configuration keys that were given, in their types."""
    return {
        key: parse(key, value)
        for key, value in vars(options).items()
        if key in SETTINGS and value is not None
    }


def _run(options: argparse.Namespace) -> int:
    config = validate(_given(options))
    return _run_all(options, {str(config["strategy"]): config})


def _compare(options: argparse.Namespace) -> int:
    attacks, options.attack = columns(options.attack or "none"), None  # several: no value of a key
    given = _given(options)
    rows: dict[str, Config] = {name: {"strategy": name} for name in options.strategies}
    names = options.strategies
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"strategies holds {', '.join(twice)} twice; allowed: each once")
    if len(attacks) == 1 and options.seeds == 1:
        if options.jobs != 1:
            raise ConfigError(
                f"jobs is {options.jobs} with one attack and one seed; allowed: 1, more with a grid"
            )
        if options.folder is not None:
            raise ConfigError(
                f"folder is {str(options.folder)!r} with one attack and one seed; allowed: none, "
                "one with a grid"
            )
        given["attack"] = attacks[0]
        configs = {name: validate(given | row) for name, row in rows.items()}
        for name, config in configs.items():
            if folder := config["checkpoint-dir"]:
                config["checkpoint-dir"] = str(Path(str(folder)) / name)
        return _run_all(options, configs)
    if given.get("checkpoint-dir"):
        raise ConfigError(
            f"checkpoint-dir is {given['checkpoint-dir']!r} with a grid of runs; allowed: '', for "
            "it needs one for each"
        )
    sweep = len(attacks) > 1 and not options.no_sweep
    return _run_grid(options, plan_grid(given, rows, attacks, options.seeds, sweep=sweep))


def _run_grid(options: argparse.Namespace, cells: list[Cell]) -> int:
    """Run a strategy x attack grid, show the table, write results; return the exit status."""
    config = cells[0].config
    _tell_limits(cell.config for cell in cells)
    option = "results-dir" if options.folder is None else "folder"
    folder = _make_folder(option, options.folder or _results_folder(config, "compare"))
    load(str(config["dataset"]), str(config["data-dir"]) or None, progress=CONSOLE.print)
    lines = _run_cells(cells, folder, options.jobs, options.backend, _resources(options, config))
    fraction = max(float(cell.config["byzantine-fraction"]) for cell in cells)
    title = (
        f"{config['dataset']}, {config['model']}, {config['num-clients']} clients "
        f"({config['partition']}), {fraction:.0%} hostile, {config['byzantine-selection']}, "
        + counted(options.seeds, "seed")
    )
    CONSOLE.print(f"written: {folder / 'cells.jsonl'}", soft_wrap=True)
    return _show_grid(lines, folder, title)


def _tell_limits(configs: Iterable[Config]) -> None:
    """Say, once each, where a rule is asked for more than it is proved to do."""
    for note in dict.fromkeys(note for config in configs for note in beyond_guarantee(config)):
        print(f"note: {note}", file=sys.stderr)


def _run_cells(
    cells: list[Cell], folder: Path, jobs: int, backend: str, resources: ClientResources
) -> list[Line]:
    """Run a grid with a progress bar."""
    with Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    ) as progress:
        task = progress.add_task(
            f"{jobs} at a time", total=len(cells), completed=len(finished_before(cells, folder))
        )

        def done(cell: Cell, result: RunResult) -> None:
            progress.update(task, advance=1, description=f"{cell.name} {result.final_accuracy:.1%}")

        return run_grid(
            cells, backend=backend, resources=resources, jobs=jobs, folder=folder, done=done
        )


def _report(options: argparse.Namespace) -> int:
    lines = read_cells(options.results)
    return _show_grid(lines, options.output, options.title)


def _show_grid(lines: list[Line], folder: Path, title: str) -> int:
    """Show a strategy x attack table and write it; return the exit status."""
    columns, rows = detailed_table(lines)
    TABLES.print(grid_table(columns, rows))
    picture = plot_grid(*accuracy_table(lines), title, folder)
    for path in (write_grid(columns, rows, folder), picture):
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    return _status(lines)


def _status(lines: list[Line]) -> int:
    """Name the runs that failed; return the exit status."""
    failed = [line for line in lines if line["status"] == "failed"]
    for line in failed:
        name = f"{line['strategy']}, {line['attack']}, seed {line['seed']}"
        print(f"error: {name}: {line['error']}", file=sys.stderr)
    return EXIT_RUN_FAILED if failed else 0


def _reproduce(options: argparse.Namespace) -> int:
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}; allowed: 1 or more")
    _make_folder("results-dir", options.results_dir)
    if options.name in experiments():
        return _reproduce_experiment(options)
    # What has no bearing on these is refused rather than ignored.
    unusable = {
        "epochs": options.epochs is not None,
        "device": options.device != "auto",
        "backend": options.backend != "inprocess",
        "no-run": options.no_run,
        "jobs": options.name in FIGURES and options.jobs is not None,
    }
    for name in (name for name, given in unusable.items() if given):
        raise ConfigError(f"{name} is given with {options.name}; allowed with: the tables' runs")
    if options.name in FIGURES:
        return _reproduce_figure(options)
    return _reproduce_ghosh(options)


def _reproduce_ghosh(options: argparse.Namespace) -> int:
    """Draw the figures of Ghosh et al."""
    experiment = GHOSH[options.name]
    seeds = options.seeds or experiment.seeds
    folder = options.output or options.results_dir.resolve() / options.name
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task(options.name, total=len(experiment.runs(seeds)))
        reproduce(
            experiment,
            folder,
            seeds=seeds,
            jobs=options.jobs or 2,
            done=lambda: progress.update(task, advance=1),
        )
    print((folder / "table.md").read_text(encoding="utf-8"))
    CONSOLE.print(f"written: {folder}", soft_wrap=True)
    return 0


def _reproduce_experiment(options: argparse.Namespace) -> int:
    """Run what is still missing of an experiment and report all of it; return the exit status."""
    experiment = read_experiment(options.name)
    epochs = experiment.epochs if options.epochs is None else options.epochs
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs is {epochs}; allowed: above 0")
    cells = plan(
        experiment,
        epochs=epochs,
        seeds=options.seeds or experiment.seeds,
        settings={"device": options.device},
    )
    folder = options.results_dir.resolve() / f"{options.name}-{epochs:g}-epochs"
    lines: list[Line] = []
    if not options.no_run:
        jobs = options.jobs or 2
        lines = _run_cells(cells, folder, jobs, options.backend, ClientResources())
    for path in write_report(experiment, cells, folder, options.output or folder):
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    print((options.output or folder).joinpath("table.md").read_text(encoding="utf-8"))
    return _status(lines)


def _reproduce_figure(options: argparse.Namespace) -> int:
    """Draw a figure that is no grid of runs; its numbers in ``table.md`` beside it."""
    draw, seeds = FIGURES[options.name]
    folder = options.output or options.results_dir.resolve() / options.name
    folder.mkdir(parents=True, exist_ok=True)
    with CONSOLE.status(options.name) as status:
        table = draw(folder, seeds=options.seeds or seeds, done=status.update)
    print(table.read_text(encoding="utf-8"))
    CONSOLE.print(f"written: {folder}", soft_wrap=True)
    return 0


def _keys(options: argparse.Namespace) -> int:
    found = [key for key in SETTINGS if fnmatch.fnmatchcase(key, f"*{options.pattern}*")]
    if not found:
        raise ConfigError(f"pattern is {options.pattern!r}; allowed: part of {', '.join(SETTINGS)}")
    CONSOLE.print(keys_table(SETTINGS[key] for key in found))
    return 0


def _attacks(options: argparse.Namespace) -> int:
    CONSOLE.print(attacks_table())  # mostly text, which folds
    if options.picture is not None:
        dataset = load(options.dataset, options.data_dir or None, progress=CONSOLE.print)
        path = plot_data_attacks(dataset, options.picture)
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    return 0


def _data(options: argparse.Namespace) -> int:
    for name in options.dataset:
        dataset = load(name, options.data_dir or None, progress=CONSOLE.print)
        CONSOLE.print(
            f"{name}: {len(dataset.train_labels)} training and {len(dataset.test_labels)} test "
            f"images, checksums right, in {data_directory(options.data_dir or None) / name}"
        )
    return 0


def _run_all(options: argparse.Namespace, configs: dict[str, Config]) -> int:
    """Run each configuration, show the table, write results; return the exit status."""
    first, kind = next(iter(configs.values())), "compare" if len(configs) > 1 else "run"
    _tell_limits(configs.values())
    resources = _resources(options, first)
    for config in configs.values():
        if config["checkpoint-dir"]:
            _make_folder("checkpoint-dir", Path(str(config["checkpoint-dir"])))
    folder = _make_folder("results-dir", _results_folder(first, kind))
    load(str(first["dataset"]), str(first["data-dir"]) or None, progress=CONSOLE.print)
    results: dict[str, RunResult] = {}
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    ) as progress:
        tasks = {
            name: progress.add_task(
                name, total=int(config["num-server-rounds"]), accuracy="", start=False
            )
            for name, config in configs.items()
        }
        for name, config in configs.items():
            results[name] = _run_one(name, config, options.backend, resources, progress, tasks)
            results[name].write(folder / name)
    table = results_table(results)
    TABLES.print(table)
    files = [
        write_markdown(results, folder),
        plot_accuracy(results, folder),
        plot_accuracy(results, folder, against_bytes=True),
    ]
    for name, result in results.items():
        if result.status == "failed":
            print(f"error: {name}: {result.error}", file=sys.stderr)
    for path in (*files, folder):
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    failed = any(result.status == "failed" for result in results.values())
    return EXIT_RUN_FAILED if failed else 0


def _resources(options: argparse.Namespace, config: Config) -> ClientResources:
    # Only Ray joins a cluster.
    address = str(config["ray-address"]) if options.backend == "ray" else ""
    return ClientResources(
        options.client_resources_num_cpus, options.client_resources_num_gpus, address
    )


def _results_folder(config: Config, command: str) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    return Path(str(config["results-dir"])).resolve() / name


def _run_one(
    name: str,
    config: Config,
    backend: str,
    resources: ClientResources,
    progress: Progress,
    tasks: dict[str, TaskID],
) -> RunResult:
    progress.start_task(tasks[name])

    def on_round(server_round: int, accuracy: float | None) -> None:
        progress.update(tasks[name], completed=server_round)
        if accuracy is not None:
            progress.update(tasks[name], accuracy=f"accuracy {accuracy:6.2%}")

    return run(config, backend=backend, resources=resources, on_round=on_round)
