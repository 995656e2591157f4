"""AdaSkip: the sublayers that turn the stream least are left out, and the stream is scaled instead.

Idea: attention and MLP of a block differ in importance, so single sublayers are ranked; what one of
them does to the length of the stream is made up for by one number.
Paper: AdaSkip, arXiv 2501.02336 (AAAI 2025), its offline part.
Rule: rank all 2 L sublayers by the mean cosine of the streams before and after them on calibration
text; those of the highest go, until the target is met. In the place of each that is left out x is
multiplied by its scale, the mean of |x + f(x)| / |x| over all tokens at full depth.
Granularity: static. Phases: ``both``, or ``generation``, as where it is used in decoding alone.
KV policy: drop (``both``), prompt_only (``generation``). An attention that is left out keeps no
cache.
Deviations: the calibration text is 16 x 256 tokens (published: 20 prompts of more than 4000 words,
of the task; the sets hardly depend on it). The ranking is LLM-Drop's (arXiv 2406.15786), as in the
authors' code. ``scale=tensor`` is that code's: one ratio of whole tensors a window, decided by few
tokens. ``budget=count`` is the paper's: of M sublayers M - M / speedup go, whichever they are;
attentions are cheap and go first, so that far fewer FLOPs go (``facts`` says how many). The default
meets the target in block FLOPs, as for every method here. The online part, which leaves out more
MLPs of a sequence by what its first generated tokens showed, is missing: it would have to see the
output of each sublayer that runs, and its published code, whose threshold is never met, has no
effect on any published number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.fitting.importance import Settings, rank
from dyndepth.fitting.removal import Unit, plan_without
from dyndepth.fitting.routers import budget_shares
from dyndepth.fitting.scales import LENGTH, WINDOWS, Scaling
from dyndepth.method import (
    SUBLAYERS,
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Granularity,
    Phases,
    Reading,
)
from dyndepth.methods.static_pruning.choice import removed_units


@dataclass(kw_only=True)
class AdaSkip(Scaling, DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
        scale: what a sublayer that is left out multiplies the stream by: the mean of its tokens'
            lengthening (``token``), that of whole windows (``tensor``), or 1 (None).
        budget: ``flops``: the target is met in block FLOPs; ``count``: in sublayers.
        windows, length: of calibration text.
    """

    name: ClassVar[str] = "adaskip"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "arXiv 2501.02336"
    quick: ClassVar[dict[str, Any]] = {"windows": 2, "length": 16}

    phases: Phases = "both"
    scale: Literal["token", "tensor"] | None = "token"
    budget: Literal["flops", "count"] = "flops"
    windows: int = WINDOWS
    length: int = LENGTH

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.settings  # refuses too few windows, or too short ones

    @property
    def settings(self) -> Settings:
        """What is ranked, by what, on which text."""
        return Settings(criterion="joint", windows=self.windows, length=self.length, seed=self.seed)

    def max_speedup(self, layers: int) -> float:
        """2 L, where one sublayer stays: in block FLOPs a bound, of which ``fit`` knows more."""
        return 2.0 * layers

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """The ranking's and the scales', each kept for all targets."""
        if self.target_speedup == 1.0:
            return Expenses()
        ranking = Reading(windows=self.windows, length=self.length, kept=True)
        return Expenses(fit=(ranking, *self.scale_readings(self.windows, self.length)))

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Rank, choose how many go, and measure. Raises UserError if the target is out of reach."""
        executed, length = 1 / self.target_speedup, self.settings.text_for(model)[1]
        shares = budget_shares(model, length)
        if self.budget == "flops":
            removed = removed_units(model, corpus, self.settings, shares, executed)
        else:
            removed = self._counted(model, corpus, shares.numel())
        plan = plan_without(len(shares), removed)
        self.tensors = {"plan": plan}
        self.facts = {
            "order": [[place // 2, SUBLAYERS[place % 2]] for (place,) in removed],
            "achieved_speedup": float(shares.sum() / shares[plan].sum()),
            "sublayers_speedup": plan.numel() / int(plan.sum()),
        }
        self.calibrate(model, corpus)
        return self

    def _counted(self, model: torch.nn.Module, corpus: Any, sublayers: int) -> list[Unit]:
        """The sublayers that go where all count alike, in order."""
        count = round(sublayers * (1 - 1 / self.target_speedup))
        if count >= sublayers:
            raise UserError(
                f"adaskip leaves one of {sublayers} sublayers at least, a speedup of "
                f"{self.max_speedup(sublayers // 2):g}x, not {self.target_speedup:g}x; ask for less"
            )
        return rank(model, corpus, self.settings).order[:count] if count else []

    def calibrate(self, model: torch.nn.Module, corpus: Any = None) -> None:
        """Measure the scales; the plan stays."""
        self.measure_scales(
            model,
            corpus,
            self.tensors["plan"],
            windows=self.windows,
            length=self.settings.text_for(model)[1],
            seed=self.seed,
        )

    def start(self, context: ForwardContext) -> Tensor:
        """The plan that ``fit`` found. Raises UserError before ``fit`` and on another depth."""
        plan = self.tensors.get("plan")
        if plan is None and self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        if plan is None or len(plan) != context.layers:
            raise UserError(
                f"adaskip has no plan for a model of {context.layers} blocks; call "
                "fit(model, corpus) on it first"
            )
        return plan
