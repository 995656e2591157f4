"""Rows of comparison.csv: every cell against dense on the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.identity import Row
from dyndepth.common.errors import UserError
from dyndepth.curve_tables import NO_DENSE, few, jobs
from dyndepth.curves import pareto
from dyndepth.judging import Pending, adjust, verdict
from dyndepth.peers import Peers, Score, curve_key, is_bound, peers
from dyndepth.resampling import ratios
from dyndepth.stats import LEAST, Point, Vector, check_paired, is_binary, mcnemar


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
    return rows


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
        _compare(rows, points, dense)
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


def _compare(rows: dict[str, Row], points: dict[str, Point], dense: Point) -> None:
    """Fill what sets each cell's ``rows`` against dense."""
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
        if "value" in rows.get(cell.key, {}) and not is_bound(cell):
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
