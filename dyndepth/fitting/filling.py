"""How many of a step's micro-batches a device computes as one, by the memory that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

_SHARE = 0.8
"""Of the free memory, what micro-batches may take."""


class Memory(Protocol):
    """The memory of a device."""

    def begin(self) -> None:
        """A step begins, one micro-batch after another."""

    def room(self) -> float:
        """How many times over what was needed since would fit."""

    def release(self) -> None:
        """Give back what is held and not in use."""


class _Cuda:
    """What torch's allocator says, which no queued work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def room(self) -> float:
        taken = torch.cuda.max_memory_allocated(self._device) - self._before
        allocated = torch.cuda.memory_allocated(self._device)
        unused = torch.cuda.memory_reserved(self._device) - allocated
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        return _SHARE * free / max(taken, 1)

    def release(self) -> None:
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> Memory | None:
    """The memory of ``device``; None where micro-batches stay as the recipe has them."""
    return _Cuda(device) if device.type == "cuda" else None


def merged(parts: int, fits: float) -> int:
    """How many of ``parts`` micro-batches become one if ``fits`` of them fit: a divisor of them."""
    return max(n for n in range(1, parts + 1) if parts % n == 0 and n <= max(1.0, fits))


class Filling:
    """The micro-batches of each step, merged as far as memory allows.

    The first step computes its ``parts`` one by one and sees what one needs; later ones merge them.
    Without a ``memory`` they are never merged. ``together`` says how many make one; None: not yet
    known.
    """

    def __init__(self, parts: int, memory: Memory | None) -> None:
        self.parts, self._memory = parts, memory
        self.together: int | None = 1 if memory is None or parts == 1 else None

    def groups(self) -> Iterator[range]:
        """The parts of a step, by those that are computed as one."""
        together = self.together or 1
        if self.together is None and self._memory is not None:
            self._memory.begin()
        for first in range(0, self.parts, together):
            yield range(first, first + together)

    def done(self) -> None:
        """A step was queued whole."""
        if self.together is None and self._memory is not None:
            self.together = merged(self.parts, self._memory.room())

    def less(self) -> bool:
        """Memory was short: merge half as many from now on; False if they are single already."""
        if self._memory is None or (self.together or 1) == 1:
            return False
        self.together = merged(self.parts, (self.together or 1) // 2)
        return True

    def release(self) -> None:
        """Give back what is held and not in use."""
        if self._memory is not None:
            self._memory.release()
