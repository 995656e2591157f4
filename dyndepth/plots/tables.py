"""From a run's tables to what the figures draw: short names, seeds averaged, the Pareto front.

Nothing here draws. A curve is one method with its parameters; its points are its target speedups.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndepth.cells import naming
from dyndepth.cells.cell import DENSE
from dyndepth.cells.identity import today
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.results.columns import TIMING
from dyndepth.results.fields import unquoted
from dyndepth.results.leaderboard import METRIC, OF_ACCURACY
from dyndepth.results.schema import validate
from dyndepth.results.statistics.intervals import LEAST

if TYPE_CHECKING:
    import pandas as pd


NEEDED = ("accuracy", "compute", "timing", "routing", "leaderboard")
OPTIONAL = ("comparison", "curves", "equal_flops")
"""Tables of a run folder: ``NAME.csv``, or ``NAME.parquet`` where there are many rows."""
SAME_BUDGET = 0.01
"""Speedups that differ by less than this share of themselves count as one on a Pareto front."""

METRICS = {
    "mean_acc": "mean accuracy",
    "retained": "accuracy retained, fraction of dense's",
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "bits_per_byte": "bits per byte",
    "rouge_l": "ROUGE-L",
    "rougeL": "ROUGE-L",
}
LOWER_IS_BETTER = {"bits_per_byte"}
MAIN = ("acc", "bits_per_byte", "rougeL")
"""Metrics that stand for a task, the first that it has."""
_NORMAL = 1.96  # standard errors to either side of a 95% interval
_TEXT = dict.fromkeys(("cell", "parameters", "recovery", "phases"), str)
SETTING = ("model", "model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "dtype")
"""Columns whose values one figure does not mix."""


def read_tables(
    run: str | Path, names: Sequence[str] = (*NEEDED, *OPTIONAL)
) -> dict[str, pd.DataFrame]:
    """The tables of a run folder by name, samples apart, each with a ``label`` for a row's cell.

    ``names`` are those that are wanted; ``leaderboard``, which all depend on, is always read.

    Labels stand in the order of the whole run, so that a method has the same colour in all
    figures, and digests are those of today. ``leaderboard`` has one more column,
    ``accuracy_tasks``. Raises UserError if the folder holds no leaderboard.csv, or a table that is
    cut off, cannot be read, or holds what its schema does not allow.
    """
    import pandas as pd

    run = path_of(run)
    if not (run / "leaderboard.csv").is_file():
        raise UserError(f"{run} holds no leaderboard.csv; give the --output_path of a sweep")
    found = {}
    for name in dict.fromkeys((*names, "leaderboard")):
        path = run / f"{name}.csv"
        if path.is_file():
            table = _table(path)
        elif path.with_suffix(".parquet").is_file():
            table = _table(path.with_suffix(".parquet"))
        else:
            continue
        if name == "timing":
            for column, value in TIMING.defaults.items():
                table[column] = table[column].fillna(value) if column in table else value
        if "parameters" in table:
            table["parameters"] = table["parameters"].fillna("")
        for column in ("model_fingerprint", "corpus_fingerprint"):
            if column in table:
                table[column] = table[column].map(today)
        found[name] = table
    board = found["leaderboard"]
    ordered = labels(board)
    of_cell = pd.Series(pd.Categorical(ordered, _in_order(ordered)), board["cell"])
    for table in found.values():
        if "cell" in table:
            for column in ("bound", "lossless"):
                if column not in board:
                    board[column] = False
                if column not in table:
                    table[column] = table["cell"].map(board.set_index("cell")[column])
            known = table["cell"].map(of_cell.astype(str).to_dict())
            table["label"] = pd.Categorical(known, of_cell.cat.categories)
    name_tasks(found)
    return found


def _table(path: Path) -> pd.DataFrame:
    """One table's file, looked at by its schema. Raises UserError."""
    import pandas as pd

    remedy = "`python -m dyndepth.tables RUN` writes a run's tables anew"
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            _check_fields(path)
            table = pd.read_csv(path, dtype=_TEXT, low_memory=False)
            for column in table.select_dtypes(["object", "string"]):
                table[column] = table[column].map(_unquoted).astype(table[column].dtype)
    except (OSError, ValueError, csv.Error) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(f"{path} can't be read as a table ({reason}); {remedy}") from fault
    try:
        validate(path.name, table)
    except UserError as fault:
        raise UserError(f"{path.parent}: {fault}; {remedy}") from fault
    # In one piece: columns that a file of before lacks were put in one by one.
    return table.copy()


def _unquoted(value: Any) -> Any:
    return unquoted(value) if isinstance(value, str) else value


def _check_fields(path: Path) -> None:
    """Raises ValueError for a row with too few fields or too many: pandas would fill it up."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        for row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} fields, the header {len(header)}"
                )


def labels(table: pd.DataFrame) -> list[str]:
    """The short name of each row (dyndepth.cells.naming)."""
    keys = ["method", "parameters", "phases", "recovery"]
    keys += ["lossless"] if "lossless" in table else []
    rows = table[keys].fillna("").itertuples(index=False, name=None)
    return [naming.label(dict(zip(keys, row, strict=True))) for row in rows]


def _in_order(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with its ``label`` column, made from the table itself if it has none."""
    import pandas as pd

    if "label" in table:
        return table
    names = labels(table)
    return table.assign(label=pd.Categorical(names, _in_order(names)))


def task_table(
    accuracy: pd.DataFrame, compute: pd.DataFrame, task: str, metric: str | None = None
) -> pd.DataFrame:
    """One task's scores shaped as a leaderboard: a row a cell, with the task's own speedups.

    The metric's columns are ``metric``, ``metric_low`` and ``metric_high`` (95%, from the standard
    error over documents); without ``metric`` the first of ``MAIN`` that the task has. Raises
    UserError for a task or metric that the table lacks, or several versions of the task.
    """
    rows = accuracy[accuracy["task"] == task]
    metric = metric or main_metric(accuracy, task)
    rows = rows[rows["metric"] == metric]
    if rows.empty:
        raise UserError(f"accuracy.csv has no {metric} of a task {task}")
    if rows["task_version"].nunique() > 1:
        raise UserError(f"rows of several versions of the task {task} belong in separate figures")
    # The first filter stands for the task, as in the leaderboard.
    rows = rows.drop_duplicates("cell").copy()
    spent = compute[(compute["task"] == task) & (compute["phase"] == "all")]
    rows[metric] = rows["value"]
    # Of few documents there is no interval.
    margin = (_NORMAL * rows["stderr"]).where(rows["n"] >= LEAST)
    rows[f"{metric}_low"] = rows["value"] - margin
    rows[f"{metric}_high"] = rows["value"] + margin
    return rows.merge(spent[["cell", "block_speedup", "total_speedup"]], on="cell", how="left")


def main_metric(accuracy: pd.DataFrame, task: str) -> str:
    """The metric that stands for a task: the first of ``MAIN`` that it has, else its first."""
    there = accuracy.loc[accuracy["task"] == task, "metric"].dropna()
    if there.empty:
        raise UserError(f"accuracy.csv has no task {task}")
    return next((metric for metric in MAIN if metric in set(there)), there.iloc[0])


def points(table: pd.DataFrame, metric: str, across: str) -> pd.DataFrame:
    """One row a curve and target, averaged over seeds, without dense and what is lossless, which
    saves no FLOPs; curves in their order.

    Columns: ``label``, ``number`` (of the curve, from 0), ``bound``, ``recovery``,
    ``target_speedup``, ``x``, ``x_low``, ``x_high`` (the column ``across`` and its interval),
    ``value``, ``low``, ``high`` (``metric`` and its 95% interval; of several seeds, from the lowest
    end to the highest), ``seeds``. Missing intervals are the values themselves. Raises UserError
    where rows can't stand in one figure.
    """
    import pandas as pd

    check_one_setting(table)
    names = list(labelled(table)["label"].cat.categories)
    # Of several runs, dense has their letters.
    others = (name for name in names if name != DENSE and not name.startswith(f"{DENSE} ("))
    numbers = {name: n for n, name in enumerate(others)}
    table = usable(table, metric, across)
    table = table[~reference(table) & ~drafted(table)]
    rows = []
    for (label, target), group in table.groupby(["label", "target_speedup"], observed=True):
        if group["seed"].duplicated().any():
            cells = " and ".join(group.loc[group["seed"].duplicated(keep=False), "cell"][:2])
            raise UserError(
                f"the cells {cells} are both {label} at {target:g}x with the same seed, of "
                "different versions or settings; draw them from separate runs"
            )
        row = {"label": label, "number": numbers[label], "target_speedup": target}
        row |= {"bound": bool(group["bound"].any()), "seeds": len(group)}
        row |= {"recovery": group["recovery"].iloc[0]}
        row |= dict(zip(("value", "low", "high"), spread(group, metric), strict=True))
        row |= dict(zip(("x", "x_low", "x_high"), spread(group, across), strict=True))
        rows.append(row)
    columns = ["label", "number", "bound", "recovery", "target_speedup", "seeds"]
    columns += ["x", "x_low", "x_high", "value", "low", "high"]
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values(["number", "target_speedup"], ignore_index=True)


def mark_doubts(
    found: pd.DataFrame, table: pd.DataFrame, name: str, doubtful: pd.Series | None
) -> None:
    """Add to the ``points`` of ``table``, in place, the column ``name``: True where one of the
    seeds' rows is ``doubtful`` (by row of ``table``; None: no row is)."""
    rows = table[doubtful.astype(bool)] if doubtful is not None else table[:0]
    pairs = set(zip(rows["label"], rows["target_speedup"], strict=True))
    found[name] = [
        pair in pairs for pair in zip(found["label"], found["target_speedup"], strict=True)
    ]


def spread(group: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """Mean over seeds, and the lowest and highest end of their intervals where there are some."""
    values = group[column]
    mean = float(values.mean())
    if f"{column}_low" not in group:
        return mean, mean, mean
    low, high = (group[f"{column}_{end}"].fillna(values) for end in ("low", "high"))
    return mean, float(min(low.min(), values.min())), float(max(high.max(), values.max()))


def usable(table: pd.DataFrame, metric: str, across: str) -> pd.DataFrame:
    """Labelled rows that have both values. Raises UserError, saying which it lacks, for none."""
    table = labelled(table)
    if across == "block_fraction" and across not in table:
        table = table.assign(block_fraction=1 / table["block_speedup"])
    for column in (metric, across):
        if column not in table or not table[column].notna().any():
            raise UserError(f"the table has no values of {column}")
    return table[table[metric].notna() & table[across].notna()]


def reference(table: pd.DataFrame) -> pd.Series:
    """True for rows of dense without recovery: what all others are measured against."""
    return (table["method"] == DENSE) & (table["recovery"] == NONE)


def drafted(table: pd.DataFrame) -> pd.Series:
    """True for rows of methods that draft what the whole model verifies; tables that do not tell
    have none."""
    if "lossless" not in table:
        return table["method"] != table["method"]
    return table["lossless"].fillna(False).astype(bool)


def check_one_setting(table: pd.DataFrame) -> None:
    """Raise UserError if rows of several models or of different data would stand together, but for
    those of several runs, which have letters."""
    if "run" in table:
        return
    for column in SETTING:
        if column in table and table[column].nunique() > 1:
            there = ", ".join(map(str, sorted(table[column].dropna().unique())))
            raise UserError(f"rows of several values of {column} ({there}) need a figure each")


def on_front(
    found: pd.DataFrame, lower_is_better: bool, less_is_better: bool, chance: float | None = None
) -> pd.Series:
    """True for competitors that no other one with the same recovery beats in score and saving.

    ``less_is_better``: ``x`` is the share that is executed, not a speedup. Values of ``x`` within
    ``SAME_BUDGET`` of each other count as equal. Points whose interval holds ``chance`` show
    nothing and are on no front.
    """
    score = (-found["value"] if lower_is_better else found["value"]).to_numpy()
    speedup = (1 / found["x"] if less_is_better else found["x"]).to_numpy()
    compete = ~found["bound"].to_numpy(dtype=bool)
    recovery = found["recovery"].to_numpy()
    beaten = [
        bool((compete & (recovery == own) & (score >= v) & (speedup >= s * (1 - SAME_BUDGET))
              & ((score > v) | (speedup > s * (1 + SAME_BUDGET)))).any())
        for v, s, own in zip(score, speedup, recovery, strict=True)
    ]  # fmt: skip
    front = compete & ~np.array(beaten, dtype=bool)
    if chance is not None:
        front &= ((found["low"] > chance) | (found["high"] < chance)).to_numpy()
    return found["bound"].eq(False) & front


MEANS = ("mean_acc", "retained")
"""Metrics over all tasks with a chance level; of ``retained`` it is a share of dense's mean."""


def name_tasks(tables: dict[str, pd.DataFrame]) -> None:
    """Add to ``leaderboard``, in place, the column ``accuracy_tasks``: the names of the tasks in a
    row's mean accuracy."""
    if "accuracy" not in tables:
        return
    accuracy, board = tables["accuracy"], tables["leaderboard"]
    own = accuracy[accuracy["metric"] == METRIC].drop_duplicates(["cell", "task"])
    names = {cell: ", ".join(tasks) for cell, tasks in own.groupby("cell")["task"]}
    board["accuracy_tasks"] = [names.get(cell, "") for cell in board["cell"]]


def chance_of(table: pd.DataFrame, metric: str, dense: float) -> float | None:
    """The chance level of ``metric`` in ``table``, None where it has none; ``dense`` is dense's
    value of the metric that ``retained`` is a share of."""
    known = metric in (*OF_ACCURACY, *MEANS) and "chance" in table
    # Runs that scored other tasks have other chance levels.
    known = known and ("run" not in table or table["chance"].round(6).nunique() == 1)
    if not known or not table["chance"].notna().any():
        return None
    chance = float(table["chance"].mean())
    return chance / dense if metric == "retained" else chance
