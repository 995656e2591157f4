"""Dense: the model as it is, every block for every token.

Idea: the baseline that every other row is compared with, run through the same runtime.
Paper: none (control).
Rule: all gates are open.
Granularity: static. KV policy: nothing is ever skipped. Phases: both.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity


@dataclass(kw_only=True)
class Dense(DynamicDepthMethod):
    """The model at full depth."""

    name: ClassVar[str] = "dense"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "control"

    def max_speedup(self, layers: int) -> float:
        """1: dense saves nothing."""
        return 1.0

    def start(self, context: ForwardContext) -> Tensor:
        """A full plan."""
        return torch.ones(context.layers, 2, dtype=torch.bool)
