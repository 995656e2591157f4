"""D-LLM: a small network a block decides, token by token, whether the block runs.

Idea: tokens need different depth; a block that a token skips does not see it at all, so that its
keys and values need not be kept either.
Paper: Jiang et al., NeurIPS 2024; details from the reference code (Jyk-122/D-LLM 8c70dd7).
Rule: with x the stream that enters block l >= ``first_routed`` and the token not among the first
``keep_first`` of its sequence,
    z = silu(RMSNorm(A x + a)),  logits = B z + b, of skip and execute;
    attention and MLP of block l run iff the difference of the logits is at least the threshold.
Earlier blocks and the first tokens always run. A token that is skipped keeps its stream unchanged.
The paper's threshold is 0 (softmax at least .5); here it is solved on calibration text so that the
measured speedup meets the target.
Granularity: token and block. KV policy: evict. Phases: both, as in the paper.
Training: straight-through Gumbel gates at temperature 1; cross-entropy + penalty * the mean over
tokens of |executed - 1/speedup|, always-on blocks included and first tokens left out, with the
penalty rising as a sine from none. No noise at inference.
Costs: the networks, billed as ``router``: with the published width of 512 a large part of a small
model's block.
Deviations: the paper trains adapters of rank 8 on query, key and value along: that is ``--recovery
"joint(rank=8, targets=query+key+value)"``; without, the model is frozen. Shares count FLOPs, the
paper's blocks. No gradient passes through a router's input into the stream. A key that is seen
moves with its gate, as in the reference; one that is not seen has no gradient here. The released
settings are of another scale (ten epochs of instructions, router rate 1e-3 / 256 a window, eight
always-on blocks in the script, two in the code); the defaults are what trains within half an hour
on a processor. The mask of visible keys is each generation's own; the reference never resets it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from dyndepth.fitting.block_routing import BlockRouting, GateRouter
from dyndepth.fitting.routers import Tuning
from dyndepth.method import KVPolicy
from dyndepth.models.blocks import Decoder

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_EPSILON = 1e-5
_SKIP, _EXECUTE = 0.1, 2.0
"""Biases of the two logits before training."""


class DecisionNetwork(GateRouter):
    """``silu(RMSNorm(A x + a))`` and two logits, whose difference, execute - skip, is the gate's.

    ``inner`` ``[routed, width, hidden]``, ``inner_bias`` and ``gain`` ``[routed, width]``,
    ``outer`` ``[routed, 2, width]`` and ``bias`` ``[routed, 2]``, skip before execute; or, folded,
    ``[routed, 1, width]`` and ``[routed, 1]``: their difference.
    """

    inner: nn.Parameter
    inner_bias: nn.Parameter
    gain: nn.Parameter
    outer: nn.Parameter

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [...]``."""
        inner, inner_bias, gain, outer, bias = (
            table[row].to(hidden.device)
            for table in (self.inner, self.inner_bias, self.gain, self.outer, self.bias)
        )
        active = hidden @ inner.T + inner_bias
        active = silu(rms_norm(active, gain.shape, gain, _EPSILON))
        found = active @ outer.T + bias
        return found[..., 0] if len(bias) == 1 else found[..., 1] - found[..., 0]

    def folded(self) -> dict[str, Tensor]:
        """The parameters, with one logit in place of two."""
        tables = super().folded()
        for name in ("outer", "bias"):
            tables[name] = tables[name][:, 1:] - tables[name][:, :1]
        return tables

    def flops(self) -> float:
        """Of one network on one token."""
        return 2.0 * (self.inner[0].numel() + self.outer[0].numel())


@dataclass(kw_only=True)
class DLLM(BlockRouting):
    """See the module's docstring, and ``BlockRouting`` for the other fields.

    Fields:
        first_routed: blocks before this one always run.
        keep_first: tokens at the beginning of each sequence that always run.
        width: of the networks' hidden layer.
    """

    name: ClassVar[str] = "d_llm"
    paper: ClassVar[str] = "NeurIPS 2024 (D-LLM)"
    capturable: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {
        "steps": 4,
        "batch": 2,
        "length": 24,
        "width": 8,
        "weight_rate": 0.1,
    }

    first_routed: int = 2
    keep_first: int = 2
    width: int = 512
    penalty: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bound in {"first_routed": 0, "keep_first": 0, "width": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")

    @property
    def kv_policy(self) -> KVPolicy:
        """A token is invisible in the blocks that it skips."""
        return "evict"

    @property
    def first_tokens(self) -> int:
        """Those that always run."""
        return self.keep_first

    def routed(self, layers: int) -> range:
        """All blocks but the first ones."""
        return range(self.first_routed, layers)

    def tuning(self) -> Tuning:
        """The published loss, under sampled gates."""
        return replace(
            super().tuning(),
            estimator="gumbel",
            temperature=(1.0, 1.0),
            each_token=True,
            rise=1.0,
        )

    def initial(self, model: nn.Module, corpus: Corpus) -> DecisionNetwork:
        """Networks as published: a linear layer's usual values, biases that say execute."""
        layers, hidden = Decoder.of(model).shape
        routed, random = self.routed(layers), torch.Generator().manual_seed(self.seed)

        def uniform(*shape: int, inputs: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=random) - 1) * inputs**-0.5

        count, width = len(routed), self.width
        return DecisionNetwork(
            routed,
            inner=uniform(count, width, hidden, inputs=hidden),
            inner_bias=uniform(count, width, inputs=hidden),
            gain=torch.ones(count, width),
            outer=uniform(count, 2, width, inputs=width),
            bias=torch.tensor([_SKIP, _EXECUTE]).repeat(count, 1),
        )

    def built(self, layers: int) -> DecisionNetwork:
        """The trained networks."""
        return DecisionNetwork(self.routed(layers), **self.tensors)
