"""The multiple-choice knapsack, solved exactly: one option a class, most value within a budget.

Values and costs are real numbers. Options that cost more and give no more are removed, then classes
are merged one by one into the Pareto-optimal partial choices (Nemhauser and Ullmann 1969). A
partial choice is dropped as soon as even the linear relaxation of the classes that remain (Sinha
and Zoltners 1979) can't bring it up to a wanted value; that value begins just below the relaxation
of the whole, where next to nothing survives, and is lowered until some choice is found.

Sums are exact, whatever their order: costs are rounded up, values to nearest, to multiples of a
power of two of which every possible sum holds fewer than 2**52. Whole numbers with smaller sums,
such as FLOPs, are kept as they are. So ``math.fsum`` of the chosen costs never exceeds the budget,
and a choice is missed only if it is within n 2**-51 of the budget or of the best value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyndepth.common.errors import UserError

Numbers = NDArray[np.float64]

_BITS = 52
_SHARES = (2.0**-10, 2.0**-8, 2.0**-6, 2.0**-4, 2.0**-2, 1.0)
"""Parts of the gap between the relaxation and a first choice in which the best one is looked for;
the last part holds the first choice itself, so something is found."""
_ROUNDING = 1e-11
"""What a relaxation may be wrong by, relative to the greatest value."""


def solve(values: Numbers, costs: Numbers, budget: float) -> NDArray[np.int64]:
    """The option of each class that together give most value within ``budget``: int64 ``[n]``.

    ``values`` and ``costs`` are float64 ``[n, options]``, finite, of either sign. Of choices with
    equal value the cheapest is taken, of equal options the first. Raises UserError if even the
    cheapest options exceed the budget, ValueError for numbers that are not finite.
    """
    values, costs = np.asarray(values, np.float64), np.asarray(costs, np.float64)
    if values.ndim != 2 or values.shape != costs.shape or not values.shape[1]:
        raise ValueError(f"values {values.shape} and costs {costs.shape} must be [n, options]")
    if not (np.isfinite(values).all() and np.isfinite(costs).all()) or not budget > -math.inf:
        raise ValueError("values, costs and the budget of a knapsack must be numbers")
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    values, _ = _on_grid(values, np.rint)
    costs, unit = _on_grid(costs, np.ceil)
    classes = [_Class.of(*rows) for rows in zip(values, costs, strict=True)]
    cheapest = float(costs.min(1).sum())
    room = math.floor(min(budget, costs.max(1).sum()) / unit) * unit - cheapest
    if room < 0:
        raise UserError(
            f"the cheapest options cost {cheapest:.6g} together, which exceeds the budget of "
            f"{budget:.6g}"
        )
    return _best(classes, room)


@dataclass(frozen=True)
class _Class:
    """A class without dominated options, from the cheapest on; its cost and value count as 0.

    ``hull`` holds positions in the other three: the options that the linear relaxation uses.
    """

    option: NDArray[np.int64]
    cost: Numbers
    value: Numbers
    hull: NDArray[np.int64]

    @classmethod
    def of(cls, values: Numbers, costs: Numbers) -> _Class:
        """The options of one class, ``[options]`` each."""
        order = np.lexsort((-values, costs))
        best = np.maximum.accumulate(values[order])
        kept = order[np.concatenate(([True], best[1:] > best[:-1]))]
        cost, value = costs[kept] - costs[kept[0]], values[kept] - values[kept[0]]
        return cls(kept, cost, value, _hull(cost, value))

    def only(self, keep: NDArray[np.bool_]) -> _Class:
        """The class with some of its options; costs and values stay relative to what they were."""
        cost, value = self.cost[keep], self.value[keep]
        return _Class(self.option[keep], cost, value, _hull(cost, value))


def _on_grid(numbers: Numbers, rounded: Callable[[Numbers], Numbers]) -> tuple[Numbers, float]:
    """Numbers as multiples of a power of two whose sums over classes are exact, and that power."""
    largest = float(np.abs(numbers).max(1).sum())
    # Half the bits' range: differences between two sums are taken as well.
    unit = 2.0 ** (math.frexp(largest)[1] + 1 - _BITS) if largest else 1.0
    return rounded(numbers / unit) * unit, unit


def _hull(cost: Numbers, value: Numbers) -> NDArray[np.int64]:
    """Positions of the upper concave hull of options with ascending cost and value."""
    hull = [0]
    for place in range(1, len(cost)):
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            rise = (value[last] - value[first]) * (cost[place] - cost[first])
            if rise > (value[place] - value[first]) * (cost[last] - cost[first]):
                break
            hull.pop()
        hull.append(place)
    return np.array(hull, dtype=np.int64)


@dataclass(frozen=True)
class _Relaxation:
    """The best value of some classes by the cost that they may have, if options could be mixed.

    Piecewise linear and concave through ``cost`` and ``value``, both from the cheapest choice on.
    ``steps`` are (class, position in its options) in the order in which they are taken.
    """

    cost: Numbers
    value: Numbers
    steps: list[tuple[int, int]]

    @classmethod
    def of(cls, classes: Sequence[_Class]) -> _Relaxation:
        """Merges the steps along the classes' hulls by falling slope."""
        owner = np.repeat(np.arange(len(classes)), [len(c.hull) - 1 for c in classes])
        cost = np.concatenate([np.diff(c.cost[c.hull]) for c in classes] or [np.zeros(0)])
        value = np.concatenate([np.diff(c.value[c.hull]) for c in classes] or [np.zeros(0)])
        place = np.concatenate([c.hull[1:] for c in classes] or [np.zeros(0, np.int64)])
        order = np.argsort(-value / cost, kind="stable")
        # Classes whose cheapest options were taken away begin above 0.
        first = [sum(float(c.cost[0]) for c in classes), sum(float(c.value[0]) for c in classes)]
        return cls(
            first[0] + np.concatenate(([0.0], np.cumsum(cost[order]))),
            first[1] + np.concatenate(([0.0], np.cumsum(value[order]))),
            list(zip(owner[order].tolist(), place[order].tolist(), strict=True)),
        )

    def at(self, room: Numbers) -> Numbers:
        """The relaxed value within ``room``; minus infinity where nothing fits."""
        return np.interp(room, self.cost, self.value, left=-np.inf)

    def slope(self, room: float) -> float:
        """Value a unit of cost at the step that the room ends in."""
        step = int(np.searchsorted(self.cost, room, side="right")) - 1
        rise, run = np.diff(self.value[step : step + 2]), np.diff(self.cost[step : step + 2])
        return float(rise[0] / run[0])


def _best(classes: Sequence[_Class], room: float) -> NDArray[np.int64]:
    """The best choice within ``room``, a cost beyond that of the cheapest options."""
    relaxed = _Relaxation.of(classes)
    if room >= relaxed.cost[-1]:
        return np.array([c.option[-1] for c in classes], dtype=np.int64)
    upper, slope = float(relaxed.at(np.array([room]))[0]), relaxed.slope(room)
    gap = upper - _first_value(classes, relaxed, room)
    slack = _ROUNDING * float(relaxed.value[-1])
    # What an option loses against its class's best at the slope of the relaxation: no choice that
    # holds it can be nearer to the relaxation of the whole.
    gains = [c.value - slope * c.cost for c in classes]
    losses = [gain.max() - gain for gain in gains]
    nearest = [-np.sort(loss)[1] if len(loss) > 1 else -np.inf for loss in losses]
    for share in _SHARES:
        least = upper - share * gap - slack
        reduced = [
            c.only(loss <= upper - least + slack) for c, loss in zip(classes, losses, strict=True)
        ]
        # Classes whose options differ least come last: they multiply the partial choices.
        found = _search(reduced, sorted(range(len(classes)), key=nearest.__getitem__), room, least)
        if found is not None:
            return found
    raise AssertionError("the search lost the choice that it began with")


def _first_value(classes: Sequence[_Class], relaxed: _Relaxation, room: float) -> float:
    """The value of a good choice: the relaxation's steps as far as they fit, then upgrades."""
    taken = [0] * len(classes)
    full: set[int] = set()
    for owner, place in relaxed.steps:
        step = classes[owner].cost[place] - classes[owner].cost[taken[owner]]
        if owner in full or step > room:
            full.add(owner)
            continue
        room -= step
        taken[owner] = place
    for owner, one in enumerate(classes):
        fits = np.searchsorted(one.cost, one.cost[taken[owner]] + room, side="right") - 1
        room -= one.cost[fits] - one.cost[taken[owner]]
        taken[owner] = int(fits)
    return float(sum(one.value[place] for one, place in zip(classes, taken, strict=True)))


def _search(
    classes: Sequence[_Class], order: Sequence[int], room: float, least: float
) -> NDArray[np.int64] | None:
    """The best choice within ``room`` if its value is at least ``least``, else None.

    ``order`` names the classes from the first to be merged to the last.
    """
    chosen = np.array([one.option[0] for one in classes], dtype=np.int64)
    settled = [one for one in classes if len(one.option) == 1]
    order = [owner for owner in order if len(classes[owner].option) > 1]
    cost = np.array([sum(float(one.cost[0]) for one in settled)])
    value = np.array([sum(float(one.value[0]) for one in settled)])
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for step, owner in enumerate(order):
        one = classes[owner]
        rest = _Relaxation.of([classes[later] for later in order[step + 1 :]])
        costs = (cost[:, None] + one.cost).ravel()
        sums = (value[:, None] + one.value).ravel()
        alive = np.flatnonzero(sums + rest.at(room - costs) >= least)
        by_cost = alive[np.lexsort((-sums[alive], costs[alive]))]
        if not len(by_cost):
            return None
        best = np.maximum.accumulate(sums[by_cost])
        kept = by_cost[np.concatenate(([True], best[1:] > best[:-1]))]
        cost, value = costs[kept], sums[kept]
        history.append((kept // len(one.cost), kept % len(one.cost)))
    if cost[-1] > room or value[-1] < least:
        return None
    state = len(value) - 1
    for owner, (parents, places) in zip(reversed(order), reversed(history), strict=True):
        chosen[owner] = classes[owner].option[places[state]]
        state = int(parents[state])
    return chosen
