"""Bootstrap intervals of mean scores over tasks, unpaired and paired with dense.

Documents are resampled within each task, tasks weigh the same. The generator is seeded and the
resampling depends on the numbers of documents alone, so equal inputs give equal digits and two
methods that were scored on the same documents are resampled alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 4_000_000

Outcomes = Mapping[str, Mapping[str, float]]
"""Task -> document -> outcome (1.0 right, 0.0 wrong)."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def mean_score(outcomes: Outcomes, seed: int = 0) -> Interval:
    """Mean over tasks of the mean outcome over documents, with its percentile interval."""
    tasks = [np.array([docs[d] for d in sorted(docs)]) for _, docs in sorted(outcomes.items())]
    value = float(np.mean([task.mean() for task in tasks]))
    return _interval(value, _resampled(tasks, seed).mean(axis=0))


def retained(outcomes: Outcomes, dense: Outcomes, seed: int = 0) -> Interval | None:
    """Mean score / dense's mean score on the documents that both were scored on.

    None where they share no document, or where dense scores nothing at all.
    """
    pairs = []
    for task in sorted(set(outcomes) & set(dense)):
        shared = sorted(set(outcomes[task]) & set(dense[task]))
        if shared:
            pairs.append(np.array([(outcomes[task][d], dense[task][d]) for d in shared]))
    if not pairs:
        return None
    own = float(np.mean([pair[:, 0].mean() for pair in pairs]))
    base = float(np.mean([pair[:, 1].mean() for pair in pairs]))
    if base <= 0:
        return None
    means = _resampled(pairs, seed).mean(axis=0)
    usable = means[:, 1] > 0
    return _interval(own / base, means[usable, 0] / means[usable, 1])


def expected_margin(documents: int) -> float:
    """Half the width of the 95% interval of an accuracy of one half on so many documents."""
    return 1.96 * 0.5 / documents**0.5


def _resampled(tasks: list[np.ndarray], seed: int) -> np.ndarray:
    """Means of resampled documents: ``[tasks, resamples]`` or ``[tasks, resamples, columns]``."""
    generator = np.random.default_rng(seed)
    found = []
    for outcomes in tasks:
        n = len(outcomes)
        step = max(1, _AT_ONCE // n)
        parts = [
            outcomes[generator.integers(n, size=(min(step, RESAMPLES - start), n))].mean(axis=1)
            for start in range(0, RESAMPLES, step)
        ]
        found.append(np.concatenate(parts))
    return np.stack(found)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
