"""The command line: every run is a study, of one cell or of many."""

import fnmatch
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import click
import typer
from rich.console import Console
from typer import Argument, Option

from fl_bgmd.checkpoints import make_folder
from fl_bgmd.data import DATASETS, DataUnavailableError, data_directory, load
from fl_bgmd.extras import MissingExtraError, require
from fl_bgmd.options import near

from .backends import ON_RAY, ClientResources
from .cli_options import (
    Backend,
    Cpus,
    DataDir,
    Folder,
    Gpus,
    Jobs,
    OneColumn,
    OneRow,
    Output,
    Seeds,
    Verbose,
    folder_path,
    takes_settings,
)
from .config import SETTINGS, Config, ConfigError, beyond_guarantee, validate
from .experiment import evaluate_saved
from .listings import print_attacks, print_keys
from .papers import FIGURES, reproduce_figure
from .progress import StudyProgress
from .runner import Line, finished_before, read_lines, run_cells
from .study import (
    Cell,
    Study,
    attack_columns,
    own_studies,
    papers,
    read_study,
    split_attacks,
    strategy_rows,
    study_named,
)
from .trackers import check_log

EXIT_RUN_FAILED, EXIT_BAD_CONFIG, EXIT_NO_DATA, EXIT_INTERRUPTED = 1, 2, 3, 130

CONSOLE = Console()


def reproducible() -> list[str]:
    """Return what ``fl-bgmd reproduce`` knows by name."""
    return [*papers(), *FIGURES, *own_studies()]


app = typer.Typer(
    help="Byzantine-robust federated learning experiments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None, program: str = "fl-bgmd") -> int:
    """Run the command line, called ``program`` in its help; return the exit status.

    0: all runs finished or diverged (a diverged run is a result). 1: a run failed. 2: a bad
    option, or a package that it needs is not installed. 3: the data set is not available.
    130: interrupted.
    """
    warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_command(given)
        status = int(app(args=given, prog_name=program, standalone_mode=False) or 0)
        if status == EXIT_INTERRUPTED:  # typer's answer to Ctrl-C
            _fail("--folder continues a study, --checkpoint-dir a run", status, "interrupted")
        return status
    except click.NoSuchOption as error:
        return _fail(_unknown_option(error, given), EXIT_BAD_CONFIG)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return EXIT_BAD_CONFIG
    except click.ClickException as error:
        return _fail(error.format_message(), EXIT_BAD_CONFIG)
    except (ConfigError, MissingExtraError) as error:
        return _fail(str(error), EXIT_BAD_CONFIG)
    except DataUnavailableError as error:
        return _fail(str(error), EXIT_NO_DATA)


def _fail(message: str, status: int, kind: str = "error") -> int:
    print(f"{kind}: {message}", file=sys.stderr)
    return status


def _check_command(given: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a command that does not exist, with the nearest that does."""
    names = [found.callback.__name__ for found in app.registered_commands if found.callback]
    if given and not given[0].startswith("-") and given[0] not in names:
        hints = filter(None, (near(given[0], names), f"allowed: {', '.join(names)}"))
        raise ConfigError(f"command is {given[0]!r}; {'; '.join(hints)}")


def _unknown_option(error: click.NoSuchOption, given: Sequence[str]) -> str:
    """Return what to say of an option that does not exist, with the nearest that do."""
    place = next(i for i, text in enumerate(given) if text.partition("=")[0] == error.option_name)
    key = error.option_name.removeprefix("--")
    value = given[place].partition("=")[2] or " ".join(given[place + 1 : place + 2])
    taken = [name for p in error.ctx.command.params for name in p.opts] if error.ctx else []
    if key in ("rows", "columns") and f"--{key[:-1]}" in taken:
        return f"{key} is {value!r} as an option; allowed: --{key[:-1]}, once for each"
    if key in SETTINGS:
        if key == "strategy" and error.ctx is not None and error.ctx.info_name == "compare":
            return f"strategy is {value!r} as an option; allowed: as an argument, compare {value}"
        where = "in the study's file" if key not in ("strategy", "seed") else "with run"
        return f"{key} is {value!r}, which this command does not take; allowed: {where}"
    try:
        validate({key: value})
    except ConfigError as known:
        return str(known)
    return error.format_message()


# ------------------------------------------------------------------------------ studies


@app.command()
@takes_settings()
def run(
    given: Config,
    backend: Backend = "ray",
    jobs: Jobs = 1,
    folder: Folder = None,
    num_cpus: Cpus = 1.0,
    num_gpus: Gpus = 0.0,
    verbose: Verbose = False,
) -> int:
    """Train once; write the history, the models, the table, the figures and a report."""
    strategy = str(given.pop("strategy", SETTINGS["strategy"].default))
    attack = str(given.pop("attack", SETTINGS["attack"].default))
    study = Study(strategy_rows([strategy]), attack_columns([attack]), given, name="run")
    resources = _resources(study, backend, num_cpus, num_gpus)
    return _run_study(
        study, folder, backend=backend, jobs=jobs, resources=resources, verbose=verbose
    )


@app.command()
@takes_settings("strategy", "attack")
def compare(
    given: Config,
    specs: Annotated[
        list[str] | None,
        Argument(metavar="[ROWS]...", show_default=False, hidden=True),
    ] = None,
    strategies: Annotated[list[str], Option("--strategies", hidden=True)] = [],  # noqa: B006
    attack: Annotated[
        list[str] | None,
        Option(help="Attacks, separated by commas, or all (repeatable)", metavar="V"),
    ] = None,
    seeds: Seeds = None,
    jobs: Jobs = 1,
    sweep: Annotated[
        bool, Option("--sweep/--no-sweep", help="Run several attacks at all their strengths")
    ] = True,
    row: OneRow = None,
    column: OneColumn = None,
    backend: Backend = "ray",
    folder: Folder = None,
    num_cpus: Cpus = 1.0,
    num_gpus: Gpus = 0.0,
    verbose: Verbose = False,
) -> int:
    """Compare strategies under attacks, from the same seeds.

    ROWS are strategies, as in bgmd:0.3+nearest-neighbor, or a study's TOML file.
    """
    named = [*strategies, *(specs or ())]
    if any(name.endswith(".toml") for name in named):
        if len(named) > 1 or attack:
            raise ConfigError(
                f"study is {named[0]!r} with other strategies or attacks; allowed: those in the "
                "file, of which --row and --column choose some"
            )
        study = read_study(folder_path(named[0])).changed(config=given)
    else:
        attacks = split_attacks(",".join(attack or ["none"]))
        many = len(attacks) > 1 or attacks == ["all"]
        study = Study(
            strategy_rows(named or ["mean", "gmd", str(SETTINGS["strategy"].default)]),
            attack_columns(attacks, sweep=sweep and many),
            given,
            name="compare",
        )
    study = study.changed(seeds=seeds, rows=row, columns=column)
    resources = _resources(study, backend, num_cpus, num_gpus)
    return _run_study(
        study, folder, backend=backend, jobs=jobs, resources=resources, verbose=verbose
    )


@app.command(epilog="NAMES: " + ", ".join(reproducible()))
def reproduce(
    name: Annotated[str, Argument(metavar="NAME")],
    seeds: Annotated[
        int | None, Option(help="Repetitions (default: the study's own)", metavar="N")
    ] = None,
    epochs: Annotated[
        float | None, Option(help="Length of the runs (default: the study's own)", metavar="X")
    ] = None,
    row: OneRow = None,
    column: OneColumn = None,
    jobs: Annotated[int | None, Option(help="Processes (default: 2)", metavar="N")] = None,
    backend: Annotated[
        Literal["inprocess", "vectorized"],
        Option(help="Where the clients run: inprocess, vectorized", metavar="NAME"),
    ] = "inprocess",
    device: Annotated[str, Option(help="Device of clients and server", metavar="V")] = "auto",
    no_run: Annotated[bool, Option("--no-run", help="Only report what has run so far")] = False,
    results_dir: Annotated[
        Path, Option(parser=folder_path, metavar="DIR", help="Folder of the results")
    ] = Path("results"),
    output: Output = None,
) -> int:
    """Reproduce a table or figure of the papers, or of this project's documentation."""
    for option, number in (("seeds", seeds), ("jobs", jobs)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} is {number}; allowed: 1 or more")
    if name not in reproducible():
        raise ConfigError(f"name is {name!r}; allowed: {', '.join(reproducible())}")
    if output is not None:
        _make_folder("output", output)
    if name not in FIGURES:
        study = study_named(name)
        shorter = study.changed(
            rows=row, columns=column, seeds=seeds, epochs=epochs, config={"device": device}
        )
        length = "" if shorter.epochs is None else f"-{shorter.epochs:g}-epochs"
        folder = results_dir.resolve() / f"{name}{length}"
        _make_folder("results-dir", folder)
        return _run_study(
            shorter,
            folder,
            full=study,
            output=output,
            backend=backend,
            jobs=jobs or 2,
            no_run=no_run,
        )
    # What has no bearing on these is refused rather than ignored.
    unusable = {
        "epochs": epochs is not None,
        "device": device != "auto",
        "backend": backend != "inprocess",
        "no-run": no_run,
        "row": row is not None,
        "column": column is not None,
        "jobs": jobs is not None and not FIGURES[name].takes_jobs,
    }
    for option in (option for option, is_given in unusable.items() if is_given):
        raise ConfigError(f"{option} is given with {name}; allowed with: the tables' runs")
    _require_plots()
    folder = output or _make_folder("results-dir", results_dir.resolve() / name)
    with CONSOLE.status(name) as status:
        table = reproduce_figure(name, folder, seeds=seeds, jobs=jobs or 2, done=status.update)
    print(table.read_text(encoding="utf-8"))
    CONSOLE.print(f"written: {folder}", soft_wrap=True)
    return 0


@app.command()
def report(
    results: Annotated[list[str], Argument(metavar="FOLDERS...")],
    output: Output = None,
    title: Annotated[str, Option(help="Heading of the table and the figures", metavar="TEXT")] = "",
) -> int:
    """Write the table, the figures and the report of finished runs again.

    FOLDERS are those of studies, which are drawn together, or that of a single run.
    """
    _require_plots()
    folders = [folder_path(text) for text in results]
    if len(folders) == 1 and (folders[0] / "run.json").is_file():
        return _report_run(folders[0], output, title)
    lines = read_lines(folders)
    study = Study(
        {line["row"]: {} for line in lines},
        {line["column"]: {} for line in lines},
        seeds=max(1, len({line["seed"] for line in lines})),
        title=title,
    )
    folder = _make_folder("output", output) if output is not None else folders[0]
    return _show(study, study, lines, folders[0], folder)


@app.command()
def evaluate(
    run_folder: Annotated[Path, Argument(parser=folder_path, metavar="FOLDER")],
    model: Annotated[Literal["final", "best"], Option(help="Which of the two")] = "final",
) -> int:
    """Evaluate the model of a run, in its FOLDER, on all test examples."""
    try:
        found = evaluate_saved(run_folder, model)
    except OSError as error:
        raise ConfigError(
            f"folder is {str(run_folder)!r} ({error.strerror}); allowed: that of a run with "
            "save-model"
        ) from error
    CONSOLE.print(f"accuracy {found.accuracy:.4f}, loss {found.loss:.4f}")
    return 0


def _report_run(folder: Path, output: Path | None, title: str) -> int:
    """Write the page of a single run's folder."""
    require("plotly", "report.html", "plots")
    from .report.page import write_run_page

    place = None if output is None else _make_folder("output", output)
    path = write_run_page(folder, place, title=title)
    CONSOLE.print(f"written: {path}", soft_wrap=True)
    return 0


def _run_study(
    study: Study,
    folder: Path | None,
    *,
    full: Study | None = None,
    output: Path | None = None,
    backend: str = "inprocess",
    resources: ClientResources | None = None,
    jobs: int = 1,
    verbose: bool = False,
    no_run: bool = False,
) -> int:
    """Run what is missing of a study, show its table and write its report; return the status."""
    if not verbose:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
    _require_plots()
    if backend in ON_RAY:
        require("ray", f"backend {backend}", "simulation")
    cells = study.cells()
    for cell in cells:
        check_log(cell.config, folder or Path())  # it will have one
    _tell_limits(cell.config for cell in cells)
    for cell in cells:
        if cell.config["checkpoint-dir"]:
            _make_folder("checkpoint-dir", Path(str(cell.config["checkpoint-dir"])))
    option = "results-dir" if folder is None else "folder"
    folder = _make_folder(option, folder or _new_folder(study, cells[0].config))
    found = finished_before(cells, folder)
    if no_run:
        lines = [found[cell.name] for cell in cells if cell.name in found]
    else:
        for name, place in {(c.config["dataset"], c.config["data-dir"]): None for c in cells}:
            load(str(name), str(place) or None, progress=CONSOLE.print)
        lines = _run_cells(cells, folder, found, backend, resources, jobs)
    if not lines:
        raise ConfigError(f"results holds nothing of {study.name}; allowed: a folder with runs")
    return _show(study, full or study, lines, folder, output or folder)


def _require_plots() -> None:
    """Check what a command needs at its end before hours of computing."""
    for module, purpose in (("matplotlib", "plots"), ("pandas", "tables"), ("tabulate", "tables")):
        require(module, purpose, "plots")


def _run_cells(
    cells: list[Cell],
    folder: Path,
    found: dict[str, Line],
    backend: str,
    resources: ClientResources | None,
    jobs: int,
) -> list[Line]:
    with StudyProgress(CONSOLE, cells, found) as progress:
        return run_cells(
            cells,
            folder,
            backend=backend,
            resources=resources,
            jobs=jobs,
            found=found,
            on_progress=progress.round_done,
            on_done=progress.cell_done,
        )


def _show(study: Study, full: Study, lines: list[Line], folder: Path, output: Path) -> int:
    """Show the table of a study and write its report; return the exit status."""
    from .report.page import NO_PLOTLY, has_plotly, runs_in, write_page
    from .report.study import heading, table_of, write_report
    from .report.tables import show

    show(CONSOLE, table_of(study, lines), heading(study, full, lines))
    written = [*write_report(study, full, lines, folder, output), folder / "cells.jsonl"]
    if has_plotly():
        frame = table_of(study, lines)
        table = [[str(name) for name in frame], *frame.astype(str).to_numpy().tolist()]
        about = heading(study, full, lines).replace("*", "")
        few = len(study.rows) < 5
        name = study.title or (", ".join(study.rows) if few else f"{len(study.rows)} strategies")
        runs = runs_in(lines, folder)
        written.append(write_page(output, runs, title=name, about=about, table=table))
    else:
        CONSOLE.print(NO_PLOTLY, soft_wrap=True)
    for path in written:
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    failed = [line for line in lines if line["status"] == "failed"]
    for line in failed:
        name = f"{line['row']}, {line['column']}, seed {line['seed']}"
        print(f"error: {name}: {line['error']}", file=sys.stderr)
    return EXIT_RUN_FAILED if failed else 0


def _tell_limits(configs: Iterable[Config]) -> None:
    """Say, once each, where a rule is asked for more than it is proved to do."""
    for note in dict.fromkeys(note for config in configs for note in beyond_guarantee(config)):
        print(f"note: {note}", file=sys.stderr)


def _make_folder(option: str, folder: Path) -> Path:
    """Create the folder of an option; raise :class:`ConfigError` where nothing can be written."""
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{option} is {str(folder)!r} ({error.strerror}); allowed: a folder that can be written"
        ) from error
    return folder


def _new_folder(study: Study, config: Config) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{study.name}"
    return Path(str(config["results-dir"])).resolve() / name


def _resources(study: Study, backend: str, num_cpus: float, num_gpus: float) -> ClientResources:
    # Only Ray joins a cluster.
    address = str(study.config.get("ray-address", "")) if backend in ON_RAY else ""
    return ClientResources(num_cpus, num_gpus, address)


# ------------------------------------------------------------------------ what there is


@app.command()
def keys(
    pattern: Annotated[str, Argument(show_default=False)] = "",
) -> int:
    """List the keys of the run configuration.

    PATTERN is a part of their names: lr, *-fraction.
    """
    found = [key for key in SETTINGS if fnmatch.fnmatchcase(key, f"*{pattern}*")]
    if not found:
        raise ConfigError(f"pattern is {pattern!r}; allowed: part of {', '.join(SETTINGS)}")
    print_keys(CONSOLE, (SETTINGS[key] for key in found))
    return 0


@app.command()
def attacks(
    dataset: Annotated[Literal[DATASETS], Option(help="Data set of the picture")] = "cifar10",  # type: ignore[valid-type]
    data_dir: DataDir = "",
    picture: Annotated[
        Path | None, Option(parser=folder_path, metavar="DIR", help="Draw data-attacks.png there")
    ] = None,
) -> int:
    """List the attacks, and draw what they do to images."""
    if picture is not None:
        _require_plots()
        _make_folder("picture", picture)
    print_attacks(CONSOLE)
    if picture is not None:
        from .report.plots import plot_data_attacks

        path = plot_data_attacks(load(dataset, data_dir or None, progress=CONSOLE.print), picture)
        CONSOLE.print(f"written: {path}", soft_wrap=True)
    return 0


@app.command()
def data(
    names: Annotated[list[str] | None, Argument(metavar="[NAMES]...")] = None,
    dataset: Annotated[list[str], Option("--dataset", hidden=True)] = [],  # noqa: B006
    data_dir: DataDir = "",
) -> int:
    """Download and check data sets.

    NAMES: cifar10 (the default), fashion-mnist, mnist.
    """
    for name in [*dataset, *(names or ())] or ["cifar10"]:
        if name not in DATASETS:
            raise ConfigError(f"dataset is {name!r}; allowed: {', '.join(DATASETS)}")
        found = load(name, data_dir or None, progress=CONSOLE.print)
        CONSOLE.print(
            f"{name}: {len(found.train_labels)} training and {len(found.test_labels)} test "
            f"images, checksums right, in {data_directory(data_dir or None) / name}"
        )
    return 0
