"""Paired bootstrap over documents, of many rows at once.

All rows of a call were scored on the same documents and are resampled alike: one matrix says how
often each resample holds each document, and a resampled mean is a product with it. The matrix
depends on the number of documents alone, so equal numbers give equal digits, and any two calls
over equally many documents are paired. Intervals are percentiles, as in ``dyndepth.stats``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dyndepth.intervals import LEVEL

RESAMPLES = 50_000
"""Enough that the least p there is, 2 / (RESAMPLES + 1), outlives Holm over 1,200 comparisons."""
ZERO = 1e-12
"""A resampled mean nearer to 0 is 0: sums in another order differ by less."""
_ROWS = 32
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


def _resampled(outcomes: Vector, weights: Vector, seed: int) -> Iterator[tuple[Vector, Vector]]:
    """Blocks of rows with their resampled means ``[rows, resamples]``."""
    times = _times(len(weights), seed)
    step = max(1, _AT_ONCE // len(weights))
    for start in range(0, len(outcomes), _ROWS):
        block = outcomes[start : start + _ROWS]
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
