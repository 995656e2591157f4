"""Differences between two methods on the same documents, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from dyndepth.results.statistics.curves import SAME, Point, Vector, check_paired, curve
from dyndepth.results.statistics.intervals import LEVEL

RESAMPLES = 10_000
"""Enough that p = 2 / (RESAMPLES + 1), the least there is, outlives Holm over 200 comparisons."""
_AT_ONCE = 4_000_000


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
