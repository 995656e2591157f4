"""SkipGPT: a tiny router a sublayer decides token by token whether it runs.

Idea: attention and MLP of each block are skipped separately, for each token, where a linear map of
the residual stream says so; only these maps are trained (stage 1). Stage 2, LoRA with the routers
frozen, is the harness's ``recovery``, the same for every method.
Paper: SkipGPT, arXiv 2506.04179 (ICML 2025).
Rule: with x the stream that enters block l and n(x) = x, or x / rms(x) if ``normalise``,
    attention runs iff w_a . n(x) + b_a >= threshold,
    MLP runs iff w_m . n(x) + b_m >= threshold;
both decisions are taken at the block's entry, as in the reference code. A token that is skipped
keeps its stream unchanged. The threshold, near 0, is solved on calibration text so that the
measured speedup meets the target: the trained rate drifts from the measured one.
Training: ``preset=paper`` has the published settings: straight-through Gumbel gates under
cross-entropy + penalty * |executed - 1/speedup|. ``preset=embedded``, the default, finds the maps
by regression (``dyndepth.fitting.regression``): sublayers are switched off in the order of a greedy
removal, more than the target asks; a ridge regression on the stream predicts what each token would
gain from running each; where the gain per FLOP is largest, they run. Straight-through steps may
follow (``steps``). Minutes on a processor for a small model, and no learning rate.
Granularity: token and sublayer; no block and no token is protected. ``reads=constant``: static.
KV policy: project. Every token's keys and values are computed in every block, as in the reference;
``kv=evict`` leaves out those of tokens that skip; shipped routers, and the regression, are those of
projecting, with the threshold solved anew.
Phases: both, as in the paper; ``generation`` keeps the prompt at full depth.
Deviations: decisions are deterministic at inference (the reference samples Gumbel noise there too).
In both presets no gradient passes through a router's input into the stream, and the paper's two
logits are one, their difference. ``paper`` clips no gradients and has AdamW's second beta at 0.99
(the released trainer: 1.0 and its library's default); its ``router=mlp`` doubles the rate of the
inner layer too, which both logits share. ``embedded`` counts FLOPs where the reference counts
modules, takes the divergence from the dense model as loss, and reads the RMS-normalised stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from dyndepth.common.errors import UserError
from dyndepth.data.wheels import say
from dyndepth.method import Expenses

from .rule import RouterRule

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


@dataclass(kw_only=True)
class SkipGPT(RouterRule):
    """See the module's docstring, and ``RouterRule`` for the fields."""

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """None where routers are given or shipped; else the training's."""
        from .shipped import load_shipped
        from .tuning import readings, readings_along

        if self.target_speedup == 1.0 or self.routers is not None:
            return Expenses()
        shipped = model is not None and load_shipped(self, model, corpus) is not None
        along = readings_along(self)
        return Expenses(fit=readings(self, layers), along=along, shipped=shipped)

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Take the routers named, or those shipped for this model, target and corpus, else train.

        Raises UserError if text is needed and ``corpus`` is None, or if routers do not fit.
        """
        from dyndepth.fitting.routers import trained_along

        from .shipped import load_named, load_shipped, missing
        from .tuning import train

        if self.target_speedup == 1.0:
            return self
        along = bool(trained_along(model))
        if self.routers is not None:
            if along:
                raise UserError("routers that are given are trained already; leave routers= out")
            self.tensors, self.facts = load_named(self, model)
            self.calibrate(model, corpus)
            return self
        shipped = None if self.anew or along else load_shipped(self, model, corpus)
        if shipped is None:
            if not (self.anew or along):
                say(
                    f"{self.name} trains routers for {self.target_speedup:g}x, which can take "
                    f"minutes: {missing(self, model, corpus)}"
                )
            train(self, model, corpus)
            return self
        self.tensors, self.facts = shipped
        if self.phases != "both" or self.kv == "evict":
            self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold for the model as it is now."""
        from .tuning import calibrate

        if self.target_speedup > 1.0:
            calibrate(self, model, corpus)
