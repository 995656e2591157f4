"""How far two rankings of the same few units go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata

from dyndepth.results.statistics.intervals import LEVEL

RESAMPLES = 5_000
LEAST = 5
"""Units below which no interval is given."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's ``rho`` over ``n`` units with the 95% interval ``low`` to ``high``; NaN where
    there is none: few units, or equal values alone."""

    rho: float
    low: float
    high: float
    n: int

    def shown(self) -> dict[str, float | int | None]:
        """As plain values, None where there is none."""
        return {k: None if isnan(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"


def agreement_of(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Agreement:
    """Spearman's rank correlation of two scores of the same units.

    The interval is the percentiles' of a bootstrap over units: of how far it would move with other
    blocks of the same kind, not with other text or another training.
    """
    count = len(first)
    if len(second) != count:
        raise ValueError(f"{count} and {len(second)} scores are not of the same units")
    values = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if count < 2:
        return Agreement(np.nan, np.nan, np.nan, count)
    rho = float(_rho(*values))
    if count < LEAST or np.isnan(rho):
        return Agreement(rho, np.nan, np.nan, count)
    found = bootstrap(
        values,
        _rho,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    drawn = found.bootstrap_distribution
    ends = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Agreement(rho, float(ends[0]), float(ends[1]), count)


def _rho(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    """Pearson's correlation of ranks along the last axis; equal values share their mean rank."""
    apart = [
        ranks - ranks.mean(axis=axis, keepdims=True)
        for ranks in (rankdata(values, axis=axis) for values in (first, second))
    ]
    spread = np.sqrt((apart[0] ** 2).sum(axis=axis) * (apart[1] ** 2).sum(axis=axis))
    with np.errstate(invalid="ignore"):  # a resample of one value alone has no correlation
        return (apart[0] * apart[1]).sum(axis=axis) / spread
