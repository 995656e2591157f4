"""Interleaved measurement and the ratio of its pairs.

A machine's speed drifts, by clocks, temperature and neighbours, by more than the differences that
matter here. So nothing is timed one after the other: every round runs everything once, and a
speedup is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

LEAST_PAIRS = 6
"""Fewer pairs have no distribution-free 95% interval: the range of n values covers the median with
probability 1 - 2 ** (1 - n), which is 0.938 for 5 and 0.969 for 6."""
_LEVEL = 0.95
_STILL_FALLING = 0.95
_MOST_WARM_UP = 3

Times = dict[str, list[float]]
"""Seconds by function, one a round."""


@dataclass(frozen=True)
class Median:
    """The median of ``n`` numbers with the ends of its 95% interval (NaN below 6 numbers)."""

    median: float
    low: float
    high: float
    n: int

    @property
    def margin(self) -> float:
        """Half the width of the interval as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median


def ratio(baseline: Sequence[float], other: Sequence[float]) -> Median:
    """How many times faster ``other`` is than ``baseline``, pair by pair; see ``median``.

    Both are seconds, one a round, in the order of the rounds.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    if not baseline or len(baseline) != len(other):
        raise ValueError(f"{len(baseline)} and {len(other)} times can't be paired")
    return median(np.asarray(baseline, dtype=float) / np.asarray(other, dtype=float))


def median(numbers: Sequence[float] | np.ndarray[Any, Any]) -> Median:
    """The median of ``numbers``, at least one. The interval is that of order statistics (binomial,
    at least 95%): it assumes nothing about the distribution of the noise."""
    found = np.asarray(numbers, dtype=float)
    middle = float(np.median(found))
    interval = stats.quantile_test(found, q=middle, p=0.5).confidence_interval(_LEVEL)
    return Median(middle, float(interval.low), float(interval.high), len(found))


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    *,
    around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    repeats: int = 9,
    warmup: int = 2,
    seed: int = 0,
    device: str | torch.device = "cpu",
    synchronise: Callable[[], Any] | None = None,
    enough: Callable[[Times], bool] | None = None,
    most: int | None = None,
) -> Times:
    """Run all ``functions`` once a round and return their seconds, round by round.

    Args:
        functions: what is timed, by name.
        around: for some names, a context entered before and left after each timed call, outside
            of the clock: set-up that must not count.
        repeats: rounds that are timed, the least number if ``enough`` is given.
        warmup: rounds before them, up to three times as many while some function still gets
            faster.
        seed: of the order within the rounds. It is drawn anew every second round and reversed in
            between, so that no function profits from its place.
        device: its queue is drained before the clock is read.
        synchronise: how, instead of by ``device``.
        enough: asked after each round from the ``repeats``-th on, with all times so far; True
            ends the measurement.
        most: rounds at which it ends in any case.
    """
    if repeats < 1 or not functions:
        raise ValueError(f"{repeats} rounds of {len(functions)} functions measure nothing")
    synchronise = synchronise or draining(device)
    contexts = around or {}
    shuffler = random.Random(seed)
    order = list(functions)
    rounds = 0

    def play(times: Times) -> None:
        nonlocal rounds
        if rounds % 2:
            order.reverse()
        else:
            shuffler.shuffle(order)
        rounds += 1
        for name in order:
            with contexts.get(name, nullcontext)():
                times[name].append(_seconds(functions[name], synchronise))

    before: Times = {name: [] for name in functions}
    for played in range(1, _MOST_WARM_UP * warmup + 1):
        play(before)
        if played >= warmup and _settled(before):
            break
    times: Times = {name: [] for name in functions}
    for played in range(1, max(repeats, most or repeats) + 1 if enough else repeats + 1):
        play(times)
        if enough is not None and played >= repeats and enough(times):
            break
    return times


def draining(device: str | torch.device) -> Callable[[], None]:
    """What waits until ``device`` has done its work: the one named, be torch's current one another.

    Without an index it is torch's current one of that kind; a CPU's work is done already.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return lambda: None
    return partial(torch.accelerator.synchronize, place)


def _settled(times: Times) -> bool:
    """Whether no function's last time lies clearly below its median so far."""
    return all(own[-1] >= _STILL_FALLING * statistics.median(own) for own in times.values())


def _seconds(function: Callable[[], Any], synchronise: Callable[[], Any]) -> float:
    """Host seconds of one call, end to end; no garbage is collected meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronise()
        started = time.perf_counter()
        function()
        synchronise()
        return time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()
