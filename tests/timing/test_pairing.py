"""The statistic of interleaved pairs, on series whose answer is known, and the order of calls."""

from __future__ import annotations

import gc
import math
import random
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from dyndepth.timing.pairing import LEAST_PAIRS, interleave, ratio


def noisy(n: int, speedup: float, seed: int) -> tuple[list[float], list[float]]:
    """Pairs whose machine slows down tenfold on the way, with independent noise of 5%."""
    draw = random.Random(seed)
    drift = [1 + 9 * i / n for i in range(n)]
    dense = [d * draw.lognormvariate(0, 0.05) for d in drift]
    other = [d / speedup * draw.lognormvariate(0, 0.05) for d in drift]
    return dense, other


def test_ratio_is_taken_within_pairs_so_drift_cancels():
    dense = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    found = ratio(dense, [value / 1.25 for value in dense])
    assert (found.median, found.low, found.high) == pytest.approx((1.25, 1.25, 1.25))
    assert found.n == 6
    assert found.margin == pytest.approx(0)


def test_one_disturbed_pair_does_not_move_the_ratio():
    dense, other = noisy(25, 1.5, seed=3)
    calm = ratio(dense, other)
    dense[7] *= 100
    assert ratio(dense, other).median == pytest.approx(calm.median, rel=0.03)


def test_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(200):
        found = ratio(*noisy(15, 1.5, seed))
        assert found.low <= found.median <= found.high
        held += found.low <= 1.5 <= found.high
    assert held >= 0.93 * 200


def test_interval_narrows_with_pairs():
    wide, narrow = (ratio(*noisy(n, 1.5, seed=1)).margin for n in (9, 200))
    assert narrow < wide / 2


def test_too_few_pairs_have_no_interval():
    assert math.isnan(ratio([1.0] * (LEAST_PAIRS - 1), [1.0] * (LEAST_PAIRS - 1)).low)
    assert ratio([1.0] * LEAST_PAIRS, [1.0] * LEAST_PAIRS).low == 1.0


@pytest.mark.parametrize(("dense", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired_is_refused(dense, other):
    with pytest.raises(ValueError, match="can't be paired"):
        ratio(dense, other)


class Recorder:
    """Functions that write down when they and their contexts are run."""

    def __init__(self, *names: str) -> None:
        self.log: list[str] = []
        self.functions = {name: lambda name=name: self.log.append(name) for name in names}

    def rounds(self) -> list[tuple[str, ...]]:
        width = len(self.functions)
        return [tuple(self.log[i : i + width]) for i in range(0, len(self.log), width)]


def test_every_round_holds_each_function_once_in_changing_order():
    recorder = Recorder("a", "b", "c")
    times = interleave(recorder.functions, repeats=20, warmup=0, seed=1)
    assert {name: len(own) for name, own in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = recorder.rounds()
    assert all(sorted(own) == ["a", "b", "c"] for own in rounds)
    assert len(set(rounds)) > 2
    # Every second round mirrors the one before, so places even out.
    assert all(
        first == second[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True)
    )
    places = Counter((name, own.index(name)) for own in rounds for name in own)
    assert places["a", 0] == places["a", 2]


def test_order_depends_on_the_seed_alone():
    def order(seed: int) -> list[str]:
        recorder = Recorder("a", "b", "c")
        interleave(recorder.functions, repeats=12, warmup=0, seed=seed)
        return recorder.log

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_warm_up_is_run_and_not_counted():
    recorder = Recorder("a", "b")
    times = interleave(recorder.functions, repeats=4, warmup=3, seed=0)
    assert len(times["a"]) == 4
    assert 4 + 3 <= len(recorder.rounds()) <= 4 + 9


def test_warm_up_goes_on_while_a_function_gets_faster(monkeypatch):
    clock = {"now": 0.0, "calls": 0}
    monkeypatch.setattr("dyndepth.timing.pairing.time.perf_counter", lambda: clock["now"])

    def run() -> None:
        clock["calls"] += 1
        clock["now"] += 1.0 if clock["calls"] > 4 else 100.0 / 4 ** clock["calls"]

    times = interleave({"a": run}, repeats=3, warmup=2, seed=0)
    assert clock["calls"] == 6 + 3
    assert times["a"] == [1.0, 1.0, 1.0]


def test_contexts_lie_outside_of_the_clock(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("dyndepth.timing.pairing.time.perf_counter", lambda: clock["now"])

    def spend(seconds: float) -> None:
        clock["now"] += seconds

    @contextmanager
    def costly():
        spend(100)
        yield
        spend(100)

    times = interleave(
        {"a": lambda: spend(1), "b": lambda: spend(2)},
        around={"b": costly},
        repeats=3,
        warmup=1,
    )
    assert times == {"a": [1, 1, 1], "b": [2, 2, 2]}


def test_queue_is_drained_before_each_reading_of_the_clock():
    log: list[str] = []
    interleave(
        {"a": lambda: log.append("run")}, repeats=2, warmup=0, synchronise=lambda: log.append("|")
    )
    assert log == ["|", "run", "|"] * 2


def test_the_device_that_is_named_is_drained(monkeypatch: pytest.MonkeyPatch):
    """torch by itself waits for its current device, and the clock would stop too soon."""
    drained: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda place: drained.append(str(place)))
    interleave({"a": lambda: None}, repeats=1, warmup=0, device="cuda:1")
    interleave({"a": lambda: None}, repeats=1, warmup=0, device="cpu")
    assert drained == ["cuda:1"] * 2


def test_rounds_end_when_enough_says_so_or_at_the_most():
    asked: list[int] = []

    def enough(times: dict[str, list[float]]) -> bool:
        asked.append(len(times["a"]))
        return asked[-1] == 7

    assert len(interleave({"a": int}, repeats=5, warmup=0, enough=enough, most=50)["a"]) == 7
    assert asked == [5, 6, 7]
    never = interleave({"a": int}, repeats=5, warmup=0, enough=lambda _: False, most=8)
    assert len(never["a"]) == 8


def test_garbage_collection_rests_while_timed_and_survives_an_exception():
    seen: list[bool] = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, repeats=2, warmup=0)
    assert seen == [False, False]
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 // 0}, repeats=1, warmup=0)
    assert gc.isenabled()


def test_measuring_nothing_is_refused():
    with pytest.raises(ValueError, match="measure nothing"):
        interleave({}, repeats=3)
