"""What lm-eval's aggregations mean for one document, and their standard errors in closed form.

lm-eval logs some metrics as numbers, others as (log-likelihood, bytes or words); it estimates the
error of perplexities by bootstrap, in a pool of processes, or not at all. Here each known
aggregation has a value on a single document and an analytic standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics

_MEAN, _PERPLEXITY = lm_eval_metrics.mean, lm_eval_metrics.perplexity
_WEIGHTED, _BITS = lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte


def outcome(aggregation: Callable[..., Any] | None, item: Any) -> tuple[float | None, float]:
    """A metric's value on one document alone, and the document's weight in the mean.

    ``item`` is what lm-eval logged. The value is None where a metric has no meaning on a single
    document (F1 over all documents, BLEU) or its number is too large.
    """
    if aggregation is not None and aggregation in (_WEIGHTED, _BITS, _PERPLEXITY):
        weight = 1.0 if aggregation is _PERPLEXITY else float(item[1])
        try:
            return float(aggregation([item])), weight
        except (OverflowError, ZeroDivisionError):  # beyond 1e308; of a text without a byte
            return None, weight
    number = isinstance(item, bool | int | float | np.number)
    return (float(item) if number else None), 1.0


def standard_error(aggregation: Callable[..., Any] | None, items: Sequence[Any]) -> float | None:
    """Standard error of an aggregated metric over documents; None where no formula is known.

    A mean: sample standard deviation over the root of n. A perplexity, exp(-mean): the error of
    the mean times the perplexity (delta method). Weighted by bytes or words: the linearised error
    of a ratio of sums (Cochran 1977, eq. 6.4), then the delta method again.
    """
    if len(items) < 2:
        return None
    if aggregation in (_WEIGHTED, _BITS):
        logs, sizes = np.array(items, dtype=np.float64).T
        ratio = logs.sum() / sizes.sum()
        residuals = logs - ratio * sizes
        error = float(residuals.std(ddof=1) * math.sqrt(len(items)) / sizes.sum())
        return error / math.log(2) if aggregation is _BITS else error * math.exp(-ratio)
    if aggregation not in (_MEAN, _PERPLEXITY):
        return None
    values = np.array(items, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return error * math.exp(-values.mean()) if aggregation is _PERPLEXITY else error
