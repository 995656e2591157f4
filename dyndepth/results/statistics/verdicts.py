"""Rows that wait for their intervals and p-values, Holm's correction, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dyndepth.cells.identity import Row
from dyndepth.results.statistics.curves import Vector
from dyndepth.results.statistics.differences import Difference
from dyndepth.results.statistics.intervals import LEAST, LEVEL
from dyndepth.results.statistics.resampling import contests, means


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


@dataclass
class Pending:
    """Entries of rows that wait to be estimated together, on the same documents."""

    weights: Vector
    waiting: list[tuple[Row, str, tuple[str, str], Vector, bool]] = field(default_factory=list)
    rivals: list[tuple[Row, Vector, float]] = field(default_factory=list)

    def add(
        self,
        row: Row,
        column: str,
        by_document: Vector,
        ends: tuple[str, str] | None = None,
        test: bool = False,
    ) -> None:
        """The weighted mean of ``by_document`` will fill ``column``, its interval ``ends``
        (``column_low`` and ``column_high``), and two-sided p of 0 ``p`` if ``test``."""
        own = ends or (f"{column}_low", f"{column}_high")
        self.waiting.append((row, column, own, by_document, test))

    def against(self, row: Row, apart: Sequence[Vector], sign: float) -> None:
        """``p`` of the hardest rival will be filled; ``apart`` as in ``resampling.contests``."""
        self.rivals.append((row, np.stack(apart), sign))

    def fill(self) -> None:
        """Estimate all that waits. Too few documents give values without intervals."""
        if not self.waiting:
            return
        stacked = np.stack([vector for *_, vector, _ in self.waiting])
        if len(self.weights) < LEAST:
            values = stacked @ self.weights / self.weights.sum()
            for (row, column, *_), value in zip(self.waiting, values, strict=True):
                row[column] = float(value)
            return
        found = means(stacked, self.weights)
        for index, (row, column, (low, high), _, test) in enumerate(self.waiting):
            row[column] = float(found.value[index])
            row[low], row[high] = float(found.low[index]), float(found.high[index])
            row |= {"p": float(found.p[index])} if test else {}
        vectors, signs = [apart for _, apart, _ in self.rivals], [sign for *_, sign in self.rivals]
        tested = contests(vectors, self.weights, signs)
        for (row, *_), p in zip(self.rivals, tested, strict=True):
            row["p"] = p


def adjust(rows: Sequence[Row]) -> None:
    """Fill ``p_holm``: Holm's correction over the rows with the same metric (and FLOPs)."""
    families: dict[tuple[str | None, str | None], list[Row]] = {}
    for row in rows:
        if row.get("p") is not None:
            families.setdefault((row.get("metric"), row.get("flops")), []).append(row)
    for tested in families.values():
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p


def verdict(row: Row, column: str, low: str, high: str) -> str:
    """Whether the difference in ``column``, with its interval from ``low`` to ``high``, is shown,
    and to which side."""
    found = Difference(math.nan, math.nan, row[column], row[low], row[high], row["p"], row["n"])
    sign = direction(found, row["p_holm"])
    if sign == 0:
        return "no difference shown"
    return "better" if (sign > 0) == row["higher_is_better"] else "worse"
