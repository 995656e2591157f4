"""Bootstrap intervals of mean scores over tasks, unpaired and paired with dense.

Documents are resampled within each task, tasks weigh the same. The generator is seeded and the
resampling depends on the numbers of documents alone, so equal inputs give equal digits and two
methods that were scored on the same documents are resampled alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
LEAST = 10
"""Documents of a task (or layers) below which a bootstrap interval means nothing, and none is
given."""
LEVEL = 0.95
_AT_ONCE = 4_000_000
_KEPT = 16_000_000
"""Draws that are kept for the next cell, which is likely to have as many documents."""

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
    sizes = tuple(map(len, tasks))
    if RESAMPLES * sum(sizes) <= _KEPT:
        draws = zip(_counts(sizes, seed), tasks, strict=True)
        return np.stack([counts @ outcomes / len(outcomes) for counts, outcomes in draws])
    generator = np.random.default_rng(seed)
    found = []
    for outcomes in tasks:
        drawn = _drawn(generator, len(outcomes))
        found.append(np.concatenate([outcomes[part].mean(axis=1) for part in drawn]))
    return np.stack(found)


@lru_cache(maxsize=4)
def _counts(sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """How often each resample draws each document, ``[resamples, documents]`` by task: the same
    for all cells that were scored on as many documents."""
    generator = np.random.default_rng(seed)
    found = []
    for n in sizes:
        drawn = np.concatenate(list(_drawn(generator, n)))
        places = drawn + n * np.arange(RESAMPLES)[:, None]
        counts = np.bincount(places.ravel(), minlength=RESAMPLES * n)
        found.append(counts.reshape(RESAMPLES, n).astype(float))
    return found


def _drawn(generator: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Documents that the resamples draw, ``[resamples, n]`` in parts."""
    step = max(1, _AT_ONCE // n)
    for start in range(0, RESAMPLES, step):
        yield generator.integers(n, size=(min(step, RESAMPLES - start), n))


def _interval(value: float, resampled: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
