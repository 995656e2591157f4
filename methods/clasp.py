"""CLaSp: drafts without the blocks that the last token could have done without.

Idea: a verification shows each state of the last token that stands. Which blocks it hardly needed,
those after it will hardly need either; so a draft leaves them out, and after some verifications
they are chosen anew.
Paper: CLaSp, arXiv 2505.24196, equation 2 and algorithm 1; which tokens stand: arXiv 2211.17192.
Rule: with L blocks M = int(L (1 - 1 / speedup)) are left out, whole ones. h_0 .. h_L are the states
of the last token that stands, before each block and after the last; f_i is block i in its place,
over the full-depth keys of those before it. For j blocks left out of the first i,
    g(i, 0) = h_i,  g(i, i) = h_0,
    g(i, j) = f_{i-1}(g(i-1, j)) or g(i-1, j-1), whichever has the higher cosine with h_i,
and the choices that lead to g(L, M) are the set. All j of one i run in one call, those alone that
can still come to M; so a programme costs about a verification, and ``every`` says how seldom one
is made. Until the first verification of a text the kept blocks are evenly spaced, as in ``uls``.
Granularity: sequence. Phases: generation, and there in drafts alone: everywhere else every block
runs. KV policy: prompt_only; what a draft kept is taken back.
Costs: no FLOPs are saved: drafts, refused tokens and programmes are billed as ``draft``. Each new
set of blocks is recorded anew under ``--mode graphs``.
Deviations: h_L is taken before the final norm. For a model of 70 billion weights the paper finds
44 of 80 blocks best, an interval of 128 and, to stop at, a probability of 0.7, the default here;
the target says how many blocks here, and ``length`` bounds a draft. ``every`` is 8 by default: on
the embedded model a programme costs some 0.8 of a verification, and one after each verification has
0.04 more of the drafted tokens stand. The set of the first draft is ours. The paper has no
``adaptive``; each verification bears its part of a programme, which by ``bytes`` is counted as
reading the weights of all blocks, and is ``measured`` as what one after each round adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dyndepth.common.errors import UserError
from dyndepth.fitting.drafting import COST, Drafting
from dyndepth.method import ForwardContext, Granularity, Verified
from dyndepth.runtime.draft_costs import step_bytes

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus

_PLAN, _ROUNDS = "clasp.plan", "clasp.rounds"
_NEVER = 10**9


@dataclass(kw_only=True)
class CLaSp(Drafting):
    """See the module's docstring.

    Fields:
        every: verifications between two programmes; the first makes one.
        length, stop, adaptive: how long a draft gets; see ``Drafting``.
    """

    name: ClassVar[str] = "clasp"
    granularity: ClassVar[Granularity] = "sequence"
    paper: ClassVar[str] = "arXiv 2505.24196"
    reads_states: ClassVar[bool] = True

    stop: float = 0.7
    every: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    @property
    def fitted(self) -> bool:
        """No block is chosen before a text is there."""
        return self.priced

    def max_speedup(self, layers: int) -> float:
        """L: one block runs."""
        return float(layers)

    def skipped(self, layers: int) -> int:
        """M, of a model of ``layers`` blocks. Raises UserError beyond ``max_speedup``."""
        if self.target_speedup > layers:
            raise UserError(
                f"clasp keeps one block at least, so {layers} blocks allow a draft of a speedup "
                f"of at most {layers}, not {self.target_speedup:g}; ask for less"
            )
        # The small addend undoes rounding.
        return int(layers * (1 - 1 / self.target_speedup) + 1e-9)

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Find what a draft costs, where it goes by cost; else nothing is read."""
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Corpus | None = None) -> None:
        """As ``fit``."""
        if self.adaptive is None:
            return
        weights = step_bytes(model)
        plan = self._first(len(weights.blocks))
        # Without a programme among the rounds that are measured, whatever the interval.
        seldom, often = (self._priced(model, corpus, plan, every) for every in (_NEVER, 1))
        programme = float(weights.blocks.sum()) / weights.step
        if self.adaptive == "measured":
            programme = max(0.0, often["draft"] - seldom["draft"]) * max(1, self.length)
        if not plan.all():
            seldom["verify"] += programme / self.every
        self.facts[COST] = seldom

    def _priced(
        self, model: torch.nn.Module, corpus: Corpus | None, plan: Tensor, every: int
    ) -> dict[str, float]:
        method = replace(self, every=every)
        method.price(model, corpus, plan=plan)
        found: dict[str, float] = method.facts[COST]
        return found

    def start(self, context: ForwardContext) -> Tensor:
        """The last programme's plan, ``[1, layers, 2]``, or the first one's, ``[layers, 2]``."""
        found = context.memory.get(_PLAN)
        return self._first(context.layers) if found is None else found

    def verified(self, verdict: Verified) -> None:
        """Choose the blocks anew, where it is time."""
        super().verified(verdict)
        assert verdict.states is not None
        assert verdict.rerun is not None
        layers = len(verdict.states) - 1
        count = self.skipped(layers)
        rounds = verdict.memory.get(_ROUNDS, torch.zeros(1, dtype=torch.long))
        if count and int(rounds) % self.every == 0:
            plan = torch.ones(1, layers, 2, dtype=torch.bool)
            plan[:, least_missed(verdict.states, verdict.rerun, count)] = False
            verdict.memory[_PLAN] = plan
        verdict.memory[_ROUNDS] = rounds + 1

    def _first(self, layers: int) -> Tensor:
        """Evenly spaced blocks, the first and the last among them: bool ``[layers, 2]``."""
        kept = layers - self.skipped(layers)
        plan = torch.zeros(layers, 2, dtype=torch.bool)
        plan[[round(i * (layers - 1) / max(1, kept - 1)) for i in range(kept)]] = True
        return plan


def least_missed(states: Tensor, rerun: Callable[[int, Tensor], Tensor], count: int) -> list[int]:
    """The ``count`` blocks that a token of these ``states`` misses least, ascending.

    ``states`` ``[layers + 1, hidden]`` and ``rerun`` are as in ``Verified``; 0 < ``count`` <
    layers. The dynamic programme of the module's docstring; the host waits for it once.
    """
    layers = len(states) - 1
    best = states[:1].repeat(count + 1, 1)  # g(i, j) by j
    ran = torch.zeros(layers + 1, count + 1, dtype=torch.bool, device=states.device)
    for i in range(1, layers + 1):
        # Fewer can't become ``count`` any more; of i blocks not all can run and be left out.
        first, last = max(1, count - (layers - i)), min(i - 1, count)
        if first <= last:
            run, skip = rerun(i - 1, best[first : last + 1]), best[first - 1 : last]
            near = [cosine_similarity(each.float(), states[i].float(), -1) for each in (run, skip)]
            ran[i, first : last + 1] = runs = near[0] > near[1]
            best[first : last + 1] = torch.where(runs[:, None], run, skip)
        best[0] = states[i]
    missed, choices, j = [], ran.tolist(), count
    for i in range(layers, 0, -1):
        if j and not choices[i][j]:
            missed.append(i - 1)
            j -= 1
    return missed[::-1]
