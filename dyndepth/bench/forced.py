"""Drafts of which nothing is known but what they run: by a plan, of a fixed length, and accepted as
often as is asked for.

So what the loop costs, and what a draft would win at which acceptance, is timed on models whose
weights mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.method import Draft, DynamicDepthMethod
from dyndepth.models.blocks import blocks
from dyndepth.runtime.choosing import Choice
from dyndepth.timing.drafted import Drafted


def drafting(plan: Tensor, length: int) -> DynamicDepthMethod:
    """A method that drafts ``length`` tokens by ``plan``, bool ``[layers, 2]``."""
    size = length

    class Planned(DynamicDepthMethod):
        name = "planned"
        granularity = "static"
        paper = "bench"
        speculates = True
        phases = "generation"

        def start(self, context: Any) -> Tensor:
            self.context = context
            return plan

        def more(self, draft: Draft) -> bool:
            return draft.length < size

    return Planned()


def first_blocks(model: nn.Module, count: int) -> Tensor:
    """The plan of an exit after ``count`` blocks."""
    plan = torch.zeros(len(blocks(model)), 2, dtype=torch.bool)
    plan[:count] = True
    return plan


@dataclass(frozen=True, eq=False)
class Coin(Choice):
    """The verdict of a coin: each drafted token stands with probability ``chance`` if those before
    it do. What the logits say is found out as ever, at the same cost, and not heeded."""

    chance: float = 1.0
    throws: random.Random = field(default_factory=lambda: random.Random(0))

    def judge(
        self,
        written: Sequence[int],
        drafted: Sequence[Tensor],
        shares: Sequence[Tensor | None],
        logits: Tensor,
    ) -> tuple[list[int], int, int]:
        """See ``Choice.judge``; the token after those that stand is the model's own."""
        tokens, _, own = super().judge(written, drafted, shares, logits)
        stand = [self.throws.random() < self.chance for _ in tokens]
        return tokens, next((at for at, one in enumerate(stand) if not one), len(tokens)), own


class Forced(Drafted):
    """A side whose drafts are accepted by a coin; of a text always alike."""

    chance = 1.0

    def _chosen(self) -> Choice:
        return Coin(chance=self.chance, throws=random.Random(self.number))
