"""Busy time of a GPU, from intervals that are known and from records of a stand-in."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dyndepth.timing import busy, rounds
from dyndepth.timing.busy import busy_of, busy_seconds, device_intervals


@pytest.mark.parametrize(
    ("intervals", "seconds"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(0.0, 1.0), (2.0, 3.0)], 2.0),  # a gap: the device waits
        ([(0.0, 2.0), (1.0, 3.0)], 3.0),  # two streams at once
        ([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0)], 5.0),  # one inside of another
        ([(5.0, 6.0), (0.0, 1.0), (0.5, 1.0)], 2.0),  # in any order
        ([(0.0, 1.0), (1.0, 2.0)], 2.0),
        ([(3.0, 2.0)], 0.0),
    ],
)
def test_busy_is_the_union_of_the_intervals(intervals, seconds):
    assert busy_seconds(intervals) == pytest.approx(seconds)


def _record(kind, start, end, **more):
    return SimpleNamespace(
        device_type=kind, time_range=SimpleNamespace(start=start, end=end), **more
    )


def test_only_work_of_the_gpu_counts():
    records = [
        _record(DeviceType.CUDA, 1e6, 2e6),
        _record(DeviceType.CPU, 0.0, 9e6),
        _record(DeviceType.CUDA, 0.0, 9e6, is_user_annotation=True),
        _record(DeviceType.CUDA, 0.0, 9e6, activity_type="cuda_sync"),
        _record(DeviceType.CUDA, 0.0, 9e6, activity_type="gpu_user_annotation"),
        _record(DeviceType.CUDA, 3e6, 4e6, activity_type="gpu_memcpy", is_user_annotation=False),
        _record(DeviceType.CUDA, 5e6, 6e6, activity_type="kernel"),
    ]
    found = [end for interval in device_intervals(records) for end in interval]
    assert found == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def test_a_cpu_has_no_busy_time_and_runs_nothing_for_it():
    ran = []
    assert busy_of(lambda: ran.append(1), torch.device("cpu")) is None
    assert not ran


@pytest.mark.parametrize("records", [[], [_record(DeviceType.CUDA, 0.0, 5e5)]])
def test_the_profiled_call_is_drained_and_may_have_no_records(monkeypatch, records):
    told = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            told.append("on")
            return self

        def __exit__(self, *_):
            told.append("off")

        def events(self):
            return records

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(busy, "draining", lambda device: lambda: told.append("drained"))
    found = busy_of(lambda: told.append("ran"), torch.device("cuda"))
    assert found == (pytest.approx(0.5) if records else None)
    assert told == ["drained", "on", "ran", "drained", "off"]


def test_the_real_profiler_gives_records_of_that_form():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(8, 8) @ torch.ones(8, 8)
    records = list(profiler.events())
    assert records
    assert device_intervals(records) == []
    assert all(each.time_range.end >= each.time_range.start for each in records)
    assert hasattr(records[0], "is_user_annotation")


def test_rows_get_busy_time_a_pass_and_a_step_and_the_rest_is_the_host_s():
    class FakeSide:
        def __init__(self, prefill, decode):
            self.found, self.entered = {"prefill": prefill, "decode": decode}, 0

        def around(self):
            self.entered += 1
            return nullcontext()

        def busy(self):
            return self.found

    keys = ("dense_busy_s", "method_busy_s", "busy_speedup")
    blank = dict.fromkeys((*keys, "dense_host_share", "method_host_share"))
    rows = [
        {"phase": "prefill", "new_tokens": 0, "dense_median_s": 2.0, "method_median_s": 1.0},
        {"phase": "decode", "new_tokens": 4, "dense_median_s": 0.5, "method_median_s": 0.5},
    ]
    rows = [row | blank for row in rows]
    dense, own = FakeSide(1.0, 1.0), FakeSide(1.5, 0.5)
    rounds.add_busy(rows, dense, own)
    assert [rows[0][key] for key in keys] == pytest.approx([1.0, 1.5, 2 / 3])
    assert [rows[1][key] for key in keys] == pytest.approx([0.25, 0.125, 2.0])
    shares = [(row["dense_host_share"], row["method_host_share"]) for row in rows]
    assert shares == [pytest.approx((0.5, 0.0)), pytest.approx((0.5, 0.75))]  # clipped at 0
    assert dense.entered == own.entered == rounds.PROFILED


def test_what_the_profiler_does_not_record_stays_empty():
    row = {"phase": "prefill", "new_tokens": 0, "dense_median_s": 2.0, "method_median_s": 1.0}
    row |= {"dense_busy_s": None, "method_busy_s": None, "busy_speedup": None}
    side = SimpleNamespace(around=nullcontext, busy=lambda: {"prefill": None})
    rounds.add_busy([row], side, side)
    assert row["dense_busy_s"] is row["busy_speedup"] is None
