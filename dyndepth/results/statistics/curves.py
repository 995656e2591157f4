"""Comparisons of methods at equal achieved FLOPs, paired over documents.

A method's curve is what its cells measured: outcomes by document at the share of dense's FLOPs
(those of the blocks, or all) that was executed. Between two neighbouring points each document's
outcome is interpolated linearly; beyond the measured points nothing is said. Intervals are
percentile bootstrap over documents (Efron and Tibshirani 1993, ch. 13), both methods resampled
alike; they tell how far the documents decide a difference, not how much another training seed would
change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from dyndepth.cells.cell import Cell
from dyndepth.common.errors import UserError

SAME = 1e-9
"""Shares of FLOPs that differ by less are one point of a curve."""
FLOPS = ("block", "total")
"""What a budget may count: attention and MLP sublayers alone, or with them all that a method adds
or cannot save (routers, exits, keys and values of skipped tokens, the LM head)."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Point:
    """What one method did at one budget.

    Attributes:
        fraction: executed / dense FLOPs, above 0; of all FLOPs it can exceed 1.
        documents: ids, sorted; ``outcomes`` and ``weights`` ``[documents]`` are in their order.
        outcomes: the metric by document, averaged over seeds.
        weights: of a document in the task's value (bytes for bits per byte, 1 for accuracy).
        flops, dense_flops: FLOPs of each document, executed and at full depth.
        seeds: how many seeds were averaged; between two points the lower number.
        cells: hashes of the cells that went in.
    """

    fraction: float
    documents: tuple[str, ...]
    outcomes: Vector
    weights: Vector
    flops: Vector
    dense_flops: Vector
    seeds: int = 1
    cells: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The metric over all documents: a weighted mean, as the task aggregates it."""
        return float(self.outcomes @ self.weights / self.weights.sum())


def measured(cells: Sequence[Cell], task: str, metric: str, flops: str = "block") -> Point:
    """The point of one method at one target: ``cells`` differ in their seed alone. ``flops``: what
    its place counts, one of ``FLOPS``.

    Raises:
        UserError: a cell lacks the task or metric; the seeds were scored on different documents;
            or the metric is no weighted mean over documents, so it cannot be compared by document.
    """
    return averaged([_of_cell(cell, task, metric, flops) for cell in cells])


def averaged(points: Sequence[Point]) -> Point:
    """The mean over points that differ in their seed alone."""
    mean = _mixed(points, np.full(len(points), 1 / len(points)))
    return replace(mean, seeds=len(points))


def by_document(
    documents: Sequence[str],
    outcomes: Sequence[float],
    weights: Sequence[float],
    flops: Sequence[float],
    dense_flops: Sequence[float],
    cells: tuple[str, ...] = (),
) -> Point:
    """A point from what was measured on each document."""
    arrays = (np.array(x, dtype=np.float64) for x in (outcomes, weights, flops, dense_flops))
    values, weight, executed, dense = arrays
    share = float(executed.sum() / dense.sum())
    return Point(share, tuple(documents), values, weight, executed, dense, cells=cells)


def of_modules(point: Point, share: float) -> Point:
    """``point`` placed at the ``share`` of sublayers that were executed, instead of FLOPs."""
    return replace(point, fraction=share)


def curve(points: Sequence[Point]) -> list[Point]:
    """``points`` by ascending fraction; those at the same fraction are averaged into one."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda each: each.fraction):
        if groups and point.fraction - groups[-1][0].fraction < SAME:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [_mixed(group, np.full(len(group), 1 / len(group))) for group in groups]


def interpolate(points: Sequence[Point], fraction: float, slack: float = 0.0) -> Point | None:
    """The curve's point at ``fraction``: exact where it was measured, else linear by document
    between its two neighbours; None outside of the measured range.

    ``slack``: a fraction that lies outside by no more takes the end point as it was measured, with
    the end point's own fraction. It is for controls whose budget is matched by construction.
    """
    ordered = curve(points)
    for point in ordered:
        if abs(point.fraction - fraction) < SAME:
            return point
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low.fraction < fraction < high.fraction:
            share = (fraction - low.fraction) / (high.fraction - low.fraction)
            return _mixed([low, high], np.array([1 - share, share]))
    nearest = min(ordered, key=lambda each: abs(each.fraction - fraction), default=None)
    near = nearest is not None and abs(nearest.fraction - fraction) <= slack
    return nearest if near else None


def _of_cell(cell: Cell, task: str, metric: str, flops: str) -> Point:
    label = f"cell {cell.key} ({cell.identity['method']})"
    rows = sorted((row for row in cell.samples if row["task"] == task), key=_document)
    scores = [row for row in cell.accuracy if (row["task"], row["metric"]) == (task, metric)]
    compute = [row for row in cell.compute if (row["task"], row["phase"]) == (task, "all")]
    scored = bool(scores) and scores[0]["value"] is not None
    if not (rows and scored and compute and compute[0][f"{flops}_speedup"]):
        raise UserError(f"{label} has no {metric} on the task {task}; run its sweep again")
    # The first filter stands for the task, as in the leaderboard.
    key = f"{metric},{scores[0]['filter']}"
    outcomes = [json.loads(row["outcomes"]).get(key) for row in rows]
    if None in outcomes:
        raise UserError(f"{label}: {metric} of the task {task} has no value on single documents")
    point = by_document(
        list(map(_document, rows)),
        outcomes,
        # The weight in a row is that of its main metric.
        [row.get("weight", 1.0) if row["metric"] == key else 1.0 for row in rows],
        [row[f"{flops}_flops"] for row in rows],
        [row[f"dense_{flops}_flops"] for row in rows],
        cells=(cell.key,),
    )
    point = replace(point, fraction=1 / compute[0][f"{flops}_speedup"])
    if not math.isclose(point.value, scores[0]["value"], rel_tol=1e-6, abs_tol=1e-9):
        raise UserError(
            f"{label}: {metric} of the task {task} is {scores[0]['value']:.6g}, but "
            f"{point.value:.6g} as a mean over documents; compare a metric that is such a mean"
        )
    return point


def _document(row: dict[str, object]) -> str:
    return f"{row['doc_id']}/{row['doc_hash']}"


def _mixed(points: Sequence[Point], shares: Vector) -> Point:
    """``points`` averaged by document with the weights ``shares``, which sum to 1."""
    if len(points) == 1:
        return points[0]
    for point in points[1:]:
        check_paired(points[0], point)
    return Point(
        fraction=float(shares @ [point.fraction for point in points]),
        documents=points[0].documents,
        outcomes=shares @ np.stack([point.outcomes for point in points]),
        weights=points[0].weights,
        flops=shares @ np.stack([point.flops for point in points]),
        dense_flops=points[0].dense_flops,
        seeds=min(point.seeds for point in points),
        cells=tuple(key for point in points for key in point.cells),
    )


def check_paired(one: Point, other: Point) -> None:
    """Raise UserError unless both were scored on the same documents."""
    if one.documents != other.documents or not np.array_equal(one.weights, other.weights):
        raise UserError(
            f"the cells {', '.join(one.cells)} and {', '.join(other.cells)} were scored on "
            "different documents and cannot be paired; score both with the same --limit"
        )


def span(points: Sequence[Point]) -> tuple[float, float]:
    """The least and the largest fraction at which the curve was measured."""
    fractions = [point.fraction for point in points]
    return min(fractions), max(fractions)


def overlap(one: Sequence[Point], other: Sequence[Point]) -> tuple[float, float] | None:
    """The range of fractions over which both curves were measured; None if it has no width."""
    spans = span(one), span(other)
    low, high = max(low for low, _ in spans), min(high for _, high in spans)
    return (low, high) if high - low > SAME else None


def area(
    points: Sequence[Point], within: tuple[float, float] | None = None
) -> tuple[Vector, Vector] | None:
    """The curve's mean value over the range ``within`` (its whole span by default), by document:
    the area under it by the trapezoidal rule, divided by the range's width, and the weights of the
    documents, ``[documents]`` each. None where the range has no width.

    Raises:
        ValueError: the range leaves the measured points.
    """
    low, high = within or span(points)
    if high - low <= SAME:
        return None
    ends = interpolate(points, low), interpolate(points, high)
    if ends[0] is None or ends[1] is None:
        raise ValueError(f"the curve was not measured from {low:.4f} to {high:.4f}")
    inner = [p for p in curve(points) if low + SAME < p.fraction < high - SAME]
    cut = [ends[0], *inner, ends[1]]
    heights = np.stack([point.outcomes for point in cut])
    at = np.array([low, *(point.fraction for point in inner), high])
    found: Vector = trapezoid(heights, at, axis=0) / (high - low)
    return found, cut[0].weights


def degradation(points: Sequence[Point], dense: Point, higher_is_better: bool) -> Vector | None:
    """Speedup-degradation ratio by document, ``[documents]``: points of score lost against dense a
    percent of speedup (LLM-Drop, arXiv 2406.15786), lower is better.

    A point of score is a hundredth. The speedup is that of FLOPs, where the source takes
    wall-clock's. Over several points: the loss summed over them / the percent summed over them.
    None where no point is faster than dense.
    """
    faster = [point for point in points if point.fraction < 1 - SAME]
    if not faster:
        return None
    sign = 1.0 if higher_is_better else -1.0
    lost = sum(
        (sign * (dense.outcomes - p.outcomes) for p in faster), np.zeros(len(dense.outcomes))
    )
    gained = sum(1 / point.fraction - 1 for point in faster)
    return lost / gained  # a hundred stands above and below


def pareto(
    fractions: Sequence[float], values: Sequence[float], higher_is_better: bool
) -> list[bool]:
    """For each point whether no other one is as good at as few FLOPs, and better in either."""
    cost = np.asarray(fractions, dtype=float)
    loss = np.asarray(values, dtype=float) * (-1 if higher_is_better else 1)
    # [other, point]
    no_worse = (cost[:, None] <= cost + SAME) & (loss[:, None] <= loss + SAME)
    better = (cost[:, None] < cost - SAME) | (loss[:, None] < loss - SAME)
    dominated = np.any(no_worse & better, axis=0)
    return [not beaten for beaten in dominated.tolist()]
