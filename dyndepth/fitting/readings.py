"""The numbers of a training step, on their way from the device to the host.

They are asked for when the step is queued, and read when the next one is: no step waits for them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

Row = Mapping[str, float | Tensor]
"""What an objective records: numbers, and scalars that may still lie on the device."""

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
"""Format of progress bars: always so many a second, never seconds each."""
_STEPS = 16
"""Over how many of the last steps the speed is taken."""


class Reading:
    """The losses and rows of one step's micro-batches, of all processes.

    The copy to the host is queued here. ``row`` waits for it, not for what was queued after.
    """

    def __init__(
        self, step: int, rows: Sequence[Row], losses: Sequence[Tensor], accelerator: Any
    ) -> None:
        self.step, self._names = step, list(rows[0])
        device = losses[0].device
        flat = [
            _scalar(value, device)
            for row, loss in zip(rows, losses, strict=True)
            for value in (loss, *(row[name] for name in self._names))
        ]
        values = torch.cat(flat).view(len(rows), -1)
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values.mean(0, keepdim=True).float(), "mean")
        self._values, self._copied = values, None
        if device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def row(self) -> dict[str, float]:
        """Each entry averaged over the micro-batches and processes.

        Raises FloatingPointError if a loss is not a number.
        """
        if self._copied is not None:
            self._copied.synchronize()
        values = self._values.cpu().double()
        if not all(map(math.isfinite, values[:, 0].tolist())):
            raise FloatingPointError(f"the loss at step {self.step} is not a number")
        return dict(zip(self._names, values[:, 1:].mean(0).tolist(), strict=True))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """One number as ``[1]`` on ``device``, without a wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device, non_blocking=True).reshape(1)
    exact = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((1,), value, dtype=exact, device=device)


class Speed:
    """Tokens a second over the last steps."""

    def __init__(self, tokens: float) -> None:
        self._seen = deque([(time.monotonic(), tokens)], maxlen=_STEPS + 1)

    def after(self, tokens: float) -> str:
        """The speed in words, now that ``tokens`` were read in all."""
        self._seen.append((time.monotonic(), tokens))
        (began, before), (now, read) = self._seen[0], self._seen[-1]
        return f"{tqdm.format_sizeof((read - before) / max(now - began, 1e-9))} tokens/s"
