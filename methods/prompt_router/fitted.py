"""What routers that read a prompt have beside their rule: how they are found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from torch import nn

from dyndepth.fitting.fits import fit_cached
from dyndepth.fitting.routers import trained_along
from dyndepth.method import Expenses

from .rule import PromptRule
from .tuning import calibrate, readings, train

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


@dataclass(kw_only=True)
class TrainedPromptRule(PromptRule):
    """See ``PromptRule`` for the fields."""

    def expenses(
        self, layers: int, model: nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """The training's, and what comes before and after it; for an estimate."""
        return Expenses(fit=readings(self, layers)) if self.target_speedup > 1.0 else Expenses()

    def fit(self, model: nn.Module, corpus: Corpus | None = None) -> Self:
        """Train the routers and solve their threshold; the control ``frequent`` takes those that
        read prompts, which are kept.

        Raises UserError if ``corpus`` is None or the target is beyond reach.
        """
        if self.target_speedup == 1.0:
            return self
        if self.reads == "frequent" and not trained_along(model):
            reader = fit_cached(replace(self, reads="prompt"), model, corpus)
            self.tensors, self.facts = dict(reader.tensors), dict(reader.facts)
            self.curve = reader.curve
            calibrate(self, model, corpus)
        else:
            train(self, model, corpus)
        return self

    def calibrate(self, model: nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold for the model as it is now."""
        if self.target_speedup > 1.0:
            calibrate(self, model, corpus)
