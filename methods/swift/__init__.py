"""SWIFT: the draft leaves out the sublayers without which it says most often what the model says.

Idea: which sublayers a draft can do without is a matter of the model and of what it writes, and
found by trying: the likeliest tokens of a draft are compared with what the whole model wrote. No
weights are trained.
Paper: SWIFT, arXiv 2410.06916 (ICLR 2025); its search offline.
Rule: the whole model continues ``prompts`` windows of calibration text by ``window`` + 1 tokens. A
set of sublayers is scored by its matchness: the share of those tokens that are the likeliest ones
without the set, read in one forward. The first set is of blocks 1, 3, 5, ...; a better one is kept
until the score is above ``enough``, ``misses`` tries in a row were no better, or ``tries`` were
made. The first and the last block stay. A draft goes on while it gave its last token ``stop`` or
more, up to ``length``.
Granularity: static. Phases: generation, and there in drafts alone: everywhere else every block
runs. KV policy: prompt_only, and what a draft kept is taken back.
Costs: the search, one forward of the draft over ``prompts`` x ``window`` tokens a try; the curve of
a fit has a row a try, its facts how many there were. Drafts and refused tokens are billed.
Deviations: the paper searches while it writes, on the first tokens of each text over a copy of the
cache; its code keeps the best score from text to text and never takes it again, so that a set found
on one text keeps out better ones for all later texts, and speed depends on their order. Here a
search is done before, on calibration text, and the same for a seed. Searching on the text itself
is missing. Tries change the best set by one sublayer in and one out, every 25th is a random set;
published: random sets, and every 25th what a Gaussian process suggests, to which that code tells
the score of another set than was tried, before rounding. ``search=random`` is without the process.
The budget is met in block FLOPs, as for every method here; ``budget=count`` is the paper's, of any
sublayers, where attentions go first. Its int(0.45 * 2 (L - 2)) of 2 L sublayers is a target of
about 1.73 with 32 blocks, 1.74 with 40. Drafts are a chain, without the siblings of the paper's
tree. Drawn tokens are the whole model's in distribution; that code draws the one after an accepted
draft from logits without temperature and top-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.drafting import Drafting
from dyndepth.fitting.removal import plan_without
from dyndepth.fitting.routers import budget_shares
from dyndepth.method import SUBLAYERS, Expenses, ForwardContext, Granularity, Reading

from .search import Search, find, matchness


@dataclass(kw_only=True)
class Swift(Drafting):
    """See the module's docstring.

    Fields:
        length, stop, adaptive: how long a draft gets; see ``Drafting``.
        prompts, before, window: texts to search on: how many, tokens before what the model writes,
            and tokens of that which are scored. Cut to what the model takes.
        text_seed: which windows of the calibration text they are.
        tries, misses, enough: when the search ends.
        search: ``climb``: from the best set; ``random``: random sets alone.
        budget: ``flops``: the target is met in block FLOPs; ``count``: in sublayers.
    """

    name: ClassVar[str] = "swift"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "arXiv 2410.06916"
    quick: ClassVar[dict[str, Any]] = {"prompts": 2, "before": 8, "window": 8, "tries": 6}

    length: int = 25
    prompts: int = 4
    before: int = 64
    window: int = 32
    text_seed: int = 0
    tries: int = 1000
    misses: int = 300
    enough: float = 0.95
    search: Literal["climb", "random"] = "climb"
    budget: Literal["flops", "count"] = "flops"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "before", "window", "tries", "misses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def fitted(self) -> bool:
        """Whether a set was found, and its cost where that is asked for."""
        return (self.target_speedup == 1.0 or "plan" in self.tensors) and self.priced

    def max_speedup(self, layers: int) -> float:
        """L / 2: the first and the last block always run."""
        return layers / 2

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """The texts, and as many tries as there may be."""
        if self.target_speedup == 1.0:
            return Expenses()
        text = Reading(windows=self.prompts, length=self.before + self.window, heads=1.0)
        share = 1 / self.target_speedup
        windows = self.prompts * self.tries
        return Expenses(
            fit=(text, Reading(windows=windows, length=self.window, forwards=share, heads=1.0))
        )

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Search. Raises UserError without a corpus, or for a target out of reach."""
        total = fitting(model, self.before + self.window + 1)
        cut = total <= self.before + self.window
        window = min(self.window, total // 2) if cut else self.window
        shares = budget_shares(model, total)
        plan = torch.ones(shares.shape, dtype=torch.bool)
        if self.target_speedup > 1.0:
            if corpus is None:
                raise UserError(f"{self.name} searches on text; give fit a corpus")
            text = corpus.windows(
                max(1, total - window - 1),
                self.prompts,
                self.text_seed,
                split="calibration",
                model=model,
            )
            settings = Search(
                self.target_speedup,
                self.seed,
                self.budget,
                self.search,
                self.tries,
                self.misses,
                self.enough,
            )
            with matchness(model, text, window) as score:
                found = find(score, shares, settings)
            plan = plan_without(len(shares), [(place,) for place in found.removed])
            self.curve = found.curve
            self.facts = {
                "removed": [[place // 2, SUBLAYERS[place % 2]] for place in found.removed],
                "matchness": found.score,
                "first_matchness": found.first,
                "tries": len(found.curve),
                "ended": found.ended,
                "achieved_speedup": float(shares.sum() / shares[plan].sum()),
                "sublayers_speedup": plan.numel() / int(plan.sum()),
            }
        self.tensors = {"plan": plan}
        self.price(model, corpus, plan=plan)
        return self

    def start(self, context: ForwardContext) -> Tensor:
        """The plan without the set. Raises UserError for a model of another depth."""
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        plan = self.tensors["plan"]
        if len(plan) != context.layers:
            raise UserError(
                f"this set is for a model of {len(plan)} blocks, not {context.layers}; fit the "
                "method on this model"
            )
        return plan
