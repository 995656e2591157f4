"""Scores of stored cells against their own documents: value and standard error of each metric."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.verify_stored import SAME, Finding, by_task, no_number, text_of

Score = tuple[float, float | None]
"""A metric's value over documents, and its standard error."""


def means(cells: Sequence[Cell]) -> Iterator[Finding]:
    """Scores that are not the mean over the cell's own documents.

    What kind of mean a metric is (of outcomes or of their logarithms; weighted or not) is not
    stored; it is taken to be the one that fits most cells. A metric that none fits is noted.
    """
    scores: dict[tuple[str, str], list[tuple[Cell, Row, dict[str, Score]]]] = defaultdict(list)
    for cell in cells:
        try:
            samples = by_task(cell)
            for row in cell.accuracy:
                key = f"{row['metric']},{row['filter']}"
                fits = _means(samples[row["task"]], key)
                if fits and not no_number(row["value"]):
                    scores[row["task"], key].append((cell, row, fits))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # told by of_cell
    for (task, key), entries in scores.items():
        counts = Counter(
            kind for _, row, fits in entries for kind in fits if _near(row["value"], fits[kind][0])
        )
        what = f"of {task} {key.partition(',')[0]} against its documents"
        if not counts and len(entries) > 1:
            yield Finding("run", f"is no mean over documents: {key} of {task}", failure=False)
            continue
        kind = counts.most_common(1)[0][0] if counts else next(iter(entries[0][2]))
        for cell, row, fits in entries:
            value, error = fits.get(kind, (math.nan, None))
            if not _near(row["value"], value):
                yield Finding(
                    cell.key, f"accuracy: value {what}", text_of(row["value"]), text_of(value)
                )
            elif (
                row["stderr"] is not None and error is not None and not _near(row["stderr"], error)
            ):
                yield Finding(
                    cell.key, f"accuracy: stderr {what}", text_of(row["stderr"]), text_of(error)
                )


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME, abs_tol=1e-9)


def _means(rows: Sequence[Row], key: str) -> dict[str, Score]:
    """Means of the outcomes ``key`` over documents, by kind; none where a document has no value.

    A document's weight is 1, that of its main metric, or what its likelihood and its perplexity say
    together (words, for a perplexity by word).
    """
    values = [json.loads(row["outcomes"]).get(key) for row in rows]
    if not values or any(map(no_number, values)):
        return {}
    weights: dict[str, list[float]] = {"plain": [1.0] * len(rows)}
    if all("weight" in row for row in rows):
        weights["weighted"] = [row["weight"] for row in rows]
    found = {kind: _mean(values, each) for kind, each in weights.items()}
    if min(values) > 0:
        logs = [math.log(value) for value in values]
        likelihoods = [json.loads(row.get("loglikelihoods") or "[]") for row in rows]
        if all(len(each) == 1 for each in likelihoods) and all(logs):
            weights["by size"] = [
                -each[0] / log for each, log in zip(likelihoods, logs, strict=True)
            ]
        for kind, each in weights.items():
            value, error = _mean(logs, each)
            # A perplexity may be beyond all numbers; then it is not stored either.
            whole = math.exp(value) if value < 700 else math.inf
            found[f"{kind}, of logarithms"] = whole, None if error is None else error * whole
    return {kind: score for kind, score in found.items() if math.isfinite(score[0])}


def _mean(values: Sequence[float], weights: Sequence[float]) -> Score:
    """Weighted mean and its linearised standard error (Cochran 1977, eq. 6.4)."""
    whole, n = math.fsum(weights), len(values)
    if not whole:
        return math.nan, None
    value = math.fsum(x * w for x, w in zip(values, weights, strict=True)) / whole
    if n < 2:
        return value, None
    squares = math.fsum((w * (x - value)) ** 2 for x, w in zip(values, weights, strict=True))
    return value, math.sqrt(squares / (n - 1) * n) / abs(whole)
