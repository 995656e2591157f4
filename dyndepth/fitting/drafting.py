"""How long a draft gets: what methods that draft for the whole model have in common.

Three rules. A fixed ``length``. A probability, ``stop``: go on while the draft gave its last token
at least that much. And, where a method is ``adaptive``, cost: another token is drafted while

    S * a > r * c

with c the cost of drafting one, a the probability that the next one stands, S that all drafted
ones do, and r the most tokens for each unit of cost that can be had (``draft_costs.best_rate``);
none is where steps bring as many.
The probabilities are learnt of each text from what became of its drafts: kept of judged, older
rounds fading, over a few imagined ones to begin with. With a ``stop``, tokens on either side of it
are two kinds, each with its own. Costs are relative to a step of the whole model, ``bytes`` of
weights that are read or ``measured`` when the method is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import measured
from dyndepth.method import Draft, DynamicDepthMethod, Phases, Verified
from dyndepth.runtime.attach import attach
from dyndepth.runtime.draft_costs import DraftCosts, Kind, best_rate, by_bytes, pays
from dyndepth.runtime.speculation import speculate

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus

COST = "draft_cost"
"""The fact that holds what ``adaptive`` goes by: ``{"draft": c, "verify": v}``."""
_JUDGED, _SURE, _RATE = "drafting.judged", "drafting.sure", "drafting.rate"
_ONE_KIND = ((8.0, 10.0), (0.0, 0.0))
_TWO_KINDS = ((4.5, 5.0), (1.5, 5.0))
"""Tokens that stood, and that were judged, in the imagined rounds: of the sure, the unsure kind."""
_FADES = 0.9
_WINDOWS, _LENGTH = 4, 128
_PROMPT, _ROUNDS, _TURNS = 32, 4, 3


@dataclass(kw_only=True)
class Drafting(DynamicDepthMethod):
    """Base of methods that draft. A subclass says by ``start`` or ``gates`` what a draft runs.

    Fields:
        length: most tokens of a draft; 0: none is made.
        stop: a draft goes on while it gave its last token at least this probability; 0: always,
            and probabilities are never read. Where it is adaptive: what tells two kinds of tokens
            apart.
        adaptive: draft another token only while it pays, by the ``bytes`` that it reads or by a
            cost that ``fit`` has ``measured`` on this machine. None: by ``length`` and ``stop``.
    """

    speculates: ClassVar[bool] = True

    length: int = 4
    stop: float = 0.8
    adaptive: Literal["bytes", "measured"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 0:
            raise ValueError(f"length must be at least 0, not {self.length}")
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must lie between 0 and 1, not {self.stop}")

    @property
    def phases(self) -> Phases:
        """A prompt is never drafted."""
        return "generation"

    @property
    def by_document(self) -> bool:
        """False: drafts share no forward, and all else is the whole model."""
        return False

    @property
    def window_length(self) -> int | None:
        """``length`` is no window's."""
        return None

    @property
    def priced(self) -> bool:
        """Whether the costs are there, if it goes by any."""
        return self.adaptive is None or COST in self.facts

    def more(self, draft: Draft) -> bool:
        """See the module's docstring."""
        if self.adaptive is not None:
            return self._pays(draft)
        if draft.length >= self.length:
            return False
        return not draft.length or not self.stop or draft.probabilities()[-1] >= self.stop

    def verified(self, verdict: Verified) -> None:
        """Learn from what stood, if adaptive."""
        if self.adaptive is None:
            return
        memory = verdict.memory
        judged = min(verdict.accepted + 1, verdict.drafted)
        sure = [True] * judged
        if self.stop:
            # Of a token after which nobody asked, the kind is not known.
            sure = [bool(one) for one in memory[_SURE][0, :judged]]
        counts = _FADES * self._counts(memory)
        for place, one in enumerate(sure):
            counts[0, 0 if one else 1] += torch.tensor([float(place < verdict.accepted), 1.0])
        memory[_JUDGED] = counts

    def _counts(self, memory: dict[str, Tensor]) -> Tensor:
        """Of each kind, tokens that stood and that were judged: float64 ``[1, 2, 2]``."""
        return memory.get(_JUDGED, torch.zeros(1, 2, 2, dtype=torch.float64))

    def _kinds(self, memory: dict[str, Tensor]) -> tuple[Kind, Kind]:
        prior = torch.tensor(_TWO_KINDS if self.stop else _ONE_KIND, dtype=torch.float64)
        (sure, of_sure), (unsure, of_unsure) = (self._counts(memory)[0] + prior).tolist()
        both = of_sure + of_unsure
        return (
            Kind(of_sure / both, sure / of_sure),
            Kind(of_unsure / both, unsure / of_unsure if of_unsure else 0.0),
        )

    def _pays(self, draft: Draft) -> bool:
        memory, kinds = draft.memory, self._kinds(draft.memory)
        costs = DraftCosts(**self.facts[COST])
        ahead = sum(kind.share * kind.stands for kind in kinds)
        if not draft.length:
            rate = best_rate(kinds, costs, self.length)
            memory[_RATE] = torch.tensor([[rate]], dtype=torch.float64)
            memory[_SURE] = torch.zeros(1, 0, dtype=torch.bool)
            goes_on = self.length > 0 and rate > 1
            if not goes_on and _JUDGED in memory:
                # Nothing is learnt where nothing is drafted: in time it is tried again.
                memory[_JUDGED] = _FADES * memory[_JUDGED]
            return goes_on
        sure = [True] * draft.length
        if self.stop:
            sure = [probability >= self.stop for probability in draft.probabilities()]
            memory[_SURE] = torch.tensor([sure])
        if draft.length >= self.length:
            return False
        stands = 1.0
        for one in sure:
            stands *= kinds[0 if one else 1].stands
        return pays(stands, ahead, float(memory[_RATE]), costs)

    def price(
        self,
        model: nn.Module,
        corpus: Corpus | None,
        draft: DynamicDepthMethod | None = None,
        plan: Tensor | None = None,
    ) -> None:
        """Find the costs, if it goes by any, into ``facts``; the last that a ``fit`` does.

        ``plan`` ``[layers, 2]`` is what drafts run: bool, or shares. Without one it is read off the
        method ``draft``, attached alone to calibration text, or to none where it is static. Raises
        UserError where text is needed and there is no corpus.
        """
        if self.adaptive is None:
            return
        if self.adaptive == "measured":
            costs = self._measured(model, corpus)
        else:
            readouts = 0.0
            if plan is None:
                assert draft is not None
                windows = self._text(model, corpus, draft.granularity != "static")
                plan = measured(model, draft, windows).executed
                readouts = draft.expenses(len(plan), model, corpus).readouts
            projected = self.kv_policy == "project"
            costs = by_bytes(model, plan, readouts=readouts, projected=projected)
        self.facts[COST] = {"draft": costs.draft, "verify": costs.verify}

    def _text(self, model: nn.Module, corpus: Corpus | None, needed: bool) -> Tensor:
        if corpus is not None:
            length = fitting(model, _LENGTH)
            return corpus.windows(length, _WINDOWS, self.seed, split="calibration", model=model)
        if needed:
            raise UserError(f"{self.name} reads off text what a draft costs; give fit a corpus")
        return torch.zeros(1, 8, dtype=torch.long)

    def _measured(self, model: nn.Module, corpus: Corpus | None) -> DraftCosts:
        """By the loop's own clock, steps and rounds of ``length`` tokens in turn. What each drafted
        token adds to a verification is among its cost, so that one for all lengths is left."""
        prompt = self._text(model, corpus, needed=False)[0, :_PROMPT].tolist()
        length = max(1, self.length)
        seconds: dict[int, list[Any]] = {0: [], length: []}
        for turn in range(_TURNS):
            for tokens, found in seconds.items():
                method = replace(self, adaptive=None, stop=0.0, length=tokens)
                method.tensors, method.facts = self.tensors, self.facts
                with attach(model, method, warn=False) as trace:
                    for _ in speculate(
                        model, trace, method, prompt, limit=2 + _ROUNDS * (tokens + 1)
                    ):
                        if len(trace.speculation.rounds) == _ROUNDS:
                            break
                    # The first round warms up, and rounds at the limit are shorter.
                    whole = [one for one in trace.speculation.rounds if len(one.drafted) == tokens]
                    found += whole[1:] if turn else []
        step = median(one.verify_s for one in seconds[0])
        drafted = median(one.draft_s for one in seconds[length])
        verify = median(one.verify_s for one in seconds[length])
        return DraftCosts(max(0.0, (drafted + verify - step) / length / step))
