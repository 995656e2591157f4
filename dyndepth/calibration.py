"""Measuring a method's block speedup on calibration text, and solving a knob to meet the target.

For methods whose skipping depends on one number (a confidence threshold, a router's bias): the
speedup is read off the ledger of sparse forwards, never estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndepth.blocks import decoder
from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime import attach


@dataclass(frozen=True)
class Measured:
    """What a method executed of a text: its block speedup, and ``executed``, the fraction of tokens
    that ran each sublayer, float64 ``[layers, 2]`` (attention, mlp)."""

    speedup: float
    executed: Tensor


def block_speedup(
    model: nn.Module, method: DynamicDepthMethod, windows: Tensor, batch_size: int = 4
) -> float:
    """Dense block FLOPs / executed block FLOPs of ``method`` over ``windows``; see ``measured``."""
    return measured(model, method, windows, batch_size).speedup


def measured(
    model: nn.Module, method: DynamicDepthMethod, windows: Tensor, batch_size: int = 4
) -> Measured:
    """What ``method`` executes of ``windows``, int64 ``[count, length]``, each its own document.

    Counted over the tokens of the phases in which the method skips: for ``generation`` the second
    half of each window, with the first half as its prompt. The LM head is not run.
    """
    device = next(model.parameters()).device
    phase = prompt_phase(method)
    names = [f"window {number}" for number in range(len(windows))]
    with torch.no_grad(), attach(model, method) as trace:
        if phase is not None:
            trace.prompt_length = windows.shape[1] // 2
        for first in range(0, len(windows), batch_size):
            rows = slice(first, first + batch_size)
            trace.documents = names[rows]
            decoder(model)(input_ids=windows[rows].to(device), use_cache=False)
        totals = trace.totals(phase)
        speedup = totals["dense_block_flops"] / max(totals["block_flops"], 1.0)
        return Measured(speedup, trace.executed(phase))


def prompt_phase(method: DynamicDepthMethod) -> str | None:
    """The phase over which a method's speedup counts: ``generation``, or None for both."""
    return "generation" if method.phases == "generation" else None


def solve_threshold(
    measure: Callable[[float], float],
    target: float,
    first: float,
    step: float,
    *,
    low: float,
    high: float,
    tolerance: float = 0.01,
    rounds: int = 12,
) -> tuple[float, float]:
    """The ``x`` in ``[low, high]`` at which ``measure`` is ``target``, and what it is there.

    ``measure`` must not decrease. It is asked at ``first``, then in growing steps until the target
    is bracketed, then by interpolation (by halves where that stalls); at most ``rounds`` times,
    for each asking may cost seconds. Returns the best point seen: within the relative
    ``tolerance`` unless the rounds ran out, the ends are too near, or ``measure`` jumps.
    """
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    seen: list[tuple[float, float]] = []
    point = min(max(first, low), high)
    same_side = 0
    for _ in range(rounds):
        value = measure(point)
        seen.append((point, value))
        if abs(value / target - 1) <= tolerance:
            break
        sides = [x < target for _, x in seen[-2:]]
        same_side = same_side + 1 if len(sides) == 2 and sides[0] == sides[1] else 0
        if value < target:
            below = (point, value)
        else:
            above = (point, value)
        if below is None or above is None:
            at_end = point == (high if above is None else low)
            if at_end:
                break
            point = min(max(point + (step if above is None else -step), low), high)
            step *= 3
            same_side = 0
        elif same_side >= 2:
            point, same_side = (below[0] + above[0]) / 2, 0
        else:
            share = (target - below[1]) / (above[1] - below[1])
            point = below[0] + min(max(share, 0.02), 0.98) * (above[0] - below[0])
    return min(seen, key=lambda found: abs(found[1] - target))
