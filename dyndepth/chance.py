"""What guessing scores: the mean accuracy of answers drawn at random among the choices.

A mean over tasks mixes questions of two choices with others of four, or of none at all, so what it
is to be held against is not seen from the number itself.
"""

from __future__ import annotations

import json
from collections import defaultdict

from dyndepth.records import Cell

METRIC = "acc"
"""The accuracy that the leaderboard's mean is of."""
TWICE = "acc_mutual_info"
"""A metric for which each choice is scored a second time, without its question."""


def chance(cell: Cell) -> float | None:
    """Expected mean accuracy of guesses over the tasks that have one: 1 / choices of a document,
    0 where there is nothing to choose from; None if no task offers a choice, or the cell does not
    tell.

    A document's choices are counted by its log-likelihoods.
    """
    tasks: dict[str, list[float]] = defaultdict(list)
    for row in cell.samples:
        names = {key.partition(",")[0] for key in json.loads(row["outcomes"])}
        if METRIC not in names:
            continue
        if "loglikelihoods" not in row:
            return None
        try:
            scored = len(json.loads(row["loglikelihoods"] or "[]"))
        except (TypeError, ValueError, RecursionError):
            return None
        choices = scored // 2 if TWICE in names else scored
        tasks[row["task"]].append(1 / choices if choices > 1 else 0.0)
    if not any(any(found) for found in tasks.values()):
        return None
    return sum(sum(found) / len(found) for found in tasks.values()) / len(tasks)
