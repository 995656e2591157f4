"""What a pass holds: the peak of its allocations, and the bytes of keys and values that it keeps.

Peaks are of further passes, never of timed ones: on a CPU a profiler watches.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Peak(NamedTuple):
    """Bytes that torch's allocator held at most in one part of a pass.

    Attributes:
        above: beyond those that it held before the first part.
        whole: in all, weights included; None on a CPU, where nobody counts from the beginning.
    """

    above: int
    whole: int | None


def peaks(
    parts: Mapping[str, Callable[[], Any]],
    places: Sequence[torch.device],
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, Peak]:
    """The peak of each of the ``parts``, which run one after the other, by name.

    What ``prepare`` allocates before them does not count, what an earlier part leaves does. On CUDA
    these are the allocators' own peaks, summed over ``places``; on a CPU the running sum of all
    allocations and releases, as the profiler saw them. Scratch memory that libraries take by
    themselves is in neither. On any other device nothing is measured, or run: empty.
    """
    kinds = {place.type for place in places}
    gc.collect()
    if kinds == {"cuda"}:
        return _of_gpus(parts, places, prepare)
    return _of_cpu(parts, prepare) if kinds == {"cpu"} else {}


def _of_gpus(
    parts: Mapping[str, Callable[[], Any]],
    places: Sequence[torch.device],
    prepare: Callable[[], Any],
) -> dict[str, Peak]:
    def drain() -> None:
        for place in places:
            torch.cuda.synchronize(place)

    prepare()
    drain()
    before, found = sum(map(torch.cuda.memory_allocated, places)), {}
    for name, run in parts.items():
        for place in places:
            torch.cuda.reset_peak_memory_stats(place)
        run()
        drain()
        whole = sum(map(torch.cuda.max_memory_allocated, places))
        found[name] = Peak(whole - before, whole)
    return found


def _of_cpu(parts: Mapping[str, Callable[[], Any]], prepare: Callable[[], Any]) -> dict[str, Peak]:
    from torch.profiler import ProfilerActivity, profile, record_function

    # Otherwise each recording leaves two lines of its own on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    marks = {f"{_MARK} {name}": name for name in parts}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        prepare()  # inside: the release of older memory would go unseen
        for mark, name in marks.items():
            with record_function(mark):
                parts[name]()
    results: Any = recorded.profiler
    # Not the public summary: it gives all allocations to the operations around them.
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    held, before, current = 0, None, ""
    found: dict[str, int] = {}
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if current:
                found[current] = max(found[current], held)
        elif event.name() in marks:
            current = marks[event.name()]
            before = held if before is None else before
            found[current] = held
    return {name: Peak(most - (before or 0), None) for name, most in found.items()}


_MARK = "dyndepth: peak memory of"


def cache_bytes(past: Any) -> int | None:
    """Bytes of the keys and values that a cache holds of the tokens of a batch; None for a cache
    that does not tell. Of a buffer that is longer than what it holds, the filled part counts."""
    layers = getattr(past, "layers", None)
    return None if layers is None else sum(map(_bytes, _tensors(layers)))


def _tensors(layers: Iterable[Any]) -> Iterable[Tensor]:
    for layer in layers:
        for each in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(each, Tensor):
                yield each


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
