"""What guessing scores: the mean accuracy of answers drawn at random among the choices.

A mean over tasks mixes questions of two choices with others of four, or of none at all, so what it
is to be held against is not seen from the number itself.
"""

from __future__ import annotations

import json
from collections import defaultdict

from dyndepth.cells.cell import Cell

METRIC = "acc"
"""The accuracy that the leaderboard's mean is of."""
OF_ACCURACY = (METRIC, "acc_norm")
"""Metrics that a guess among the choices scores 1 / choices of."""
TWICE = "acc_mutual_info"
"""A metric for which each choice is scored a second time, without its question."""


def by_task(cell: Cell) -> dict[str, float]:
    """Expected accuracy of guesses by task, of the tasks that have an accuracy: the mean over
    documents of 1 / choices, 0 where there is nothing to choose from. Empty if the cell does not
    tell.

    A document's choices are counted by its log-likelihoods.
    """
    tasks: dict[str, list[float]] = defaultdict(list)
    for row in cell.samples:
        names = {key.partition(",")[0] for key in json.loads(row["outcomes"])}
        if METRIC not in names:
            continue
        try:
            scored = len(json.loads(row.get("loglikelihoods") or "[]"))
        except (TypeError, ValueError, RecursionError):
            return {}
        choices = scored // 2 if TWICE in names else scored
        tasks[row["task"]].append(1 / choices if choices > 1 else 0.0)
    return {task: sum(found) / len(found) for task, found in tasks.items()}


def chance(cell: Cell) -> float | None:
    """Mean of ``by_task``; None if no task offers a choice, or the cell does not tell."""
    found = by_task(cell).values()
    return sum(found) / len(found) if any(found) else None
