"""How long a GPU is busy: the time in which a kernel, a copy or a fill runs on it.

The records are the profiler's (Kineto). Time between events in a stream is something else: it holds
the gaps in which the queue ran dry and the device waited for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dyndepth.timing.pairing import draining

MICROSECOND = 1e-6
"""Seconds of the profiler's unit."""
WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Records that are work of a GPU, as Kineto names them; waiting and annotations are others."""


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``(start, end)`` intervals: what runs at once, on several streams,
    counts once. An interval that ends before it starts counts nothing."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_intervals(records: Iterable[Any]) -> list[tuple[float, float]]:
    """Start and end in seconds of a profiler's ``records`` that are work of a GPU. Where records do
    not say of which kind they are (older torch), it is all on the GPU but annotations."""
    return [
        (record.time_range.start * MICROSECOND, record.time_range.end * MICROSECOND)
        for record in records
        if record.device_type == torch.autograd.DeviceType.CUDA and _is_work(record)
    ]


def _is_work(record: Any) -> bool:
    kind = getattr(record, "activity_type", None)
    return kind in WORK if kind else not getattr(record, "is_user_annotation", False)


def busy_of(function: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that the GPU works in one call; None on any other device, and where the profiler
    records nothing. Profiling slows the host, so no such call is timed."""
    if device.type != "cuda":
        return None
    drain = draining(device)
    drain()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        drain()
    intervals = device_intervals(profiler.events() or ())
    return busy_seconds(intervals) if intervals else None
