"""How many tokens a second router training reads here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dyndepth.common.errors import RunFailed

GOAL = 150_000
"""Tokens a second of the embedded model on an H100 or H200."""
WARM = 2
"""Steps of what is not timed, and of the shorter run that is."""
MOST_STEPS = 1024


def measure(device: str, small: bool) -> dict[str, Any]:
    """Train a linear router for some steps on random tokens; see ``a_step``.

    Of the embedded model where it can be had, else of random weights in its shape: a step takes as
    long. In bfloat16 on a GPU.
    """
    import torch

    from dyndepth.common.errors import UserError
    from dyndepth.fitting.loop import Schedule
    from dyndepth.fitting.routers import Tuning, tune_router
    from dyndepth.gpu.checks import Tiny
    from dyndepth.models.blocks import Decoder
    from dyndepth.models.loading import load_model
    from dyndepth.models.shapes import shape_for
    from dyndepth.timing.random_tokens import RandomTokens

    on_gpu = device.startswith("cuda")
    dtype = "bfloat16" if on_gpu else "float32"
    names = [shape_for("trial")] if small else ["embedded", shape_for("training")]
    for name in names:
        try:
            model = load_model(name, dtype=dtype, device=device)
            break
        except UserError:
            if name == names[-1]:
                raise
    length, batch, accumulate, steps = (64, 1, 2, 3) if small else (4096, 1, 16, 6)

    def train(count: int) -> None:
        schedule = Schedule(steps=count, batch=batch, length=length, accumulate=accumulate)
        windows = RandomTokens(model).windows(length, schedule.windows, seed=0)
        router = Tiny(*Decoder.of(model).shape).to(model.device)
        tune_router(model, router, windows, Tuning(target_speedup=1.5), schedule, progress=False)
        if on_gpu:
            torch.cuda.synchronize(device)

    seconds = a_step(train, steps, least=0.1 if small else 1.0)
    tokens = batch * accumulate * length
    return {
        "model": name,
        "dtype": dtype,
        "tokens_a_step": tokens,
        "tokens_a_second": tokens / seconds,
    }


def a_step(train: Callable[[int], None], steps: int, least: float) -> float:
    """Seconds of one of ``steps`` steps: what a run of so many more takes longer than a short one.

    ``train`` takes the number of steps. What happens once in a process (kernels that are compiled,
    memory that is taken) is left to a run before both; where they differ by less than ``least``
    seconds, the longer one is repeated with more steps.

    Raises:
        RunFailed: up to 1,024 more steps took no longer.
    """

    def seconds(count: int) -> float:
        began = time.monotonic()
        train(count)
        return time.monotonic() - began

    train(WARM)
    short = seconds(WARM)
    while True:
        found = seconds(WARM + steps) - short
        if found >= least or steps >= MOST_STEPS:
            break
        steps = min(4 * steps, MOST_STEPS)
    if not found > 0:
        raise RunFailed(f"{steps} more steps of training took no longer than {WARM}; measure again")
    return found / steps
