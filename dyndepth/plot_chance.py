"""What blind choice would score: the line below which an accuracy says nothing of a method.

Nothing here draws. Chance is read from a run's samples: a document that offers k answers is right
with a probability of 1 / k.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dyndepth.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

OF_ACCURACY = ("acc", "acc_norm", "mean_acc", "retained")
"""Metrics that have a chance level; of ``retained`` it is a share of dense's mean accuracy."""

READ = ("cell", "task", "metric", "outcome", "loglikelihoods")
"""Columns of the samples that chance is read from."""


def add_chance(tables: dict[str, pd.DataFrame], samples: pd.DataFrame | None) -> None:
    """Add columns in place: ``accuracy`` gets ``chance``, the mean of 1 / choices over the task's
    documents (empty where it offers none); ``leaderboard`` gets ``accuracy_tasks``, the names of
    the tasks in its mean accuracy, and ``chance``, the mean over them (0 where a task offers no
    choices, empty where none does). Without ``samples`` no chance is known.

    Raises UserError for samples whose likelihoods cannot be read.
    """
    accuracy, board = tables.get("accuracy"), tables["leaderboard"]
    if accuracy is None:
        return
    by_task = {} if samples is None else _chances(samples)
    keys = zip(accuracy["cell"], accuracy["task"], strict=True)
    accuracy["chance"] = [by_task.get(key, float("nan")) for key in keys]
    own = accuracy[accuracy["metric"] == "acc"].drop_duplicates(["cell", "task"]).groupby("cell")
    names = {cell: ", ".join(tasks) for cell, tasks in own["task"]}
    board["accuracy_tasks"] = [names.get(cell, "") for cell in board["cell"]]
    offered = own["chance"].count() > 0
    known = own["chance"].agg(lambda each: float(each.fillna(0).mean())).where(offered)
    board["chance"] = board["cell"].map(known)


def chance_of(table: pd.DataFrame, metric: str, dense: float) -> float | None:
    """The chance level of ``metric`` in a table that ``add_chance`` saw, None where it has none;
    ``dense`` is dense's value of the metric that ``retained`` is a share of."""
    if metric not in OF_ACCURACY or "chance" not in table or not table["chance"].notna().any():
        return None
    chance = float(table["chance"].mean())
    return chance / dense if metric == "retained" else chance


def _chances(samples: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(cell, task) -> chance, of tasks in which each document is right or wrong and offers at
    least two answers."""
    rows = samples.loc[samples["loglikelihoods"].notna(), ["cell", "task", "metric", "outcome"]]
    if rows.empty:
        return {}
    rows = rows.assign(choices=samples["loglikelihoods"].map(_count, na_action="ignore"))
    of_accuracy = rows["metric"].astype(str).str.startswith("acc")
    rows["fitting"] = of_accuracy & rows["outcome"].isin((0, 1))
    rows["share"] = 1 / rows["choices"].clip(lower=1)
    found = rows.groupby(["cell", "task"]).agg(
        fewest=("choices", "min"), fitting=("fitting", "all"), share=("share", "mean")
    )
    found = found[(found["fewest"] >= 2) & found["fitting"]].reset_index()
    keys = zip(found["cell"], found["task"], strict=True)
    return dict(zip(keys, found["share"], strict=True))


def _count(written: str) -> int:
    try:
        return len(json.loads(written))
    except (TypeError, ValueError) as fault:
        raise UserError(
            f"samples.parquet holds loglikelihoods that are no list: {written!r}; "
            "`python -m dyndepth.tables RUN` writes a run's tables anew"
        ) from fault
