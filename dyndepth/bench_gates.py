"""The gates of each kind of work that the bench times: given, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyndepth.method import SUBLAYERS, DynamicDepthMethod
from dyndepth.models.blocks import blocks


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
    masks = torch.rand(layers, 2, batch, width, generator=generator) < rate
    if work.startswith("mask_50_"):
        masks[:, 1 - SUBLAYERS.index(work.removeprefix("mask_50_"))] = True
    return given(masks)


def given(
    decided: Tensor,
    skipping: Literal["both", "generation"] = "both",
    routers: Sequence[nn.Module] | None = None,
) -> DynamicDepthMethod:
    """A method that answers with a plan ``[layers, 2]`` or masks ``[layers, 2, batch, width]``.

    A decode step takes the next column of masks drawn for all steps at once. ``routers``, one a
    block, are run on the hidden states at its entry and billed; what they say changes nothing.
    """
    plan = decided.ndim == 2
    shared = bool((decided[:, 0] == decided[:, 1]).all())

    class Given(DynamicDepthMethod):
        name = "given"
        granularity = "static" if plan else "token"
        paper = "bench"
        phases = skipping

        def start(self, context: Any) -> Tensor | None:
            self.context = context
            if plan:
                return decided
            column = context.past_length % decided.shape[3] if context.tokens == 1 else 0
            chosen = decided[..., column : column + context.tokens].to(context.device)
            self.masks = [(pair[0], pair[0] if shared else pair[1]) for pair in chosen.unbind(0)]
            return None

        def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            if routers is not None:
                routers[layer](hidden)
                weights = sum(each.numel() for each in routers[layer].parameters() if each.ndim > 1)
                self.context.bill("router", 2.0 * weights, None)
            return self.masks[layer]

    return Given()
