"""Static pruning: a fixed set of blocks or sublayers is left out, chosen once by a criterion.

Idea: some units hardly change the stream or the loss; without them every token costs less, by the
same amount, and a batch never diverges. What dynamic depth must beat.
Paper (by ``criterion``): ``block_influence`` ShortGPT, arXiv 2403.03853; ``angular`` Gromov et al.,
arXiv 2403.17887; ``perplexity`` and ``taylor`` Shortened LLaMA, arXiv 2402.02834; ``greedy`` SLEB,
arXiv 2402.09025; ``attention``, ``mlp`` and ``joint`` LLM-Drop, arXiv 2406.15786; ``last`` and
``random`` are controls.
Rule: rank the units on calibration text (``dyndepth.importance``), remove them from the least
important on, as many as bring the executed share of the block FLOPs nearest to 1 / speedup.
``angular`` removes that many blocks in one run. With a ``scale`` the stream is multiplied, in the
place of each sublayer that is left out, by what that one lengthens it by at full depth.
Granularity: static. Phases: ``both`` as published, or ``generation``.
KV policy: drop (``both``), prompt_only (``generation``). A removed attention keeps no cache.
Deviations: the text is the corpus's calibration split, and less of it than published (None in
``windows`` and ``length``): one dense pass over 32 x 128 tokens for all cosines and angles
(published: PG19; 256 x 2048 of C4 for LLM-Drop), 8 x 128 for ``greedy`` (128 x 2048 of WikiText-2),
10 x 128 for ``perplexity`` and ``taylor`` (as published, there of BookCorpus). ShortGPT's code
scores the last block after the final norm, which protects it; here the raw stream is scored, as the
formula says. The 4 first and 2 last blocks that Shortened LLaMA keeps, and SLEB's first and last,
are kept where that is at most half of the model, else in proportion. For sublayers ``greedy``
divides the added loss by the share of the FLOPs that goes: else attention, which is cheap, would
mostly go first. ``perplexity``, ``taylor`` and ``greedy`` for sublayers, ``lazy`` search and
``generation`` are not in the papers. The papers remove a given number of units; here it follows
from the target speedup. Nothing is tuned afterwards; for that, ``--recovery lora``. ``scale`` is of
none of these papers but AdaSkip's (arXiv 2501.02336), for any criterion; it is measured on 16 x 256
tokens, or ``windows`` x ``length``, and anew after ``--recovery lora``. A scaled plan is no plain
checkpoint: ``dyndepth.export`` writes a saved method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.fitting.importance import Settings
from dyndepth.fitting.scales import Scaling
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Granularity,
)


@dataclass(kw_only=True)
class StaticPruning(Scaling, DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
        criterion: by which units are ranked.
        unit: ``block`` or ``sublayer``; None: sublayers for ``attention``, ``mlp`` and ``joint``,
            else blocks. ``block_influence`` and ``angular`` rank blocks only, those three
            sublayers only.
        keep_first, keep_last: blocks protected at either end; None: as published.
        windows, length: of calibration text; None: see Deviations.
        search: of ``greedy``: ``full`` measures all units again after each removal, ``lazy`` those
            that come to the top of the queue.
        scale: what a sublayer that is left out multiplies the stream by: the mean of its tokens'
            lengthening (``token``), that of whole windows (``tensor``), or 1 (None).
    """

    name: ClassVar[str] = "static_pruning"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = (
        "arXiv 2403.03853, 2403.17887, 2402.02834, 2402.09025 or 2406.15786, by criterion"
    )
    quick: ClassVar[dict[str, Any]] = {"windows": 2, "length": 16}

    phases: Literal["generation", "both"] = "both"
    criterion: Literal[
        "last",
        "random",
        "block_influence",
        "angular",
        "perplexity",
        "greedy",
        "taylor",
        "attention",
        "mlp",
        "joint",
    ] = "block_influence"
    unit: Literal["block", "sublayer"] | None = None
    keep_first: int | None = None
    keep_last: int | None = None
    windows: int | None = None
    length: int | None = None
    search: Literal["full", "lazy"] = "full"
    scale: Literal["token", "tensor"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.settings  # refuses what does not go together

    @property
    def settings(self) -> Settings:
        """What is ranked, by what, on which text."""
        return Settings(
            criterion=self.criterion,
            unit=self.unit,
            windows=self.windows,
            length=self.length,
            seed=self.seed,
            search=self.search,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
        )

    def max_speedup(self, layers: int) -> float:
        """L / protected blocks: an upper bound. Where one kind of sublayer stays, how much less is
        possible depends on what it costs; ``fit`` knows."""
        return max(1.0, layers / max(1, sum(self.settings.keep(layers))))

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """The ranking's, kept for all targets, and the scales'."""
        from .choice import readings

        ranking = readings(self.settings, layers, 1 / self.target_speedup)
        return Expenses(fit=(*ranking, *self.scale_readings(self.windows, self.length)))

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Rank, and choose how many go. Raises UserError if the target is out of reach."""
        from .choice import choose

        self.tensors, self.facts = choose(model, corpus, self.settings, 1 / self.target_speedup)
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Any = None) -> None:
        """Measure the scales; the plan stays."""
        plan = self.tensors["plan"]
        self.measure_scales(
            model, corpus, plan, windows=self.windows, length=self.length, seed=self.seed
        )

    def start(self, context: ForwardContext) -> Tensor:
        """The plan that ``fit`` found. Raises UserError before ``fit`` and on another depth."""
        plan = self.tensors.get("plan")
        if plan is None and self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        if plan is None:
            raise UserError("static_pruning has no plan yet; call fit(model, corpus) first")
        if len(plan) != context.layers:
            raise UserError(
                f"this plan is for a model of {len(plan)} blocks, not {context.layers}; fit the "
                "method on this model"
            )
        return plan
