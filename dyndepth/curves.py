"""What is said of a whole curve: its mean value, what its speed costs, and who dominates whom.

A curve is a list of ``stats.Point``: values against the executed fraction of dense's FLOPs.
Each measure is a weighted mean over documents of a vector that is computed here, so that intervals
and paired comparisons are those of any mean. Nothing is said outside of the measured points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.integrate import trapezoid

from dyndepth.stats import SAME, Point, Vector, curve, interpolate


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
