"""One row a cell: what it scores, what it retains of dense, what it saves.

Accuracy here is ``acc`` alone, never mixed with ``acc_norm``: the mean over tasks, its interval by
bootstrap over documents within tasks, the fraction of dense retained on the same documents, and
beside it what guessing scores: a mean over tasks mixes questions of two choices with others of
four, or of none at all. Rows may be of several settings; each is compared with dense of its own,
and says what it has apart from the others (``naming.apart``).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable

from dyndepth.cells.cell import Cell, identity_columns, is_dense
from dyndepth.cells.identity import Row, setting
from dyndepth.cells.times import mode_of, one_each, temperature_of
from dyndepth.common.modes import EAGER
from dyndepth.results.lossless import drafts
from dyndepth.results.noise import LOADED, SUSPECT, WALLS, loaded

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


CONTROL = "control"
"""What a control has for its paper (``DynamicDepthMethod.paper``)."""
Z95 = 1.96
"""Standard errors on each side of a 95% interval."""
APART = {"bits_per_byte": "bits_per_byte", "rouge_l": "rougeL"}
"""Columns of scores that are no accuracies, and the metric whose mean over tasks they hold."""
SHARES = ("rouge_l",)
"""Those of them that lie between 0 and 1."""


def leaderboard(cells: Iterable[Cell], leading: Iterable[Row] | None = None) -> list[Row]:
    """Rows of leaderboard.csv, in the order of ``cells``, identity included; ``leading``: the
    columns of each that lead its row, if they are known."""
    cells = list(cells)
    leading = map(identity_columns, cells) if leading is None else leading
    dense = {setting(cell.identity): outcomes(cell) for cell in cells if is_dense(cell)}
    return [
        {**first, **_row(cell, dense.get(setting(cell.identity)))}
        for cell, first in zip(cells, leading, strict=True)
    ]


def is_control(row: Row) -> bool:
    """True for the row of a control: something to compare methods with, no method of a paper."""
    return row.get("paper") == CONTROL


def _row(cell: Cell, dense: dict[str, dict[str, float]] | None) -> Row:
    # numpy comes late: --help must be instant.
    from dyndepth.results.statistics.intervals import LEAST, mean_score, retained

    own = outcomes(cell)
    # Of fewer documents of any task nothing is said but the value.
    enough = bool(own) and min(map(len, own.values())) >= LEAST
    row: Row = {
        "status": cell.status,
        "documents": sum(map(len, own.values())),
        **{
            key: value
            for column, metric in APART.items()
            for key, value in _mean_value(cell, column, metric).items()
        },
        **speedups(cell),
        **wall_speedups(cell),
        **_doubts(cell),
        **_timed_shape(cell),
        **drafts(cell),
        **_predicted(cell),
        **serving(cell),
        "paper": cell.provenance.get("paper"),
        "needs_training": cell.provenance.get("needs_training"),
        "device_name": cell.provenance.get("device_name"),
        "threads": cell.provenance.get("threads"),
        "error": cell.error,
    }
    if own:
        mean = mean_score(own)
        row |= {"mean_acc": mean.value, "chance": chance(cell)}
        if enough:
            row |= {"mean_acc_low": mean.low, "mean_acc_high": mean.high}
    kept = retained(own, dense) if own and dense else None
    if kept:
        row["retained"] = kept.value
        if enough:
            row |= {"retained_low": kept.low, "retained_high": kept.high}
    return row


def outcomes(cell: Cell) -> dict[str, dict[str, float]]:
    """Task -> document -> right (1.0) or wrong (0.0), for the tasks that have an accuracy."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in cell.samples:
        for metric, outcome in json.loads(row["outcomes"]).items():
            # The first filter stands for the task, as it does in its own results.
            if metric.partition(",")[0] == METRIC and outcome is not None:
                found[row["task"]].setdefault(str(row["doc_id"]), float(outcome))
    return dict(found)


def _mean_value(cell: Cell, column: str, metric: str) -> Row:
    """Mean of a metric over the tasks that have it, and its 95% interval by their standard errors
    (the tasks' documents are independent); no interval where one of them is unknown, or of fewer
    documents than ``LEAST``."""
    from dyndepth.results.statistics.intervals import LEAST

    rows = [row for row in cell.accuracy if row["metric"] == metric and row["value"] is not None]
    if not rows:
        return {column: None}
    value = sum(row["value"] for row in rows) / len(rows)
    errors = [float(row["stderr"]) for row in rows if row.get("stderr") is not None]
    margin = Z95 * math.sqrt(sum(error**2 for error in errors)) / len(rows)
    few = any((row.get("n") or 0) < LEAST for row in rows)
    if few or len(errors) < len(rows) or math.isnan(margin):
        return {column: value}
    # Neither metric can be negative, nor one of them above 1, and the normal law does not know it.
    low, high = max(0.0, value - margin), value + margin
    high = min(1.0, high) if column in SHARES else high
    return {column: value, f"{column}_low": low, f"{column}_high": high}


def speedups(cell: Cell) -> Row:
    """Achieved block and total FLOPs speedup over the tokens of all tasks."""
    found: Row = {}
    for kind in ("block", "total"):
        executed = dense = 0.0
        for row in cell.compute:
            spent, ratio = row[f"{kind}_flops_per_token"], row[f"{kind}_speedup"]
            if row["phase"] == "all" and spent is not None and ratio is not None:
                executed += row["tokens"] * spent
                dense += row["tokens"] * spent * ratio
        found[f"{kind}_speedup"] = dense / executed if executed else None
    return found


def wall_speedups(cell: Cell) -> Row:
    """Wall speedups by phase and mode (``noise.WALLS``), and of drawn tokens, all of one shape; see
    ``_timed``."""
    found: Row = {}
    for key, row in _timed(cell).items():
        found[f"wall_{key}_speedup"] = row["wall_speedup"]
        for end in ("low", "high"):
            found[f"wall_{key}_{end}"] = row.get(f"wall_speedup_{end}")
    return found


def _doubts(cell: Cell) -> Row:
    """Keys of the wall speedups that are suspect, and of those timed on a loaded machine; the
    fewest pairs that one of them is of, and the highest load. None where there are none."""
    timed = _timed(cell)
    pairs = [row["repeats"] for row in timed.values() if row.get("repeats") is not None]
    loads = [row["load_average"] for row in timed.values() if row.get("load_average") is not None]
    return {
        SUSPECT: ", ".join(key for key, row in timed.items() if row.get("suspect")) or None,
        LOADED: ", ".join(key for key, row in timed.items() if loaded(row)) or None,
        "wall_repeats": min(pairs, default=None),
        "wall_load": max(loads, default=None),
    }


def _timed(cell: Cell) -> dict[str, Row]:
    """Rows of timing.csv by key of ``noise.WALLS``, of one shape: the smallest batch, there the
    longest prompts of those that were timed in most of the phases and modes; of several of one
    shape that which ``times.one_each`` chooses. ``drawn``: eager decode of drawn tokens there, of
    which no other key is."""
    keys = {(wall.phase, wall.mode): wall.key for wall in WALLS}
    shapes: dict[tuple[int, int], dict[str, Row]] = defaultdict(dict)
    drawn = {(row["batch"], row["length"]): row for row in one_each(_drawn(cell))}
    for row in one_each([row for row in cell.timing if not temperature_of(row)]):
        key = keys.get((row["phase"], row.get("mode", EAGER)))
        if key is not None and row.get("wall_speedup") is not None:
            shapes[row["batch"], row["length"]][key] = row
    if not shapes:
        return {}
    chosen = min(shapes, key=lambda shape: (shape[0], -len(shapes[shape]), -shape[1]))
    found = {wall.key: shapes[chosen][wall.key] for wall in WALLS if wall.key in shapes[chosen]}
    return found | ({"drawn": drawn[chosen]} if chosen in drawn else {})


def _drawn(cell: Cell) -> list[Row]:
    """Times of eager decode whose tokens were drawn, of both sides."""
    return [
        row
        for row in cell.timing
        if temperature_of(row) and (row["phase"], mode_of(row)) == ("decode", EAGER)
        if row.get("wall_speedup") is not None
    ]


def _predicted(cell: Cell) -> Row:
    """What was predicted of the drafts of the wall speedup of decode."""
    found = _timed(cell).get("decode", {}).get("predicted_speedup")
    return {} if found is None else {"predicted_speedup": found}


def serving(cell: Cell) -> Row:
    """Latency, throughput and memory of both sides, and speedups over compiled dense, of the shape
    of the wall speedups, in eager mode; nothing of what was not measured."""
    rows = [row for key, row in _timed(cell).items() if key in ("prefill", "decode")]
    found: Row = {}
    for row in rows:
        for side in ("dense", "method"):
            times = ("ttft_ms",) if row["phase"] == "prefill" else ("tpot_ms", "tokens_per_s")
            for name in (f"{side}_{time}" for time in times):
                found |= {key: row.get(key) for key in (name, f"{name}_low", f"{name}_high")}
            for name in (f"{side}_peak_bytes", f"{side}_peak_above_bytes"):
                known = [each for each in (found.get(name), row.get(name)) if each is not None]
                found[name] = max(known, default=None)
            # The last phase's stands: decode keeps what the prompt left, and more.
            found[f"{side}_cache_bytes"] = row.get(f"{side}_cache_bytes")
        for end in ("", "_low", "_high"):
            found[f"{row['phase']}_over_compiled{end}"] = row.get(f"speedup_over_compiled{end}")
    return found


def _timed_shape(cell: Cell) -> Row:
    row = next(iter(_timed(cell).values()), None)
    return {f"wall_{key}": row[key] for key in ("batch", "length")} if row else {}
