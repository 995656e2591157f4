"""Rows of curves.csv and equal_flops.csv: methods as wholes, and at the same budget of FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scipy.stats import rankdata

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row, flat
from dyndepth.common.errors import UserError
from dyndepth.results.comparison_columns import CURVE
from dyndepth.results.statistics.curves import (
    FLOPS,
    SAME,
    Point,
    Vector,
    area,
    check_paired,
    degradation,
    interpolate,
    overlap,
    span,
)
from dyndepth.results.statistics.intervals import LEAST
from dyndepth.results.statistics.peers import (
    NO_DENSE,
    Peers,
    Score,
    Series,
    few,
    full_name,
    jobs,
    peers,
)
from dyndepth.results.statistics.verdicts import Pending, adjust, verdict


def curves(cells: Iterable[Cell], tasks: Sequence[str] | None = None) -> list[Row]:
    """Rows of curves.csv; the same whatever the order of ``cells``.

    Raises:
        UserError: the cells are of different task versions or data.
    """
    rows = [
        row
        for each, score in jobs(peers(cells), tasks, "curves", FLOPS)
        for row in _curves(each, score)
    ]
    return _judged(rows, "area_difference")


NO_COMPETITOR = "there is no competitor"
"""Reason of a curve that stands alone in its setting and recovery."""
BUDGETS = (1.1, 1.25, 1.5, 1.9)
"""Reference budgets of equal_flops.csv by default: dense / executed FLOPs. The last is below
2: methods end within some percent of their target, and nothing is read off beyond a curve's end."""


def equal_flops(
    cells: Iterable[Cell], tasks: Sequence[str] | None = None, budgets: Sequence[float] = BUDGETS
) -> list[Row]:
    """Rows of equal_flops.csv at the reference speedups ``budgets``, each at least 1.

    Raises:
        UserError: the cells are of different task versions or data, or a budget is below 1.
    """
    for budget in budgets:
        if not 1 <= budget < math.inf:
            raise UserError(
                f"--at takes finite speedups of at least 1, such as 1.25, not {budget:g}"
            )
    asked = sorted(set(budgets))
    rows = [
        row
        for each, score in jobs(peers(cells), tasks, "equal FLOPs", FLOPS)
        for row in _at(each, score, asked)
    ]
    return _judged(rows, "competitor_difference")


def _read(each: Peers, score: Score) -> list[tuple[Series, Row, list[Point]]]:
    """Every curve with the row that describes it and its points, none where ``reason`` says why."""
    found = []
    for series in each.series():
        row = _described(each, series, score)
        points: list[Point] = []
        try:
            if not series.cells:
                row["reason"] = f"all its cells failed: {series.failed[0].error}"
            else:
                points = each.curve(series, score)
                if each.dense is not None:
                    dense = each.point([each.dense], score)
                    for point in points:
                        check_paired(point, dense)
                own = each.own_points(series, score)
                row["seeds"] = min(point.seeds for point in own)
                row["fraction_low"], row["fraction_high"] = span(points)
                row["n"] = len(points[0].documents)
        except UserError as fault:
            points, row["reason"] = [], str(fault)
        if points and each.dense is None:
            row["reason"] = NO_DENSE
        if points and len(points[0].documents) < LEAST:
            row["reason"] = few(len(points[0].documents))
        found.append((series, row, points))
    return found


def _described(each: Peers, series: Series, score: Score) -> Row:
    identity = series.identity
    row: Row = {"setting": each.key, "bound": series.bound, "task": score.task}
    row |= {key: flat(identity[key]) for key in CURVE if key in identity}
    row |= {"metric": score.metric, "higher_is_better": score.higher_is_better}
    row |= {"task_version": score.task_version, "flops": score.flops}
    row["points"] = len(series.by_target())
    row["cells"] = " ".join(cell.key for cell in series.cells)
    row["failed"] = " ".join(cell.key for cell in series.failed)
    return row


def _curves(each: Peers, score: Score) -> list[Row]:
    read = _read(each, score)
    weights = next((points[0].weights for *_, points in read if points), None)
    if weights is None:
        return [row for _, row, _ in read]
    pending = Pending(weights)
    dense = each.point([each.dense], score) if each.dense else None
    for series, row, points in read:
        if not points:
            continue
        whole = area(points)
        if whole is None:
            row["reason"] = "one measured point has no area under it"
        else:
            pending.add(row, "area", whole[0])
        own = each.own_points(series, score)
        lost = degradation(own, dense, score.higher_is_better) if dense else None
        if lost is not None:
            pending.add(row, "sdr", lost)
        worst = _hardest(series, points, read, score)
        if worst is not None:
            other, within, apart, every = worst
            row["competitor"] = full_name(other.identity)
            row["overlap_low"], row["overlap_high"] = within
            pending.add(row, "area_difference", apart)
            pending.against(row, every, _sign(score))
    _shared_area(read, pending)
    pending.fill()
    return [row for _, row, _ in read]


def _hardest(
    series: Series,
    points: list[Point],
    read: Sequence[tuple[Series, Row, list[Point]]],
    score: Score,
) -> tuple[Series, tuple[float, float], Vector, list[Vector]] | None:
    """The competitor against which a curve stands worst over their overlap, the overlap, the
    difference of their mean values by document, and those to all competitors."""
    worst, least = None, math.inf
    every: list[Vector] = []
    for other, _, others in _competitors(series, read):
        within = overlap(points, others)
        own = area(points, within) if within else None
        theirs = area(others, within) if within else None
        if within and own and theirs:
            apart = own[0] - theirs[0]
            every.append(apart)
            ahead = _sign(score) * float(apart @ own[1] / own[1].sum())
            if ahead < least:
                worst, least = (other, within, apart), ahead
    return (*worst, every) if worst else None


def _shared_area(read: Sequence[tuple[Series, Row, list[Point]]], pending: Pending) -> None:
    """Fill the mean value over the range that all competitors of one recovery were measured over,
    in which their curves can be read against each other."""
    for recovery in dict.fromkeys(series.recovery for series, *_ in read):
        own = [each for each in read if each[0].recovery == recovery and each[2]]
        spans = [span(points) for series, _, points in own if not series.bound]
        if not spans:
            continue
        low, high = max(least for least, _ in spans), min(most for _, most in spans)
        for _, row, points in own:
            least, most = span(points)
            inside = least <= low + SAME and high <= most + SAME and high - low > SAME
            found = area(points, (low, high)) if inside else None
            if found is not None:
                row["shared_low"], row["shared_high"] = low, high
                pending.add(row, "shared_area", found[0], ("shared_area_low", "shared_area_high"))


def _sign(score: Score) -> float:
    return 1.0 if score.higher_is_better else -1.0


def _competitors(
    series: Series, read: Sequence[tuple[Series, Row, list[Point]]]
) -> list[tuple[Series, Row, list[Point]]]:
    return [
        entry
        for entry in read
        if entry[2]
        and entry[0] is not series
        and not entry[0].bound
        and entry[0].recovery == series.recovery
    ]


def _at(each: Peers, score: Score, budgets: Sequence[float]) -> list[Row]:
    read = _read(each, score)
    weights = next((points[0].weights for *_, points in read if points), None)
    dense = each.point([each.dense], score) if each.dense else None
    pending = Pending(weights) if weights is not None else None
    rows = []
    for budget in budgets:
        there = [interpolate(points, 1 / budget) if points else None for *_, points in read]
        for index, (_, described, points) in enumerate(read):
            row = described | {"reference_speedup": budget, "fraction": 1 / budget}
            rows.append((index, budget, row))
            own = there[index]
            if own is None or pending is None:
                if points:
                    low, high = span(points)
                    row["reason"] = (
                        f"measured from {low:.4f} to {high:.4f} of dense's {score.flops} FLOPs, "
                        f"not at {1 / budget:.4f}"
                    )
                continue
            pending.add(row, "value", own.outcomes, ends=("low", "high"))
            if dense is not None:
                row["dense_value"] = dense.value
                pending.add(row, "difference", own.outcomes - dense.outcomes)
            _place(row, index, read, there, pending, score)
    if pending is not None:
        pending.fill()
    return [row for *_, row in sorted(rows, key=lambda entry: entry[:2])]


def _place(
    row: Row,
    index: int,
    read: Sequence[tuple[Series, Row, list[Point]]],
    there: Sequence[Point | None],
    pending: Pending,
    score: Score,
) -> None:
    """Rank a curve at one budget, and set it against the best of the others."""
    series, own = read[index][0], there[index]
    others = [
        (entry[0], point)
        for entry, point in zip(read, there, strict=True)
        if point is not None and any(entry[0] is one[0] for one in _competitors(series, read))
    ]
    assert own is not None
    sign = -_sign(score)
    row["competitors"] = len(others) + (not series.bound)
    if not series.bound:
        # Equal but for the order of a sum is equal.
        losses = [round(sign * point.value, 10) for point in (own, *(p for _, p in others))]
        row["rank"] = int(rankdata(losses, method="min")[0])
    if others:
        best, point = min(others, key=lambda entry: round(sign * entry[1].value, 10))
        row["competitor"], row["competitor_value"] = full_name(best.identity), point.value
        pending.add(row, "competitor_difference", own.outcomes - point.outcomes)
        pending.against(row, [own.outcomes - p.outcomes for _, p in others], _sign(score))


def _judged(rows: list[Row], column: str) -> list[Row]:
    """Holm's correction by metric and kind of FLOPs over the table, and the verdicts."""
    adjust(rows)
    for row in rows:
        if row.get("p_holm") is not None:
            row["verdict"] = verdict(row, column, f"{column}_low", f"{column}_high")
        else:
            row["verdict"] = "not comparable"
            row.setdefault("reason", NO_COMPETITOR)
    return rows
