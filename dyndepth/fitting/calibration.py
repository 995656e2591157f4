"""Measuring a method's block speedup on calibration text, and solving a knob to meet the target.

For methods whose skipping depends on one number (a confidence threshold, a router's bias): the
speedup is read off the ledger of sparse forwards, never estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import decoder
from dyndepth.runtime.attach import attach


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
    half of each window; for what is prompt see ``prompt_of``. The LM head is not run.
    """
    device = next(model.parameters()).device
    phase, half = prompt_phase(method), prompt_of(method, windows.shape[1])
    names = [f"window {number}" for number in range(len(windows))]
    with torch.no_grad(), attach(model, method, warn=False) as trace:
        trace.prompt_length = half
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


def prompt_of(method: DynamicDepthMethod, length: int) -> int | None:
    """Tokens of a window of ``length`` that are its prompt: half of them where the method tells
    prompts from what follows; None where it does not."""
    return length // 2 if method.reads_prompt or prompt_phase(method) else None


def solve_threshold(
    measure: Callable[[float], float],
    target: float,
    first: float,
    step: float = 0.05,
    *,
    low: float,
    high: float,
    ends: tuple[float, float] | None = None,
    tolerance: float = 0.01,
    rounds: int = 12,
) -> tuple[float, float]:
    """The ``x`` in ``[low, high]`` at which ``measure`` is ``target``, and what it is there.

    ``measure`` must not decrease. It is asked at ``first``, then in growing steps until the target
    is bracketed, then by interpolation (by halves where that stalls); at most ``rounds`` times,
    for each asking may cost seconds. ``ends``: what it is at ``low`` and ``high``, where that is
    known without asking; they bracket the target from the start. Returns the best point seen:
    within the relative ``tolerance`` unless the rounds ran out, the ends are too near, or
    ``measure`` jumps.
    """
    below = (low, ends[0]) if ends else None
    above = (high, ends[1]) if ends else None
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


# A set of whole sublayers cannot meet every budget; short of this the routers do not reach it.
_LEAST_ACHIEVED = 0.85


def meet_target(
    model: nn.Module,
    method: DynamicDepthMethod,
    windows: Tensor,
    *,
    span: float = 5.0,
    first: tuple[float, float] = (0.0, 0.05),
    steps: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Solve the logit at which routers execute so that the measured speedup meets the target.

    Writes ``threshold`` and ``achieved_speedup`` into ``method.facts``; ``method`` must execute
    where its logits are at least the threshold found there, which is sought within ``span`` of 0,
    at ``first`` to begin with and then in steps of that size.
    ``windows`` is calibration text ``[count, length]``. ``steps``, for routers that read nothing:
    their logits and the shares of the budget, both ``[layers, 2]``. Their speedup is a step
    function, so that the nearest step is taken, and no forward is needed to find it.
    Raises UserError if the target is out of reach.
    """

    def measure(threshold: float) -> float:
        method.facts["threshold"] = threshold
        return block_speedup(model, method, windows)

    target = method.target_speedup
    if steps is None:
        threshold, achieved = solve_threshold(
            measure, target, *first, low=-span, high=span, tolerance=0.005
        )
    else:
        threshold = _nearest_step(*steps, target)
        achieved = measure(threshold)
    method.facts |= {"threshold": threshold, "achieved_speedup": achieved}
    if achieved < _LEAST_ACHIEVED * target:
        raise UserError(
            f"{method.name} reaches {achieved:.3g}x with these routers, not {target:g}x; "
            "ask for less, or train others"
        )


def _nearest_step(logits: Tensor, shares: Tensor, target: float) -> float:
    """The logit, of those given, at which what executes comes nearest to 1 / ``target``."""
    executed = {step: float(shares[logits >= step].sum()) for step in logits.unique().tolist()}
    return min(executed, key=lambda step: abs(1 / executed[step] - target))
