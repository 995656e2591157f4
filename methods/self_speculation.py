"""Self-speculation: any method drafts, the whole model verifies.

Idea: part of the model often says what all of it would. It writes ahead, token by token; one
forward of the whole model over what was written says how much of it stands, and adds a token of its
own. The text is the dense model's; what is saved is reading all weights for each token.
Paper: Draft & Verify, arXiv 2309.08168, for a fixed set of sublayers; LayerSkip, arXiv 2404.16710,
for an exit (``draft="early_exit(layer=8)"``); which tokens stand: arXiv 2211.17192.
Rule: a draft runs what the method ``draft`` decides; how long it gets, ``length``, ``stop`` and
``adaptive`` say. Where the likeliest token is taken, drafted ones stand up to the first that the
whole model would not write; where tokens are drawn, each stands with probability min(1, p / q),
p being the whole model's and q the draft's, and after the first that does not, one is drawn from
what p has more than q.
Granularity: the draft's. Phases: generation, and there in drafts alone: everywhere else every block
runs. KV policy: project, or prompt_only, as the draft; what a draft kept is taken back.
Costs: no FLOPs are saved: those of drafts and of refused tokens are billed as ``draft``. Whether
time is depends on how many tokens stand, and on what one costs: at the least, the LM head.
Deviations: Draft & Verify finds its set by Bayesian search and moves ``stop`` until as many tokens
stand as it asks for; here the method decides, and ``stop`` stays. LayerSkip trains for its exits,
and its verification goes on from the states that a draft left at the exit: at batch 1 that saves
arithmetic but no reading of weights, and is left out. Neither paper has ``adaptive``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from dyndepth.common.registry import load_method, method_class, parse_methods
from dyndepth.fitting.drafting import Drafting
from dyndepth.fitting.fits import fit_cached
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Gate,
    Granularity,
    KVPolicy,
)
from dyndepth.methods.static_pruning import StaticPruning

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus

_HANDED_ON = ("granularity", "needs_training", "reads_prompt", "capturable")
"""Facts of the draft that are this method's, too."""
_QUICK = ", ".join(f"{name}={value}" for name, value in StaticPruning.quick.items())


@dataclass(kw_only=True)
class SelfSpeculation(Drafting):
    """See the module's docstring.

    Fields:
        draft: specification of the method that drafts; it gets this method's target and, unless it
            names one, its seed.
        length, stop, adaptive: how long a draft gets; see ``Drafting``.
    """

    name: ClassVar[str] = "self_speculation"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "arXiv 2309.08168; with an exit 2404.16710"
    quick: ClassVar[dict[str, Any]] = {"draft": f"{StaticPruning.name}({_QUICK})"}

    draft: str = StaticPruning.name

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drafts = self._drafting_method()
        for fact in _HANDED_ON:
            setattr(self, fact, getattr(self._drafts, fact))

    def _drafting_method(self) -> DynamicDepthMethod:
        """The draft, not fitted. Raises UserError for one that is unknown or takes no such
        parameters, ValueError for one that cannot be a draft."""
        named = parse_methods(self.draft)
        if len(named) != 1:
            raise ValueError(f"draft names {len(named)} methods; give one")
        ((name, given),) = named
        if "target_speedup" in given:
            raise ValueError(f"draft={self.draft!r} names its target; give it to {self.name}")
        if given.get("phases", "generation") != "generation":
            raise ValueError(
                f"draft={self.draft!r} asks for phases={given['phases']}, and a draft is generated "
                "tokens alone; leave phases out"
            )
        handed = {"target_speedup": self.target_speedup, "seed": given.get("seed", self.seed)}
        if "phases" in method_class(name).__dataclass_fields__:
            handed["phases"] = "generation"
        found = load_method(self.draft, **handed)
        why = _unfit(found)
        if why:
            raise ValueError(f"draft={self.draft!r} {why}")
        return found

    @property
    def drafter(self) -> DynamicDepthMethod:
        """The method that drafts, with what ``fit`` found."""
        self._drafts.tensors, self._drafts.facts = self.tensors, self.facts
        return self._drafts

    @property
    def kv_policy(self) -> KVPolicy:
        """The draft's; the prompt is always kept."""
        return "project" if self._drafts.kv_policy == "project" else "prompt_only"

    @property
    def budgeted(self) -> bool:
        """As the draft."""
        return self._drafts.budgeted

    @property
    def substitutes(self) -> bool:
        """As the draft."""
        return self.drafter.substitutes

    @property
    def weighs(self) -> bool:
        """As the draft."""
        return self.drafter.weighs

    @property
    def fitted(self) -> bool:
        """As the draft, with its cost where that is asked for."""
        return self.drafter.fitted and self.priced

    @property
    def window_length(self) -> int | None:
        """The draft's."""
        return self._drafts.window_length

    def max_speedup(self, layers: int) -> float:
        """The draft's."""
        return self._drafts.max_speedup(layers)

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """The draft's fit. Its readouts and its depth are of drafts alone."""
        return replace(self._drafts.expenses(layers, model, corpus), readouts=0.0)

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Fit the draft, and find its cost where that is asked for. Raises UserError as it does."""
        found = fit_cached(self._drafting_method(), model, corpus, refresh=self.anew)
        self.tensors, self.curve = dict(found.tensors), list(found.curve)
        self.fit_seconds = found.fit_seconds
        self.facts = found.facts | {"draft": repr(found)}
        self.price(model, corpus, self.drafter)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Corpus | None = None) -> None:
        """Have the draft solve again what it solves, and find its cost anew."""
        drafter = self.drafter
        drafter.calibrate(model, corpus)
        self.tensors, self.facts = drafter.tensors, drafter.facts
        self.price(model, corpus, self.drafter)

    def start(self, context: ForwardContext) -> Tensor | None:
        """The draft's plan."""
        return self.drafter.start(context)

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """The draft's gates."""
        return self._drafts.gates(layer, hidden)

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """The draft's."""
        return self._drafts.instead(layer, sublayer, rows)

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The draft's."""
        return self._drafts.weights(layer)


def _unfit(method: DynamicDepthMethod) -> str | None:
    """Why a method cannot draft, as the end of a sentence; None: it can."""
    if method.speculates:
        return "speculates itself; name what it drafts with"
    if method.uses_labels or method.foresees:
        return "sees what is to be found out: it is a bound; name a method that can be used"
    if method.pooled:
        return "decides over the sequences of a batch, and a draft is of one; name another method"
    if method.kv_policy == "evict":
        own = "kv" in type(method).__dataclass_fields__
        return (
            "evicts, and what is taken back of a draft must leave the cache as it was; "
            f"{'give it kv=project, or ' if own else ''}name another method"
        )
    return None
