"""The gates of each kind of work that the bench times: given, not computed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dyndepth.blocks import blocks
from dyndepth.method import DynamicDepthMethod


def method(work: str, model: Any, batch: int, width: int) -> DynamicDepthMethod:
    """Gates of one kind of work for ``[batch, width]`` tokens at a time."""
    layers = len(blocks(model))
    if work == "all_execute":
        return given(torch.ones(layers, 2, dtype=torch.bool))
    if work.startswith("static_"):
        dropped = round(int(work.removeprefix("static_")) / 30 * layers)
        plan = torch.ones(layers, 2, dtype=torch.bool)
        plan[torch.linspace(1, layers - 2, dropped).round().long()] = False
        return given(plan)
    generator = torch.Generator().manual_seed(0)
    if work == "early_exit_half":
        depth = torch.randint(1, layers, (batch, width), generator=generator)
        executed = torch.arange(layers)[:, None, None] < depth
        return given(torch.stack([executed, executed], dim=1))
    rate = 0.75 if work == "mask_75" else 0.5
    return given(torch.rand(layers, 2, batch, width, generator=generator) < rate)


def given(decided: Tensor, skipping: Literal["both", "generation"] = "both") -> DynamicDepthMethod:
    """A method that answers with a plan ``[layers, 2]`` or masks ``[layers, 2, batch, width]``.

    A decode step takes the next column of masks drawn for all steps at once.
    """

    class Given(DynamicDepthMethod):
        name = "given"
        granularity = "static" if decided.ndim == 2 else "token"
        paper = "bench"
        phases = skipping

        def start(self, context: Any) -> Tensor | None:
            if decided.ndim == 2:
                return decided
            column = context.past_length % decided.shape[3] if context.tokens == 1 else 0
            chosen = decided[..., column : column + context.tokens].to(context.device)
            shared = bool((decided[:, 0] == decided[:, 1]).all())
            self.masks = [(pair[0], pair[0] if shared else pair[1]) for pair in chosen.unbind(0)]
            return None

        def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self.masks[layer]

    return Given()
