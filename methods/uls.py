"""Unified Layer Skipping: one evenly spaced set of blocks for every token.

Idea: which blocks run follows from the target speedup alone, so a batch never diverges.
Paper: Unified Layer Skipping, arXiv 2404.06954.
Rule: with L blocks keep N = int(L / speedup) of them. ``paper`` spacing keeps the first and the
last, then walks from block 1 upwards and keeps each multiple of int(L / (N - 1)) until N are kept.
``even`` spacing keeps round(i (L - 1) / (N - 1)) for i = 0 .. N - 1.
Granularity: static. Phases: ``both``, or ``generation`` as in the paper.
KV policy: prompt_only (``generation``), drop (``both``). Prompt keys and values are exact.
Deviations: the paper tunes the whole model for its sets; here that is optional and low-rank
(``--recovery lora``, with the paper's two-pass objective); without it, quality falls steeply. N is
rounded down, so the achieved speedup is at least the target. The paper's integer interval is kept
literally: below 2x it is 1, which drops the blocks just before the last one in one run; that is why
``even`` is offered. N < 2 is refused (the reference divides by zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity, Phases


@dataclass(kw_only=True)
class UnifiedLayerSkipping(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        spacing: ``paper`` (its literal set) or ``even``.
        phases: ``both``, or ``generation`` (full depth on the prompt).
    """

    name: ClassVar[str] = "uls"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "arXiv 2404.06954"
    published_phases: ClassVar[Phases] = "generation"

    phases: Literal["generation", "both"] = "both"
    spacing: Literal["paper", "even"] = "paper"

    def max_speedup(self, layers: int) -> float:
        """L / 2: the first and the last block always run."""
        return layers / 2

    def start(self, context: ForwardContext) -> Tensor:
        """The plan of ``kept_blocks``."""
        plan = torch.zeros(context.layers, 2, dtype=torch.bool)
        plan[self.kept_blocks(context.layers)] = True
        return plan

    def kept_blocks(self, layers: int) -> list[int]:
        """Indices of the blocks that run, ascending. Raises UserError beyond ``max_speedup``."""
        # The small addend undoes rounding: 24 / 1.6 must give 15, not 14.999...
        count = int(layers / self.target_speedup + 1e-9)
        if count >= layers:
            return list(range(layers))
        if count < 2:
            raise UserError(
                f"uls keeps the first and the last block, so {layers} blocks allow a speedup of at "
                f"most {self.max_speedup(layers):g}, not {self.target_speedup:g}"
            )
        if self.spacing == "even":
            return [round(i * (layers - 1) / (count - 1)) for i in range(count)]
        interval = int(layers / (count - 1))
        inner = [block for block in range(1, layers - 1) if block % interval == 0]
        return [0, *inner[: count - 2], layers - 1]
