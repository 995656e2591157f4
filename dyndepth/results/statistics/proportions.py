"""How sure a share of counted things is."""

from __future__ import annotations

from dyndepth.results.statistics.intervals import LEVEL, Interval


def share(held: int, of: int) -> Interval:
    """The share ``held / of`` with its Wilson interval, which is one for few things, too, and for
    shares of 0 and 1. The things are taken to be independent. Raises ValueError for no things."""
    from scipy.stats import binomtest

    found = binomtest(held, of).proportion_ci(LEVEL, method="wilson")
    return Interval(held / of, float(found.low), float(found.high))
