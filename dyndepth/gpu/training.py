"""How many tokens a second router training reads here."""

from __future__ import annotations

import time
from typing import Any

GOAL = 150_000
"""Tokens a second of the embedded model on an H100 or H200."""


def measure(device: str, small: bool) -> dict[str, Any]:
    """Train a linear router for some steps, the first of them unclocked, on random tokens.

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
    from dyndepth.timing.random_tokens import RandomTokens

    on_gpu = device.startswith("cuda")
    dtype = "bfloat16" if on_gpu else "float32"
    names = ["shape:tiny"] if small else ["embedded", "shape:smollm2-135m"]
    for name in names:
        try:
            model = load_model(name, dtype=dtype, device=device)
            break
        except UserError:
            if name == names[-1]:
                raise
    length, batch, accumulate, steps = (64, 1, 2, 3) if small else (4096, 1, 16, 6)
    found: list[float] = []
    for count in (2, 2 + steps):
        schedule = Schedule(steps=count, batch=batch, length=length, accumulate=accumulate)
        windows = RandomTokens(model).windows(length, schedule.windows, seed=0)
        router = Tiny(*Decoder.of(model).shape).to(model.device)
        began = time.monotonic()
        tune_router(model, router, windows, Tuning(target_speedup=1.5), schedule, progress=False)
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.monotonic() - began)
    tokens = steps * batch * accumulate * length
    return {
        "model": name,
        "dtype": dtype,
        "tokens_a_step": batch * accumulate * length,
        "tokens_a_second": tokens / max(found[1] - found[0], 1e-9),
    }
