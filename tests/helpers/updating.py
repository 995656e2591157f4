"""Methods for the tests of what takes the place of skipped updates, and of factors on others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gating import GivenPlan, RandomMask
from torch import Tensor

from dyndepth.method import DynamicDepthMethod, ForwardContext

WIDTH = 32
"""Of the stream of the tiny models."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Adapting(DynamicDepthMethod):
    """A matrix in the place of each sublayer, billed, but for the attention of block 1: nothing."""

    def matrices(self, layers: int, device: torch.device) -> Tensor:
        if "matrices" not in self.tensors:
            found = 0.1 * numbers(layers, 2, WIDTH, WIDTH, seed=1)
            self.tensors["matrices"] = found.to(device)
        return self.tensors["matrices"]

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        if (layer, sublayer) == (1, 0):
            return None
        self.context.bill("router", 2.0 * WIDTH * WIDTH, None)
        return rows @ self.tensors["matrices"][layer, sublayer].to(rows.dtype)


@dataclass(kw_only=True)
class Reading(Adapting):
    """Gates and factors that read the stream; a matrix in the place of what is skipped.

    ``soft``: float gates, for the masked backend. ``open``: blocks that every token executes.
    """

    name = "reading_updates"
    granularity = "token"
    paper = "test"
    capturable = True

    phases: str = "both"
    shift: float = 0.0
    soft: bool = False
    open: tuple[int, ...] = (2,)

    def start(self, context: ForwardContext) -> None:
        self.context = context
        self.matrices(context.layers, context.device)
        if "table" not in self.tensors:
            self.tensors["table"] = numbers(context.layers, WIDTH, 4).to(context.device)

    def gates(self, layer: int, hidden: Tensor):
        self.context.bill("router", 2.0 * WIDTH * 4, None)
        read = hidden @ self.tensors["table"][layer].to(hidden.dtype)
        self.factors = read[..., 2:].sigmoid()
        if layer in self.open:
            return True, True
        gates = read[..., :2].sigmoid() if self.soft else read[..., :2] >= self.shift
        return gates[..., 0], gates[..., 1]

    def weights(self, layer: int):
        return self.factors[..., 0], (None if layer == 3 else self.factors[..., 1])


@dataclass(kw_only=True)
class Evicting(Reading):
    """Tokens that skip an attention are invisible in it."""

    kv_policy = "evict"


@dataclass(kw_only=True)
class Masked(Adapting, RandomMask):
    """Random gates, no factors, a matrix in the place of what is skipped."""

    def start(self, context: ForwardContext) -> None:
        super().start(context)
        self.matrices(context.layers, context.device)


@dataclass(kw_only=True)
class Scaled(GivenPlan):
    """A plan, or one a document; a skipped sublayer multiplies the stream."""

    capturable = True

    def start(self, context: ForwardContext) -> Tensor:
        self.context = context
        self.scales = (1 + 0.3 * numbers(context.layers, 2, seed=2)).tolist()
        return super().start(context)

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor:
        return rows * (self.scales[layer][sublayer] - 1)


@dataclass(kw_only=True)
class Weighed(GivenPlan):
    """A plan whose executed updates are weighed by their position."""

    def start(self, context: ForwardContext) -> Tensor:
        self.context = context
        return super().start(context)

    def weights(self, layer: int):
        return None, 1 / (1 + 0.1 * self.context.positions + layer)
