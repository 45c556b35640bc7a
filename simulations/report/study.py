"""The report of a study: one table, and the figures that its runs allow."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..experiment import RunResult
from ..runner import Line, result_of, row_of
from ..study import Study, rounds_per_epoch
from .plots import (
    FEWEST_RANKED,
    MOST_PANELS,
    Runs,
    axes_of,
    places_of,
    plot_curves,
    plot_heat_map,
    plot_ranks,
)
from .tables import (
    accuracies,
    accuracy_means,
    chosen,
    counted,
    details,
    with_published,
    write_markdown,
)


def write_report(
    study: Study, full: Study, lines: Sequence[Line], folder: Path, output: Path
) -> list[Path]:
    """Write the table and the figures of a study to ``output``; return the paths.

    Parameters
    ----------
    study : Study
        For its title, its curves and what a paper printed.
    full : Study
        The same, or the full protocol that it is a part of.
    lines : sequence of dict
        Of its runs.
    folder : Path
        Where the runs are; curves are drawn of those that are there.
    output : Path
        For ``table.md`` and the PNG figures.
    """
    output.mkdir(parents=True, exist_ok=True)
    lines = chosen(lines)
    title = study.title or title_of(lines)
    paths = [write_markdown(output, heading(study, full, lines), table_of(study, lines))]
    if len({line["column"] for line in lines}) > 1:
        means = accuracy_means(lines)
        paths.append(plot_heat_map(means, title, output))
        if min(places_of(means).shape) >= FEWEST_RANKED:
            paths.append(plot_ranks(means, title, output))
    runs = runs_of(lines, folder)
    if not 0 < len({column for _, column in runs}) <= MOST_PANELS:
        return paths
    drawn = [("accuracy", axis) for axis in axes_of(runs)] + [
        (name, "rounds") for name in study.curves
    ]
    return paths + [plot_curves(runs, metric, axis, title, output) for metric, axis in drawn]


def table_of(study: Study, lines: Sequence[Line]) -> pd.DataFrame:
    """Return the table of a study: details of one column, accuracies of several."""
    lines = chosen(lines)
    if len({line["column"] for line in lines}) == 1 and not study.published:
        return details(lines)
    published = {column: dict(entries) for column, entries in study.published.items()}
    return with_published(accuracies(lines), published)


def runs_of(lines: Sequence[Line], folder: Path) -> Runs:
    """Return the runs of lines, as far as a study's folder or the lines themselves hold them."""
    runs: dict[tuple[str, str], list[RunResult]] = {}
    for line in lines:
        result = result_of(line, folder)
        if result is not None:
            runs.setdefault((row_of(line), line["column"]), []).append(result)
    return runs


def title_of(lines: Sequence[Line]) -> str:
    """Return what runs have in common, in a line."""
    setting = lines[0]["setting"]
    attacks = {line["setting"]["attack"] for line in lines}
    fraction = max(float(line["setting"]["byzantine-fraction"]) for line in lines)
    hostile = f"{fraction:.0%} hostile, {setting['byzantine-selection']}"
    told = "" if attacks == {"none"} else f", {hostile}"
    if len(attacks) == 1:
        told = f", attack: {attacks.pop()}" + told
    return (
        f"{setting['dataset']}, {setting['model']}, {setting['num-clients']} clients "
        f"({setting['partition']}){told}"
    )


def heading(study: Study, full: Study, lines: Sequence[Line]) -> str:
    """Return what a table stands on: its source, length and seeds, and what is missing."""
    settings = [line["setting"] for line in lines]
    counts: dict[tuple[str, str], int] = {}
    for line in lines:
        counts[line["row"], line["column"]] = counts.get((line["row"], line["column"]), 0) + 1
    seeds = counted(" or ".join(map(str, sorted(set(counts.values())))), "seed")
    if study.epochs is None:
        rounds = sorted({int(setting["num-server-rounds"]) for setting in settings})
        length = counted(", ".join(map(str, rounds)), "round")
    else:
        epochs = {f"{int(s['num-server-rounds']) / rounds_per_epoch(s):.3g}" for s in settings}
        length = counted(", ".join(sorted(epochs)), "epoch")
    source = f" ({study.source})" if study.source else ""
    text = (
        f"**{study.title or title_of(lines)}**{source}. Test accuracy in % after {length}, "
        f"{counted_mean(seeds)}"
    )
    if missing := study.seeds * len(study.rows) * len(study.columns) - len(lines):
        text += f"; {missing} runs are missing"
    if full.epochs is not None:
        length = counted(f"{full.epochs:g}", "epoch")
        text += f". The full protocol is {length} and {counted(full.seeds, 'seed')}"
    if study.published:
        text += "; *in italics what the paper prints*, - where its training diverged"
    return text + "."


def counted_mean(seeds: str) -> str:
    """Return what an entry stands on."""
    return seeds if seeds == "1 seed" else f"mean ± standard deviation of {seeds}"
