"""Tables of studies, in the terminal and in Markdown."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from fl_bgmd.attacks import ATTACKS

from ..runner import Line, row_of
from ..terminal import print_table

FAILED = "failed"
MISSING = "-"
WORST = "worst"
MEAN = "mean"
SECONDS = "s / round"


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers to the right."""
    align = ["left" if is_text(frame[name]) else "right" for name in frame]
    return str(frame.to_markdown(index=False, colalign=align, disable_numparse=True))


def write_markdown(folder: Path, *parts: str | pd.DataFrame) -> Path:
    """Write paragraphs and tables to ``folder/table.md``; return the path."""
    texts = [markdown(part) if isinstance(part, pd.DataFrame) else part for part in parts]
    path = folder / "table.md"
    path.write_text("\n\n".join(filter(None, texts)) + "\n", encoding="utf-8")
    return path


def show(console: Console, frame: pd.DataFrame, heading: str) -> None:
    """Print a study's table in the terminal, and below it what it stands on."""
    print_table(
        console,
        {str(name): [str(value) for value in frame[name]] for name in frame},
        dropped=_dropped(frame),
        elsewhere="all columns: table.md",
        right=[str(name) for name in frame if not is_text(frame[name])],
        caption=heading.replace("*", ""),
    )


_OF_DETAILS = (
    *("MB down", "accepted", "MB up", "best", SECONDS, "rejected", "backdoor", "worst class"),
    "status",
)


def _dropped(frame: pd.DataFrame) -> list[str]:
    """Return the columns that a narrow terminal can do without, the first to go first.

    Of one column's details those that say nothing of the accuracy; of several attacks the one that
    does the least harm to any row, and their mean when all of them are gone. What never goes: the
    rows' names, the accuracy, the worst case.
    """
    names = [str(name) for name in frame]
    if "status" in names:
        there = [name for name in _OF_DETAILS if name in names]
        return sorted(there, key=lambda name: set(frame[name]) != {MISSING})
    success = [name for name in names if name.endswith(" success")]
    beside = [name for name in (SECONDS, *success, "worst class") if name in names]
    others = (WORST, MEAN, "none", *beside)
    attacks = [name for name in names[1:] if name not in others]
    attacks.sort(key=lambda name: _least(list(frame[name])), reverse=True)
    return [*beside, *attacks, *([MEAN] if MEAN in names else [])]


def _least(entries: Iterable[object]) -> float:
    """Return the least of the numbers that entries begin with, infinity without any."""
    found = (re.match(r"[*]*(\d+(\.\d+)?)", str(text)) for text in entries)
    return min((float(number.group(1)) for number in found if number), default=math.inf)


_NUMBER = re.compile(r"\**[-+]?[\d.,]+(e[-+]?\d+)?%?( ± [\d.e+-]+)?( \(.*\))?\**")


def is_text(column: "pd.Series[Any]") -> bool:
    """Whether a column of shown values holds words: no number among them."""
    return not any(_NUMBER.fullmatch(str(value)) for value in column)


# ------------------------------------------------------------------------- results of a study


def chosen(lines: Sequence[Line]) -> list[Line]:
    """Return, of each row, the lines of the variant that validation data choose.

    That with the best worst mean validation accuracy over the columns. Studies that choose nothing
    have one variant of each row.
    """
    variants: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        variants.setdefault(line["row"], {}).setdefault(row_of(line), []).append(line)
    found: list[Line] = []
    for of_row in variants.values():
        found += max(of_row.values(), key=_worst_validation)
    return found


def _worst_validation(lines: Iterable[Line]) -> float:
    lines = list(lines)
    if not lines[0].get("choice"):
        return 0.0
    means = over_seeds(lines, lambda line: line.get("validation-accuracy"))["mean"]
    return -1.0 if means.isna().any() else float(means.min())


def over_seeds(lines: Sequence[Line], value: Callable[[Line], float | None]) -> pd.DataFrame:
    """Return a value's mean and standard deviation over seeds.

    Index (row, group, column), columns ``mean``, ``std`` and ``count``. NaN where a run failed or
    is missing that another row has: a mean of what is there would compare different things.
    """
    found: dict[tuple[str, str, str, int], float] = {}
    for line in lines:
        result = None if line["status"] == FAILED else value(line)
        key = (row_of(line), _group(line), line["column"], line["seed"])
        found[key] = math.nan if result is None else float(result)
    runs = pd.Series(found, dtype="float64")
    runs.index.names = ["row", "group", "column", "seed"]
    wide = runs.unstack("row")
    by_cell = wide.groupby(level=["group", "column"], sort=False)
    mean, std = (by_cell.agg(_over(name)) for name in ("mean", "std"))
    parts = {"mean": mean, "std": std, "count": by_cell.count()}
    table = pd.concat({name: part.stack(future_stack=True) for name, part in parts.items()}, axis=1)
    return table.reorder_levels(["row", "group", "column"]).sort_index()


def _over(name: str) -> Callable[["pd.Series[float]"], float]:
    def statistic(seeds: "pd.Series[float]") -> float:
        return float(getattr(seeds, name)(skipna=False))

    return statistic


def worst_of_group(means: pd.DataFrame) -> pd.DataFrame:
    """Return, of each row and group, the column with the least mean; NaN if one is."""

    def least(of: pd.DataFrame) -> "pd.Series[float]":
        place = of["mean"].isna().argmax() if of["mean"].isna().any() else of["mean"].argmin()
        return of.iloc[int(place)]

    rows = means.groupby(level=["row", "group"], sort=False)
    return pd.DataFrame({key: least(of) for key, of in rows}).T


def accuracy_means(lines: Sequence[Line]) -> pd.DataFrame:
    """Return mean final accuracies, rows x groups: the worst of an attack's options.

    With several groups the last column is the worst of a row. A failed run makes its entry NaN.
    """
    return _with_worst(worst_of_group(over_seeds(lines, _accuracy))["mean"].unstack(), lines)


def accuracies(lines: Sequence[Line]) -> pd.DataFrame:
    """Return the table of a study with several columns, as text.

    Final accuracy in percent, mean and standard deviation over seeds, the worst of an attack's
    options. ``worst class``, behind ``none``, is the accuracy on the class that is recognized least
    where nobody attacks; ``... success``, behind an attack with a target, the share of the other
    classes' examples that are taken for it, the most over the attack's options. ``worst`` is the
    least of a row, ``mean`` is over the columns with an attack. ``s / round`` is the mean over the
    seeds of the columns without one, of all where each has one.
    """
    means = accuracy_means(lines)
    attacked = [group for group in means.columns if group in set(map(_group, _attacked(lines)))]
    if attacked:
        means = means.assign(**{MEAN: means[attacked].mean(axis=1, skipna=False)})
    scatter = worst_of_group(over_seeds(lines, _accuracy))
    seeds = len({line["seed"] for line in lines})
    diverged = _diverged(lines)
    table: dict[str, list[str]] = {"": list(means.index)}
    classes = over_seeds(lines, lambda line: min(line.get("class-accuracies") or [math.nan]))
    success = over_seeds(lines, lambda line: line.get("backdoor-success"))
    targeted = {_group(x) for x in lines if x.get("backdoor-success") is not None}
    runs = [x for x in lines if x["status"] == FAILED]
    failed = {(row_of(x), group) for x in runs for group in (_group(x), WORST)}
    failed |= {(row_of(x), MEAN) for x in _attacked(runs)}
    for group in means.columns:
        entries = []
        for row in means.index:
            text = percent(means.at[row, group])
            if text == FAILED and (row, group) not in failed:
                text = MISSING
            if seeds > 1 and group not in (WORST, MEAN) and text not in (FAILED, MISSING):
                text += f" ± {100 * float(scatter.loc[(row, group), 'std']):.1f}"
            entries.append(text + diverged.get((row, group), ""))
        table[group] = entries
        if group == "none":
            table["worst class"] = [
                percent(classes["mean"].get((r, group, group))) for r in means.index
            ]
        if group in targeted:
            table[f"{group} success"] = [
                percent(success.loc[(row, group)]["mean"].max(skipna=False)) for row in means.index
            ]
    seconds = _seconds(lines)
    table[SECONDS] = [_number(seconds[row]) for row in means.index]
    return pd.DataFrame(table)


def _attacked(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of runs with an attack."""
    return [line for line in lines if line["setting"]["attack"] != "none"]


def _seconds(lines: Sequence[Line]) -> "pd.Series[float]":
    """Return each row's seconds a round; NaN where a run that counts failed or is missing."""
    clean = [line for line in lines if line["setting"]["attack"] == "none"]
    means = over_seeds(clean or lines, lambda line: line["seconds-per-round"])["mean"]
    found = means.groupby(level="row").agg(lambda of: of.mean(skipna=False))
    return found.reindex(list(dict.fromkeys(map(row_of, lines))))


def details(lines: Sequence[Line]) -> pd.DataFrame:
    """Return the table of a study with one column, as text: what each row's runs did.

    Accuracies and times are means over seeds, counts and bytes are those of the first run.
    ``backdoor`` is the share of the other classes' examples that are taken for its target; without
    a backdoor there is no such column.
    """
    frame = pd.DataFrame([{**line, "row": row_of(line)} for line in lines])
    shown = []
    for row, runs in frame.groupby("row", sort=False):
        values, first = 100 * runs["final-accuracy"], runs.iloc[0]
        scatter = f" ± {values.std():.2f}" if len(runs) > 1 else ""
        least = runs["class-accuracies"].map(lambda found: min(found or [math.nan])).mean()
        success = pd.to_numeric(runs["backdoor-success"]).mean()
        shown.append(
            {
                "strategy": row,
                "status": ", ".join(dict.fromkeys(runs["status"])),
                "final": "-" if values.isna().any() else f"{values.mean():.2f}{scatter}",
                "best": _number(100 * runs["best-accuracy"].mean()),
                "worst class": _number(100 * least),
                "backdoor": _number(100 * success),
                SECONDS: _number(runs["seconds-per-round"].mean()),
                "accepted": str(first["accepted"]),
                "rejected": str(first["rejected"]),
                "MB up": f"{first['bytes-up'] / 1e6:.1f}",
                "MB down": f"{first['bytes-down'] / 1e6:.1f}",
            }
        )
    table = pd.DataFrame(shown)
    return table if (table["backdoor"] != MISSING).any() else table.drop(columns="backdoor")


def with_published(frame: pd.DataFrame, published: dict[str, dict[str, str]]) -> pd.DataFrame:
    """Return a table with the paper's entries, in italics, in a line below each row's own.

    Where there are any, the mean and the seconds are left out: papers print neither, and their
    tables are wide.
    """
    if published:
        frame = frame.drop(columns=[MEAN, SECONDS], errors="ignore")
    lines: list[dict[str, str]] = []
    for record in frame.to_dict("records"):
        line = {str(name): str(value) for name, value in record.items()}
        lines.append(line)
        theirs = {
            column: f"*{entries[line['']]}*"
            for column, entries in published.items()
            if entries.get(line[""])
        }
        if theirs:
            lines.append({**theirs, "": f"*{line['']}, paper*"})
    return pd.DataFrame(lines, columns=frame.columns).fillna("")


def percent(value: Any) -> str:
    """Return a share as percent with one decimal, ``failed`` for NaN."""
    return FAILED if value is None or math.isnan(float(value)) else f"{100 * value:.1f}"


def counted(number: object, thing: str) -> str:
    """Return ``1 seed``, ``3 seeds``, ``1 or 2 seeds``."""
    return f"{number} {thing}" + ("" if str(number) == "1" else "s")


def _accuracy(line: Line) -> float:
    return float(line["final-accuracy"])


def _group(line: Line) -> str:
    return str(line.get("group", line["column"]))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _with_worst(table: pd.DataFrame, lines: Sequence[Line]) -> pd.DataFrame:
    """Return a rows x groups table in the order of the study, with the worst of each row last."""
    groups = list(dict.fromkeys(map(_group, lines)))
    known = [name for name in ("none", *ATTACKS) if name in groups]
    groups = known + [name for name in groups if name not in known]
    table = table.loc[list(dict.fromkeys(map(row_of, lines))), groups]
    return table.assign(**{WORST: table.min(axis=1, skipna=False)})


def _diverged(lines: Sequence[Line]) -> dict[tuple[str, str], str]:
    """Return what is to be said of groups in which runs diverged."""
    found: dict[tuple[str, str], list[bool]] = {}
    for line in lines:
        key = (row_of(line), _group(line))
        found.setdefault(key, []).append(line["status"] == "diverged")
    return {
        key: " (diverged)" if all(runs) else f" ({sum(runs)} diverged)"
        for key, runs in found.items()
        if any(runs)
    }
