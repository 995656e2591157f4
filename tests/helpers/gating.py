"""Methods that exist for the tests: gates that are given, not found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.method import DynamicDepthMethod, ForwardContext


@dataclass(kw_only=True)
class RandomMask(DynamicDepthMethod):
    """A random gate for every (position, layer, sublayer), the same however it is reached."""

    name = "random_mask"
    granularity = "token"
    paper = "test"

    rate: float = 0.5
    sublayers: tuple[int, ...] = (0, 1)
    phases: str = "both"

    def start(self, context: ForwardContext) -> None:
        self.context = context
        generator = torch.Generator().manual_seed(self.seed)
        self.table = torch.rand(1024, context.layers, 2, generator=generator) < self.rate
        self.table = self.table.to(context.device)
        for sublayer in {0, 1} - set(self.sublayers):
            self.table[..., sublayer] = True

    def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.table[self.context.positions, layer]
        return mask[..., 0], mask[..., 1]


@dataclass(kw_only=True)
class GivenPlan(DynamicDepthMethod):
    """A fixed plan, ``[layers, 2]`` as nested tuples, or one of them a document."""

    name = "given_plan"
    granularity = "static"
    paper = "test"

    plan: tuple = ()
    phases: str = "both"

    def start(self, context: ForwardContext) -> Tensor:
        if isinstance(self.plan, dict):
            return torch.tensor([self.plan[document] for document in context.documents])
        return torch.tensor(self.plan)


@dataclass(kw_only=True)
class Evicted(RandomMask):
    """``RandomMask`` whose skipped tokens are invisible; ``whole``: one gate for all of a block and
    every block."""

    kv_policy = "evict"
    whole: bool = False

    def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention, mlp = super().gates(0 if self.whole else layer, hidden)
        return attention, attention if self.whole else mlp


class EvictedPlan(GivenPlan):
    """``GivenPlan`` under the policy ``evict``."""

    kv_policy = "evict"


def plan_without(layers: int, *skipped: tuple[int, int]) -> tuple:
    """A plan that executes everything but the given (layer, sublayer) pairs."""
    return tuple(
        tuple((layer, sublayer) not in skipped for sublayer in (0, 1)) for layer in range(layers)
    )
