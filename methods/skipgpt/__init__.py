"""SkipGPT, stage 1: frozen model, one tiny router a sublayer decides token by token.

Idea: attention and MLP of each block are skipped separately, for each token, where a linear map of
the residual stream says so; only these maps are trained.
Paper: SkipGPT, arXiv 2506.04179 (ICML 2025).
Rule: with x the stream that enters block l and n(x) = x / rms(x),
    attention runs iff w_a . n(x) + b_a >= threshold,
    MLP runs iff w_m . n(x) + b_m >= threshold;
both decisions are taken at the block's entry, as in the reference code. A token that is skipped
keeps its stream unchanged. Trained with cross-entropy + penalty * |executed - 1/speedup|; the
threshold, near 0, is then solved on calibration text so that the measured speedup meets the target.
Granularity: token and sublayer; no block and no token is protected.
KV policy: project. Every token's keys and values are computed in every block, as in the reference.
Phases: both, as in the paper; ``generation`` keeps the prompt at full depth.
Deviations: decisions are deterministic in training and at inference (the reference samples Gumbel
noise in both); the budget counts FLOPs where the reference counts modules; biases start from the
rank of each sublayer's removal damage and the wanted share falls gradually; the routers see the
RMS-normalised stream (``normalise=False``: raw, as in the paper) and pass no gradient back into it;
hundreds of steps instead of 10,000; no stage 2 (LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.errors import UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity

from .router import LinearRouter

if TYPE_CHECKING:
    from dyndepth.corpus import Corpus


@dataclass(kw_only=True)
class SkipGPT(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        normalise: routers see the RMS-normalised stream, else the raw one.
        steps, batch, length: training steps, windows a step, tokens a window.
        bias_rate: Adam's learning rate of the biases; weights get a fiftieth.
        penalty: weight of the budget, nats a token (paper: 8; its code: 20).
        phases: ``both``, or ``generation`` for full depth on the prompt.
    """

    name: ClassVar[str] = "skipgpt"
    granularity: ClassVar[Granularity] = "token"
    paper: ClassVar[str] = "arXiv 2506.04179"
    needs_training: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 6, "batch": 2, "length": 24}

    phases: Literal["generation", "both"] = "both"
    normalise: bool = True
    steps: int = 100
    batch: int = 4
    length: int = 128
    bias_rate: float = 0.02
    penalty: float = 8.0

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Take the routers shipped for this model, target and corpus if there are, else train.

        Raises UserError if text is needed and ``corpus`` is None.
        """
        from .shipped import load_shipped
        from .tuning import calibrate, train

        if self.target_speedup == 1.0:
            return self
        shipped = load_shipped(self, model)
        other_text = corpus is not None and shipped and shipped[1]["corpus"] != corpus.fingerprint
        if shipped is None or other_text:
            train(self, model, corpus)
            return self
        self.tensors, self.facts = shipped
        if self.phases != "both":
            calibrate(self, model, corpus)
        return self

    def start(self, context: ForwardContext) -> Tensor | None:
        """A full plan at target 1.0, else none. Raises UserError if the routers are missing."""
        self.context = context
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        if "weight" not in self.tensors:
            raise UserError("skipgpt has no routers yet; call fit(model, corpus) before attaching")
        if len(self.tensors["weight"]) != context.layers:
            raise UserError(
                f"these routers are for a model of {len(self.tensors['weight'])} blocks, not "
                f"{context.layers}; fit the method on this model"
            )
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        self._router = LinearRouter(
            self.tensors["weight"], self.tensors["bias"], normalise=self.normalise
        )
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """Both decisions of a block, at its entry."""
        logits = self._router(layer, hidden)
        self.context.bill("router", 4.0 * hidden.shape[-1], None)
        execute = logits >= self.facts["threshold"]
        return execute[..., 0], execute[..., 1]
