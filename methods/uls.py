"""Unified Layer Skipping: one evenly spaced set of blocks for every token.

Idea: which blocks run follows from the target speedup alone, so a batch never diverges.
Paper: Unified Layer Skipping, arXiv 2404.06954.
Rule: with L blocks keep N = int(L / speedup) of them. ``paper`` spacing keeps the first and the
last, then walks from block 1 upwards and keeps each multiple of int(L / (N - 1)) until N are kept.
``even`` spacing keeps round(i (L - 1) / (N - 1)) for i = 0 .. N - 1. With a ``scale`` the stream is
multiplied, in the place of each sublayer that is left out, by what that one lengthens it by at full
depth.
Granularity: static. Phases: ``both``, or ``generation`` as in the paper.
KV policy: prompt_only (``generation``), drop (``both``). Prompt keys and values are exact.
Deviations: the paper tunes the whole model for its sets; here that is optional and low-rank
(``--recovery lora``, with the paper's two-pass objective); without it, quality falls steeply. N is
rounded down, so the achieved speedup is at least the target. The paper's integer interval is kept
literally: below 2x it is 1, which drops the blocks just before the last one in one run; that is why
``even`` is offered. N < 2 is refused (the reference divides by zero). ``scale`` is AdaSkip's (arXiv
2501.02336), measured on 16 x 256 tokens of calibration text, and anew after ``--recovery lora``; so
scaled, it is no plain checkpoint: ``dyndepth.export`` writes a saved method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.fitting.scales import Scaling
from dyndepth.method import DynamicDepthMethod, Expenses, ForwardContext, Granularity, Phases
from dyndepth.models.blocks import blocks


@dataclass(kw_only=True)
class UnifiedLayerSkipping(Scaling, DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        spacing: ``paper`` (its literal set) or ``even``.
        phases: ``both``, or ``generation`` (full depth on the prompt).
        scale: what a sublayer that is left out multiplies the stream by: the mean of its tokens'
            lengthening (``token``), that of whole windows (``tensor``), or 1 (None).
        windows, length: of the text that scales are measured on; None: see Deviations.
    """

    name: ClassVar[str] = "uls"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "arXiv 2404.06954"
    published_phases: ClassVar[Phases] = "generation"

    phases: Literal["generation", "both"] = "both"
    spacing: Literal["paper", "even"] = "paper"
    scale: Literal["token", "tensor"] | None = None
    windows: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("windows", 1), ("length", 2)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{name} must be at least {least}, not {given}")
            if given is not None and self.scale is None:
                raise ValueError(f"{name} is of the text that scales are measured on; add a scale")

    @property
    def fitted(self) -> bool:
        """The set follows from the target; scales are measured."""
        return not self.substitutes or "scales" in self.facts

    def max_speedup(self, layers: int) -> float:
        """L / 2: the first and the last block always run."""
        return layers / 2

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """The scales', where there are some."""
        return Expenses(fit=self.scale_readings(self.windows, self.length))

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Measure the scales, where there are some; without, no text is read."""
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Any = None) -> None:
        """As ``fit``."""
        if self.substitutes:
            plan = self.plan(len(blocks(model)))
            self.measure_scales(
                model, corpus, plan, windows=self.windows, length=self.length, seed=self.seed
            )

    def start(self, context: ForwardContext) -> Tensor:
        """The plan of ``kept_blocks``. Raises UserError for scales of another depth."""
        self.check_scales(context.layers)
        return self.plan(context.layers)

    def plan(self, layers: int) -> Tensor:
        """Bool ``[layers, 2]``."""
        plan = torch.zeros(layers, 2, dtype=torch.bool)
        plan[self.kept_blocks(layers)] = True
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
