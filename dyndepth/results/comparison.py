"""Every cell against dense on the same documents, methods as wholes, and methods at equal FLOPs.

Accuracies are tested by McNemar's exact test, all else by paired bootstrap over documents; Holm's
correction runs over all rows of a table that have the same metric and count the same FLOPs. The
tables are a pure function of the cells, whatever their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from dyndepth.cells.cell import Cell, identity_columns, is_lossless
from dyndepth.cells.identity import LEADING, Row
from dyndepth.common.errors import UserError
from dyndepth.results.comparison_columns import COMPARISON, CURVES, EQUAL_FLOPS
from dyndepth.results.curve_tables import BUDGETS, curves, equal_flops
from dyndepth.results.statistics.curves import Point, Vector, check_paired, pareto
from dyndepth.results.statistics.intervals import LEAST
from dyndepth.results.statistics.peers import (
    NO_DENSE,
    Peers,
    Score,
    curve_key,
    few,
    is_bound,
    jobs,
    peers,
)
from dyndepth.results.statistics.resampling import ratios
from dyndepth.results.statistics.verdicts import Pending, adjust, is_binary, mcnemar, verdict
from dyndepth.results.tables import as_csv, csv_text


def against_dense(cells: Iterable[Cell], tasks: Sequence[str] | None = None) -> list[Row]:
    """Rows of comparison.csv, identity included; the same whatever the order of ``cells``.

    Raises:
        UserError: the cells are of different task versions or data.
    """
    groups = peers(cells)
    found: dict[str, list[Row]] = {}
    for each, score in jobs(groups, tasks, "against dense"):
        for key, row in _scored(each, score).items():
            found.setdefault(key, []).append(row)
    rows: list[Row] = []
    for each in groups:
        for cell in each.cells:
            lead = identity_columns(cell) | {"status": cell.status}
            failed = {"verdict": "not comparable", "reason": cell.error or "it has no results"}
            rows += [lead | row for row in found.get(cell.key, [] if cell.evaluated else [failed])]
    adjust(rows)
    for row in rows:
        if row.get("p_holm") is not None:
            row["verdict"] = verdict(row, "difference", "low", "high")
        if row["lossless"] and row.get("difference") is not None:
            row["verdict"] = LOSSLESS
    return rows


LOSSLESS = "lossless"
"""Verdict of a cell that writes what dense writes: there is nothing to test."""


def _scored(each: Peers, score: Score) -> dict[str, Row]:
    """The row of every cell with results for one metric of its setting, by the cell's hash."""
    dense = each.point([each.dense], score) if each.dense else None
    rows, points = {}, {}
    for cell in each.cells:
        if cell.evaluated:
            rows[cell.key] = row = _described(score)
            own = each.attempt([cell], score)
            if isinstance(own, str):
                row["reason"] = own
                continue
            row |= {"value": own.value, "block_fraction": own.fraction, "n": len(own.documents)}
            whole = each.attempt([cell], replace(score, flops="total"))
            row |= {} if isinstance(whole, str) else {"total_fraction": whole.fraction}
            points[cell.key] = own
    if dense is None:
        for key in points:
            rows[key]["reason"] = NO_DENSE
    else:
        _compare(rows, points, dense, {cell.key for cell in each.cells if is_lossless(cell)})
    _mark_pareto(each, score, rows)
    return rows


def _described(score: Score) -> Row:
    return {
        "task": score.task,
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        "task_version": score.task_version,
        "verdict": "not comparable",
    }


def _compare(
    rows: dict[str, Row], points: dict[str, Point], dense: Point, exact: AbstractSet[str]
) -> None:
    """Fill what sets each cell's ``rows`` against dense. Those of ``exact`` are lossless: a test
    of them would only weaken the others', whose correction counts it."""
    pending = Pending(dense.weights)
    kept: list[tuple[Row, Vector]] = []
    for key, own in points.items():
        row = rows[key]
        try:
            check_paired(own, dense)
        except UserError as fault:
            row["reason"] = str(fault)
            continue
        row["dense_value"] = dense.value
        if own.cells == dense.cells:
            row |= {"difference": 0.0, "verdict": "reference"}
        if dense.value > 0:
            row["retained"] = own.value / dense.value
        if own.cells == dense.cells:
            continue
        if key in exact:
            row["difference"] = own.value - dense.value
            continue
        enough = len(own.documents) >= LEAST
        binary = is_binary(own.outcomes) and is_binary(dense.outcomes)
        apart = own.outcomes - dense.outcomes
        pending.add(row, "difference", apart, ("low", "high"), test=not binary)
        if not enough:
            row["reason"] = few(len(own.documents))
            continue
        row["test"] = "mcnemar" if binary else "bootstrap"
        row |= {"p": mcnemar(own.outcomes, dense.outcomes)} if binary else {}
        kept.append((row, own.outcomes))
    pending.fill()
    if kept and dense.value > 0:
        stacked = np.stack([outcomes for _, outcomes in kept])
        found = ratios(stacked, dense.outcomes, dense.weights)
        for index, (row, _) in enumerate(kept):
            row["retained_low"] = float(found.low[index])
            row["retained_high"] = float(found.high[index])


def _mark_pareto(each: Peers, score: Score, rows: dict[str, Row]) -> None:
    """Fill ``pareto``: among the competitors of one recovery, seeds averaged."""
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in each.cells:
        if "value" in rows.get(cell.key, {}) and not (is_bound(cell) or is_lossless(cell)):
            own = cell.identity
            target = str(own["recovery"]), curve_key(cell), float(own["target_speedup"])
            groups.setdefault(target, []).append(cell)
    for recovery in dict.fromkeys(key[0] for key in groups):
        members = [group for key, group in groups.items() if key[0] == recovery]
        points = [each.attempt(group, score) for group in members]
        usable = [(g, p) for g, p in zip(members, points, strict=True) if isinstance(p, Point)]
        fractions, values = ([p.fraction for _, p in usable], [p.value for _, p in usable])
        found = pareto(fractions, values, score.higher_is_better)
        for (group, _), member in zip(usable, found, strict=True):
            for cell in group:
                rows[cell.key]["pareto"] = member


def compared(
    cells: Iterable[Cell],
    tasks: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
) -> dict[str, list[Row]]:
    """The rows of ``comparison``, ``curves`` and ``equal_flops``, for ``tasks`` or all.

    Raises:
        UserError: the cells are of different task versions or data; none scored a task of
            ``tasks``; or a budget is below 1.
    """
    cells = list(cells)
    scored = {row["task"] for cell in cells for row in cell.accuracy}
    unknown = [task for task in tasks or () if task not in scored]
    if unknown:
        raise UserError(
            f"no cell has the task {unknown[0]}; scored were {', '.join(sorted(scored))}"
        )
    return {
        "comparison": against_dense(cells, tasks),
        "curves": curves(cells, tasks),
        "equal_flops": equal_flops(cells, tasks, budgets),
    }


def texts(tables: dict[str, list[Row]]) -> dict[str, str]:
    """The CSV text of every table of ``compared`` by its file name; equal rows, equal bytes."""
    own = tuple(name for name in COMPARISON if name not in LEADING)
    return {
        "comparison.csv": as_csv(tables["comparison"], own),
        "curves.csv": csv_text(tables["curves"], tuple(CURVES)),
        "equal_flops.csv": csv_text(tables["equal_flops"], tuple(EQUAL_FLOPS)),
    }


def left_out(cells: Iterable[Cell], tasks: Sequence[str] | None = None) -> list[str]:
    """``task metric`` of all scores that cannot be paired: no means over single documents."""
    found: dict[str, None] = {}
    for each in peers(cells):
        kept = each.comparable(tasks)
        missing = [score for score in each.scores(tasks) if score not in kept]
        found |= dict.fromkeys(f"{score.task} {score.metric}" for score in missing)
    return list(found)
