"""Paired bootstrap over documents, of many rows at once.

All rows of a call were scored on the same documents and are resampled alike: one matrix says how
often each resample holds each document, and a resampled mean is a product with it. The matrix
depends on the number of documents alone, so equal numbers give equal digits, and any two calls
over equally many documents are paired. Intervals are percentiles, as in
``dyndepth.results.statistics.curves``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dyndepth.results.statistics.intervals import LEVEL

RESAMPLES = 50_000
"""Enough that the least p there is, 2 / (RESAMPLES + 1), outlives Holm over 1,200 comparisons."""
ZERO = 1e-12
"""A resampled mean nearer to 0 is 0: sums in another order differ by less."""
_ROWS = 128
_AT_ONCE = 4_000_000

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimates:
    """``value`` with its 95% interval ``low`` to ``high`` and the two-sided ``p`` of 0: one entry a
    row each; NaN where the value does not exist."""

    value: Vector
    low: Vector
    high: Vector
    p: Vector


def means(outcomes: Vector, weights: Vector, seed: int = 0) -> Estimates:
    """Weighted means over documents of ``outcomes`` ``[rows, documents]``.

    A row of differences gives a paired comparison. p is twice the smaller share of resampled means
    on either side of 0, the observed sample counted in (Davison and Hinkley 1997, eq. 4.11).
    """
    found = [
        _estimates(block @ weights / weights.sum(), drawn)
        for block, drawn in _resampled(outcomes, weights, seed)
    ]
    return _joined(found)


def ratios(outcomes: Vector, base: Vector, weights: Vector, seed: int = 0) -> Estimates:
    """Weighted means of ``outcomes`` ``[rows, documents]`` over that of ``base`` ``[documents]``.

    NaN if the mean of ``base`` is not positive; resamples in which it is not are left out. p is
    NaN: whether a ratio is 1 is asked by the difference.
    """
    whole = float(base @ weights / weights.sum())
    if whole <= 0:
        empty = np.full(len(outcomes), np.nan)
        return Estimates(empty, empty, empty, empty)
    ((_, below),) = _resampled(base[None], weights, seed)
    usable = below[0] > ZERO
    found = []
    for block, drawn in _resampled(outcomes, weights, seed):
        value = block @ weights / weights.sum() / whole
        low, high = _ends(drawn[:, usable] / below[0, usable])
        found.append(Estimates(value, low, high, np.full(len(value), np.nan)))
    return _joined(found)


def contests(
    apart: Sequence[Vector], weights: Vector, signs: Sequence[float], seed: int = 0
) -> list[float]:
    """Two-sided p of each method against the hardest of its rivals, their number adjusted for.

    ``apart``: for each method its outcomes minus those of every rival, ``[rivals, documents]``.
    ``signs``: 1 where more is better, -1 where less is.

    Where the method lies behind a rival, p is of no rival being better: the largest studentised
    lead of a rival against its law under resampling, centred (max-t; Hsu 1996, Multiple
    Comparisons, ch. 4; Romano and Wolf 2005), so that many equal rivals are not taken for a better
    one. Where it lies ahead of all, p is the largest of those against each (Berger 1982).
    """
    found = []
    for block in _grouped(apart):
        stacked = np.concatenate([apart[index] for index in block])
        ((_, drawn),) = _resampled(stacked, weights, seed, rows=len(stacked))
        start = 0
        for index in block:
            own = slice(start, start + len(apart[index]))
            ahead = signs[index] * (apart[index] @ weights / weights.sum())
            found.append(_contest(ahead, signs[index] * drawn[own]))
            start = own.stop
    return found


def _contest(ahead: Vector, drawn: Vector) -> float:
    """``contests`` for one method: its leads ``[rivals]``, as observed and ``drawn``."""
    count = drawn.shape[1]
    if ahead.min() > ZERO:
        sides = int((drawn <= ZERO).sum(axis=1).max())
    else:
        spread = drawn.std(axis=1)
        real = spread > ZERO
        if (~real & (ahead < -ZERO)).any():  # a lead that no resample changes
            sides = 0
        elif real.any():
            lead = -ahead[real] / spread[real]
            chance = (ahead[real, None] - drawn[real]) / spread[real, None]
            sides = int((chance.max(axis=0) >= lead.max() - ZERO).sum())
        else:
            sides = count
    return min(1.0, 2 * (1 + sides) / (1 + count))


def _grouped(apart: Sequence[Vector]) -> Iterator[list[int]]:
    """Indices of neighbours that together have at most ``_ROWS`` rows, or one alone."""
    block: list[int] = []
    rows = 0
    for index, each in enumerate(apart):
        if block and rows + len(each) > _ROWS:
            yield block
            block, rows = [], 0
        block.append(index)
        rows += len(each)
    if block:
        yield block


def _resampled(
    outcomes: Vector, weights: Vector, seed: int, rows: int = _ROWS
) -> Iterator[tuple[Vector, Vector]]:
    """Blocks of rows with their resampled means ``[rows, resamples]``."""
    times = _times(len(weights), seed)
    step = max(1, _AT_ONCE // len(weights))
    for start in range(0, len(outcomes), rows):
        block = outcomes[start : start + rows]
        drawn = np.empty((len(block), RESAMPLES))
        for first in range(0, RESAMPLES, step):
            part = times[first : first + step].T * weights[:, None]
            drawn[:, first : first + step] = block @ part / part.sum(axis=0)
        yield block, drawn


@lru_cache(maxsize=2)
def _times(documents: int, seed: int) -> NDArray[np.uint16]:
    """How often each resample holds each document, ``[resamples, documents]``."""
    generator = np.random.default_rng(seed)
    found = np.empty((RESAMPLES, documents), dtype=np.uint16)
    step = max(1, _AT_ONCE // documents)
    equal = np.full(documents, 1 / documents)
    for first in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - first)
        found[first : first + size] = generator.multinomial(documents, equal, size)
    return found


def _estimates(value: Vector, drawn: Vector) -> Estimates:
    below, above = (drawn <= ZERO).sum(axis=1), (drawn >= -ZERO).sum(axis=1)
    p = np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (1 + RESAMPLES))
    low, high = _ends(drawn)
    return Estimates(value, low, high, p)


def _ends(drawn: Vector) -> Vector:
    found: Vector = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return found


def _joined(parts: list[Estimates]) -> Estimates:
    if not parts:
        return Estimates(*(np.empty(0) for _ in range(4)))
    names = ("value", "low", "high", "p")
    return Estimates(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
