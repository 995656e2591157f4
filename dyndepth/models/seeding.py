"""Random numbers that repeat, and leave those of others alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` on inside, on the CPU and ``device``; as they were on exit.

    So on all devices of that kind, over which a model may be spread, and on an accelerator that is
    in use beside a CPU. One that is not in use is left alone: torch by itself would start it.
    """
    kind = _in_use() if device.type == "cpu" else device.type
    if kind is None:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    count = torch.get_device_module(kind).device_count()
    with torch.random.fork_rng(range(count), device_type=kind):
        torch.manual_seed(seed)
        yield


def _in_use() -> str | None:
    """The kind of accelerator that this process has started, if it has."""
    kind = torch.accelerator.current_accelerator()
    started = kind and getattr(torch.get_device_module(kind), "is_initialized", None)
    return kind.type if kind and started and started() else None
