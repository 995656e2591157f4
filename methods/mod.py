"""Mixture of depths, for a trained model: every other block weighs tokens and runs for some.

Idea: a block of a mixture of depths runs for the tokens that its router scores highest and leaves
the others as they are, unseen by the rest. A trained model is made one by a threshold on the score:
it needs neither the other tokens of a sequence nor a second predictor, and so decides alike in
prompts and in generation.
Paper: Raposo et al., arXiv 2404.02258; the threshold in place of the top k: MoDification, arXiv
2410.14268 (NAACL 2025).
Rule: with x the stream that enters block l = 1, 3, 5, ... and n(x) = x / rms(x),
    r = w . n(x) + b;
    attention and MLP of block l run iff sigmoid(r) >= p, and their updates are multiplied by r.
The other blocks run for all. A token that is skipped keeps its stream unchanged. p is solved on
calibration text so that the measured speedup meets the target.
Granularity: token and block, in every other block: at most a speedup of 2. KV policy: evict. In a
block that a token skips it is invisible, for good. Phases: both, as in the papers.
Training: the model is frozen; routers begin at w = 0 and b = 1, where nothing is changed. Their
gates are straight-through, under the divergence from the dense model (``objective=kl``; ``ce``:
cross-entropy) + penalty * |executed - 1/speedup|.
Costs: one linear map in every other block, billed.
Deviations: both papers train all weights, the first from scratch; here only routers are trained,
and adapters under them by the harness's ``recovery`` (``joint``: together with them). The papers'
score reads the raw stream, here the normalised one, standardised while training. The score weighs
the update of attention before the MLP reads it, the papers' that of the whole block at its end. How
MoDification holds its rate is not known to us: here by the budget. Top k over a sequence, which
sees tokens to come, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dyndepth.fitting.block_routing import ALWAYS, BlockRouting
from dyndepth.fitting.routers import stream_statistics
from dyndepth.method import KVPolicy
from dyndepth.methods.skipgpt.router import LinearRouter
from dyndepth.models.blocks import Decoder

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_STATISTICS_WINDOWS = 8


class ScoreRouter(LinearRouter):
    """A score in every other block, from the normalised stream; it is logit and weight.

    ``weight`` is ``[layers, 1, hidden]``, ``bias`` ``[layers, 1]``; those of the blocks that always
    run are not read.
    """

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores ``[batch, tokens, hidden] -> [batch, tokens, 1]``."""
        if layer % 2 == 0:
            return hidden.new_full((*hidden.shape[:-1], 1), ALWAYS, dtype=torch.float32)
        return super().forward(layer, hidden)

    def weights(self, layer: int, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The scores, for both sublayers."""
        return (None, None) if layer % 2 == 0 else (logits[..., 0], logits[..., 0])

    def flops(self) -> float:
        """Of one router on one token."""
        return 2.0 * self.weight.shape[-1]


@dataclass(kw_only=True)
class MixtureOfDepths(BlockRouting):
    """See the module's docstring, and ``BlockRouting`` for the fields."""

    name: ClassVar[str] = "mod"
    paper: ClassVar[str] = "arXiv 2404.02258, 2410.14268"
    capturable: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 4, "batch": 2, "length": 24, "weight_rate": 0.1}

    objective: Literal["ce", "kl"] = "kl"
    steps: int = 110

    @property
    def kv_policy(self) -> KVPolicy:
        """A token is invisible in the blocks that it skips."""
        return "evict"

    def routed(self, layers: int) -> range:
        """Every other block, from the second on."""
        return range(1, layers, 2)

    def initial(self, model: nn.Module, corpus: Corpus) -> ScoreRouter:
        """Scores of 1 for all tokens."""
        layers, hidden = Decoder.of(model).shape
        windows = corpus.windows(self.length, _STATISTICS_WINDOWS, self.seed, model=model)
        return ScoreRouter(
            torch.zeros(layers, 1, hidden),
            torch.ones(layers, 1),
            normalise=True,
            statistics=stream_statistics(model, windows, normalise=True),
        )

    def built(self, layers: int) -> ScoreRouter:
        """The trained scores."""
        return ScoreRouter(self.tensors["weight"], self.tensors["bias"], normalise=True)

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The scores of the block whose gates were asked last, where it has a router."""
        if self._logits is None:
            return None, None
        return self._router.weights(layer, self._logits)
