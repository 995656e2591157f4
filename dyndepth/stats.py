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
from scipy.stats import bootstrap

from dyndepth.cells.cell import Cell
from dyndepth.common.errors import UserError
from dyndepth.intervals import LEVEL

RESAMPLES = 10_000
"""Enough that p = 2 / (RESAMPLES + 1), the least there is, outlives Holm over 200 comparisons."""
LEAST = 10
"""Documents (or layers) below which a bootstrap interval means nothing."""
SAME = 1e-9
"""Shares of FLOPs that differ by less are one point of a curve."""
FLOPS = ("block", "total")
"""What a budget may count: attention and MLP sublayers alone, or with them all that a method adds
or cannot save (routers, exits, keys and values of skipped tokens, the LM head)."""
_AT_ONCE = 4_000_000

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


@dataclass(frozen=True)
class Difference:
    """``value = value_a - value_b`` with its 95% interval, two-sided p, and units resampled."""

    value_a: float
    value_b: float
    value: float
    low: float
    high: float
    p: float
    n: int


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


def difference(a: Point, b: Point, seed: int = 0) -> Difference:
    """A minus B over the documents of both. Raises UserError if they are not the same documents."""
    check_paired(a, b)
    return paired(a.outcomes, b.outcomes, a.weights, seed)


@dataclass(frozen=True)
class Reach:
    """The least share of dense's block FLOPs at which a curve is as good as dense, with its 95%
    interval over ``n`` documents; ``open``: the curve was not measured any lower."""

    value: float
    low: float
    high: float
    n: int
    open: bool


def reach(points: Sequence[Point], dense: Point, higher_is_better: bool, seed: int = 0) -> Reach:
    """Where the curve through ``points`` and ``dense`` first is as good as dense.

    Between two points the value is interpolated linearly. The interval is the percentile bootstrap
    over documents, values and FLOPs resampled together; what a method chose on these documents is
    taken as given. Raises UserError if the points are not of
    dense's documents.
    """
    ordered = curve([*points, dense])
    for each in ordered:
        check_paired(each, dense)
    sign = 1.0 if higher_is_better else -1.0
    count = len(dense.documents)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    times = np.concatenate([np.ones((1, count)), drawn])  # first as observed
    weight = times * dense.weights
    shares = np.stack([times @ x.flops / (times @ x.dense_flops) for x in ordered])
    values = np.stack([weight @ x.outcomes for x in ordered])
    ahead = sign * (values - weight @ dense.outcomes) / weight.sum(1)
    ahead[-1] = 0.0  # dense itself, whatever was averaged into it at full depth
    found = _first_crossing(shares, np.where(np.abs(ahead) < SAME, 0.0, ahead))
    low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Reach(float(found[0]), float(low), float(high), count, bool(ahead[0, 0] >= 0))


def _first_crossing(shares: Vector, ahead: Vector) -> Vector:
    """Where each column of ``ahead`` ``[points, resamples]`` first is not negative, on ``shares``
    of the same shape; the last point always is."""
    first = (ahead >= -SAME).argmax(0)
    columns = np.arange(ahead.shape[1])
    before = np.maximum(first - 1, 0)
    gap, now = ahead[before, columns], ahead[first, columns]
    rise = np.where(now - gap > 0, now - gap, 1.0)
    part = np.where(first > 0, np.clip(-gap / rise, 0.0, 1.0), 1.0)
    start, end = shares[before, columns], shares[first, columns]
    return start + part * (end - start)


def paired(a: Vector, b: Vector, weights: Vector | None = None, seed: int = 0) -> Difference:
    """Weighted mean of ``a`` minus that of ``b``, paired by position (``[units]`` each).

    p is twice the smaller share of resampled differences on either side of 0, the observed sample
    counted in (Davison and Hinkley 1997, eq. 4.11); 1 where nothing ever differs.
    """
    weights = np.ones(len(a)) if weights is None else weights
    whole = weights.sum()
    values = float(a @ weights / whole), float(b @ weights / whole)
    apart = (a - b) * weights
    if len(a) < 2:
        return Difference(*values, float(apart.sum() / whole), -math.inf, math.inf, 1.0, len(a))
    found = bootstrap(
        (apart, weights),
        lambda top, bottom, axis: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=max(1, _AT_ONCE // len(a)),
        rng=np.random.default_rng(seed),
    )
    drawn = found.bootstrap_distribution
    sides = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Difference(
        *values,
        value=float(apart.sum() / whole),
        low=float(found.confidence_interval.low),
        high=float(found.confidence_interval.high),
        p=min(1.0, 2 * (1 + int(sides)) / (1 + RESAMPLES)),
        n=len(a),
    )


def mcnemar(a: Vector, b: Vector) -> float:
    """Two-sided exact p of McNemar's test (McNemar 1947; the binomial test of the documents on
    which the two differ) for paired outcomes 0 or 1, ``[units]`` each; 1 where none differs.

    Raises:
        ValueError: an outcome is neither 0 nor 1, or they are not as many.
    """
    from statsmodels.stats import contingency_tables

    if len(a) != len(b) or not (is_binary(a) and is_binary(b)):
        raise ValueError("McNemar's test needs as many outcomes of both, each 0 or 1")
    table = np.histogram2d(a, b, bins=[[-0.5, 0.5, 1.5]] * 2)[0]
    return float(contingency_tables.mcnemar(table, exact=True).pvalue)


def is_binary(outcomes: Vector) -> bool:
    """True if every outcome is 0 or 1."""
    return bool(np.isin(outcomes, (0.0, 1.0)).all())


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for all comparisons of one table (Holm 1979), in the given order."""
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def direction(found: Difference, p_adjusted: float) -> int:
    """1 or -1 where A lies shown above or below B, 0 where no difference is shown.

    Shown means: the interval excludes 0, and the adjusted p is at most 1 - ``LEVEL``.
    """
    if found.low <= 0 <= found.high or p_adjusted > 1 - LEVEL:
        return 0
    return 1 if found.value > 0 else -1


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
