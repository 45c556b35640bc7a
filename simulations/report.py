"""Tables and plots of finished runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from fl_bgmd.attacks import ATTACKS
from fl_bgmd.data import Dataset
from fl_bgmd.options import Option

from .experiment import RunResult

COLUMNS = (
    "strategy",
    "status",
    "final",
    "best",
    "worst class",
    "backdoor",
    "s / round",
    "accepted",
    "rejected",
    "MB up",
    "MB down",
)


def rows(results: Mapping[str, RunResult]) -> list[tuple[str, ...]]:
    """Return the cells of the table of results, one row for each run.

    ``worst class`` is the accuracy on the class that is recognised least, ``backdoor`` the share
    of the other classes' examples that are taken for a backdoor's target, both at the end.
    """
    return [
        (
            name,
            result.status,
            _percent(result.final_accuracy),
            _percent(result.best_accuracy),
            _percent(min(result.last("class-accuracies", [float("nan")]))),
            _percent(result.last("backdoor-success", float("nan"))),
            "-" if math.isnan(result.seconds_per_round) else f"{result.seconds_per_round:.2f}",
            str(result.total("accepted")),
            str(result.total("rejected")),
            f"{result.total('bytes-up') / 1e6:.1f}",
            f"{result.total('bytes-down') / 1e6:.1f}",
        )
        for name, result in results.items()
    ]


def results_table(results: Mapping[str, RunResult]) -> Table:
    """Return the table of results for the terminal."""
    table = Table(title="Test accuracy, all test examples")
    for column in COLUMNS:
        is_text = column in COLUMNS[:2]
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows(results):
        table.add_row(*row)
    return table


def write_markdown(results: Mapping[str, RunResult], folder: Path) -> Path:
    """Write the table of results to ``folder/table.md``; return the path."""
    return _write_table([COLUMNS, tuple("---" for _ in COLUMNS), *rows(results)], folder)


def plot_accuracy(
    results: Mapping[str, RunResult], folder: Path, *, against_bytes: bool = False
) -> Path:
    """Plot test accuracy against rounds to ``folder/accuracy.png``; return the path.

    ``against_bytes`` puts the bytes of arrays sent up so far on the axis: ``bytes.png``.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, result in results.items():
        points = result.accuracies
        axis = [result.bytes_up_to(number) / 1e6 for number in points] if against_bytes else points
        label = name if result.status == "finished" else f"{name} ({result.status})"
        axes.plot(list(axis), [100 * value for value in points.values()], label=label, lw=1.8)
    config = next(iter(results.values())).config
    axes.axhline(10, color="grey", lw=0.8, ls=":", label="chance")
    attack = str(config["attack"])
    if attack != "none":
        attack += f", {float(config['byzantine-fraction']):.0%} {config['byzantine-selection']}"
    axes.set(
        title=f"{config['dataset']}, {config['model']}, {config['num-clients']} clients "
        f"({config['partition']}), attack: {attack}",
        xlabel="MB sent to the server" if against_bytes else "round",
        ylabel="test accuracy (%)",
        ylim=(0, None),
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / ("bytes.png" if against_bytes else "accuracy.png")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def grid_table(attacks: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """Return the strategy x attack table of final accuracies, in percent, for the terminal."""
    table = Table(title="Final test accuracy (%), all test examples: the worst of the strengths")
    table.add_column("strategy", no_wrap=True)
    for attack in attacks:
        table.add_column(attack, justify="right", no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *(_short(value) for value in values))
    return table


def write_grid(attacks: Sequence[str], rows: Mapping[str, Sequence[float]], folder: Path) -> Path:
    """Write the strategy x attack table to ``folder/table.md``; return the path."""
    lines: list[Sequence[str]] = [
        ("strategy", *attacks),
        ("---", *("---:" for _ in attacks)),
        *((name, *(_short(value) for value in values)) for name, values in rows.items()),
    ]
    return _write_table(lines, folder)


def plot_grid(
    attacks: Sequence[str], rows: Mapping[str, Sequence[float]], title: str, folder: Path
) -> Path:
    """Draw the strategy x attack table as a heat map to ``folder/heatmap.png``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    values = np.array([list(row) for row in rows.values()]) * 100
    size = (2.5 + 0.55 * len(attacks), 1.8 + 0.34 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.axvline(len(attacks) - 1.5, color="black", lw=1.5)
    for i, j in np.ndindex(values.shape):
        axes.text(j, i, _short(float(values[i, j]) / 100), ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="final test accuracy (%)")
    path = folder / "heatmap.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def attacks_table() -> Table:
    """Return the list of attacks for the terminal."""
    table = Table(title="Attacks")
    for column in ("name", "place", "knows", "options", "authors' code", "source"):
        table.add_column(column, no_wrap=column in ("name", "place", "knows"))
    for name, attack in ATTACKS.items():
        options = "\n".join(
            f"{option.key}={_plain(option.default)}: {option.help}"
            for option in attack.options.values()
        )
        codes = ", ".join(f"{value:g} {data}" for data, value in attack.authors_code.items())
        table.add_row(name, attack.place, attack.knows, options, codes.strip(), attack.source)
    return table


def keys_table(options: Iterable[Option]) -> Table:
    """Return keys of the run configuration for the terminal."""
    table = Table(title="Run configuration")
    for column in ("key", "default", "allowed", "help"):
        table.add_column(column, no_wrap=column == "key")
    for option in options:
        given = option.default
        default = (given or "(empty)") if isinstance(given, str) else _plain(given)
        table.add_row(option.name, default, escape(option.allowed), escape(option.help))
    return table


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def plot_data_attacks(dataset: Dataset, folder: Path, examples: int = 5, seed: int = 0) -> Path:
    """Draw what each data attack makes of training images to ``folder/data-attacks.png``.

    As Figure 4 of the BGMD paper: one column for each attack, with its default options, the label
    it trains on above each image.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = np.random.default_rng(seed).choice(len(dataset.train_labels), examples, replace=False)
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    columns = {"original": (images, labels)}
    for name, attack in ATTACKS.items():
        if attack.place == "data":
            rng = np.random.default_rng(seed)
            knob = next(iter(attack.options.values()), None)
            columns[name if knob is None else f"{name} {_plain(knob.default)}"] = (
                attack.bound().corrupt(images, labels, dataset.num_classes, rng)
            )
    size = (1.35 * len(columns), 1.45 * examples)
    figure, axes = plt.subplots(
        examples, len(columns), figsize=size, layout="constrained", squeeze=False
    )
    for j, (name, (shown, trained_on)) in enumerate(columns.items()):
        for i in range(examples):
            axes[i, j].imshow(shown[i], cmap="gray", vmin=0, vmax=255)
            axes[i, j].set_axis_off()
            changed = trained_on[i] != labels[i]
            axes[i, j].set_title(
                f"{name}\n{trained_on[i]}" if i == 0 else str(trained_on[i]),
                fontsize=9,
                color="firebrick" if changed else "black",
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data-attacks.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def counted(number: object, thing: str) -> str:
    """Return ``1 seed``, ``3 seeds``, ``1 or 2 seeds``."""
    return f"{number} {thing}" + ("" if str(number) == "1" else "s")


def _write_table(lines: Sequence[Sequence[str]], folder: Path) -> Path:
    path = folder / "table.md"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _short(value: float) -> str:
    return "failed" if math.isnan(value) else f"{100 * value:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2%}"
