"""Peak memory of one call."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(
    function: Callable[[Any], Any],
    device: str | torch.device = "cpu",
    prepare: Callable[[], Any] = lambda: None,
) -> int | None:
    """Bytes that torch's allocator held at most during ``function(prepare())``, beyond those that
    it held when ``prepare`` was done.

    So weights, and a cache that ``prepare`` fills, do not count. On CUDA this is the allocator's
    own peak; on a CPU the running sum of all allocations and releases, as the profiler saw them.
    Scratch memory that libraries take by themselves is in neither. On any other device nothing is
    measured, or run: None.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        return None
    gc.collect()
    if place.type == "cuda":
        state = prepare()
        torch.cuda.synchronize(place)
        before = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        function(state)
        torch.cuda.synchronize(place)
        return torch.cuda.max_memory_allocated(place) - before

    from torch.profiler import ProfilerActivity, profile, record_function

    # Otherwise each recording leaves two lines of its own on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = prepare()  # inside: the release of older memory would go unseen
        with record_function(_MARK):
            function(state)
    results: Any = recorded.profiler
    # Not the public summary: it gives all allocations to the operations around them.
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = before = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == _MARK:
            before = peak = held
    return peak - before


_MARK = "dyndepth: peak memory"
