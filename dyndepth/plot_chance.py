"""What blind choice would score: the line below which an accuracy says nothing of a method.

Nothing here draws; the tables know chance (``dyndepth.results.leaderboard``), but for those of
older runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dyndepth.results.leaderboard import METRIC, OF_ACCURACY

if TYPE_CHECKING:
    import pandas as pd


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
    if not known or not table["chance"].notna().any():
        return None
    chance = float(table["chance"].mean())
    return chance / dense if metric == "retained" else chance
