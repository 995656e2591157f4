"""Early exit: a token leaves the model as soon as it seems decided.

Idea: after some blocks the next token is often settled; the rest of the depth is saved.
Paper: CALM, arXiv 2207.07061 (its reference is t5x/contrib/calm).
Rule: at the entry of blocks first_exit, first_exit + every, ... a token still running leaves iff
its confidence c >= threshold. With p = softmax(head(norm(h))), sorted: ``margin`` c = p1 - p2,
``max_prob`` c = p1, ``saturation`` c = cos(h entering the block before, h). The threshold is
solved on calibration text so that the measured block speedup meets the target: one dense pass,
kept for all targets and both phases, predicts it (``offline``); sparse passes, one to three,
correct it to within 1%. Measured on the embedded model at 1.1 to 2: off by at most 1.6% (margin),
4% (saturation) before any correction.
``fixed``: every token leaves at block int(L / speedup), or at ``layer`` whatever the target.
Granularity: token; static for a fixed layer.
KV policy: project. A token that left keeps its stream; the blocks above compute keys and values
from it (CALM's state propagation). Fixed layer: drop, or prompt_only in phase ``generation``.
Phases: ``generation``, or ``both``: prompt tokens leave too.
Costs: each readout is a full LM head, billed; beside a small model with a large vocabulary it may
cost more than the blocks saved. ``saturation`` needs none.
Deviations: decoder-only instead of encoder-decoder; no joint training of the exits; no meta
classifier; no threshold decay by position; candidates every few blocks instead of every one; each
row of a batch decides for itself (the reference takes the batch minimum); the threshold meets a
speedup, not a risk bound; states are propagated from where a token left (the released code takes
the state at the first exit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from dyndepth.method import Expenses

from .rule import ExitRule

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


@dataclass(kw_only=True)
class EarlyExit(ExitRule):
    """See the module's docstring, and ``ExitRule`` for the fields."""

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """The pass at full depth, some sparse ones, and the readouts of the exits that a token of
        mean depth comes by."""
        from .threshold import readings

        if self.granularity != "token" or self.target_speedup == 1.0:
            return Expenses()
        exits = list(self.exits(layers))
        passed = sum(block <= layers / self.target_speedup for block in exits)
        if self.confidence == "saturation":
            exits, passed = [], 0
        return Expenses(fit=readings(self, len(exits), passed), readouts=float(passed))

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Solve the threshold on calibration text; a fixed depth needs none.

        Raises UserError if ``corpus`` is needed and None, or if the target is beyond reach.
        """
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold on this model's states, as ``fit`` does."""
        from .threshold import solve

        if self.granularity == "token" and self.target_speedup > 1.0:
            solve(self, model, corpus)
