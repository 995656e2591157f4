"""FlexiDepth: in the upper half a token runs a block, or a small adapter in place of its MLP.

Idea: skipping all of a block tears a hole into the stream's path; a narrow MLP closes it, and what
is executed and what replaces it share the router's confidence.
Paper: Luo et al., arXiv 2503.23798 (COLM 2025).
Rule: with x the stream that enters block l >= layers / 2, n(x) = x / rms(x) and
    w = sigmoid(v . tanh(RMSNorm(A n(x))) + b),
block l runs iff w >= p. Then its MLP's update is multiplied by w; attention is as ever. A token
that skips both gets (1 - w) * adapter(n(x)) instead, adapter(z) = D (silu(G z) * (U z)). The lower
half always runs. The paper's p is .5; here it is solved on calibration text so that the measured
speedup meets the target, adapters counted among the MLPs.
Granularity: token and block. KV policy: project. Phases: both, as in the paper.
Training: routers and adapters, the model is frozen. Straight-through gates under cross-entropy +
penalty * |executed - 1/speedup|. Adapters begin with D = 0, routers with v = 0 and b = 3.
Costs: a router for all tokens, a second time for those that skip, whose weight is found again from
their rows; adapters for those that skip, a sixteenth of an MLP each.
Deviations: the paper has a penalty on the executed blocks and no target, and no straight-through
gates: its routers learn by w alone. Its training (two rounds of instructions on eight GPUs) is
replaced by minutes on plain text. Norms are x / rms(x): the gains of the model's own norms, which
the paper's routers and adapters read through, can be taken up by A, G and U where those norms are
RMSNorms. How the paper's adapters and routers begin is not known to us. The adapter's activation
is SiLU, whatever the model's.
The published checkpoint (Llama-3-8B-Instruct): the shapes of its routers are known, and
``router_of`` makes one of this rule's of their parts; the names of its tensors, and whether its
last layers have biases, are not, so that its file can't be read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from dyndepth.fitting.block_routing import BlockRouting, GateRouter
from dyndepth.fitting.routers import inverse_scale
from dyndepth.method import MLP, KVPolicy
from dyndepth.models.blocks import Decoder

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_EPSILON = 1e-5
_BIAS = 3.0


class RouterWithAdapter(GateRouter):
    """A bottleneck to one logit, and what tokens below the threshold get in place of the MLP.

    ``inner`` ``[routed, narrow, hidden]``, ``gain`` and ``outer`` ``[routed, narrow]``, ``bias``
    ``[routed, 1]``; of the adapter ``gate`` and ``up`` ``[routed, width, hidden]``, ``down``
    ``[routed, hidden, width]``.
    """

    inner: nn.Parameter
    gain: nn.Parameter
    outer: nn.Parameter
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [...]``."""
        inner, gain, outer, bias = (
            table[row].to(hidden.device) for table in (self.inner, self.gain, self.outer, self.bias)
        )
        # The scale of the stream is one number a token: taken off after the product.
        narrow = (hidden @ inner.T) * inverse_scale(hidden)
        active = torch.tanh(rms_norm(narrow, gain.shape, gain, _EPSILON))
        return (active @ outer[:, None])[..., 0] + bias[0]

    def weights(self, layer: int, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The router's confidence, for the MLP."""
        return None, (torch.sigmoid(logits[..., 0]) if layer in self.routed else None)

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """The adapter's update, by the confidence that the MLP is not needed."""
        if sublayer != MLP or layer not in self.routed:
            return None
        row, states = self.routed.index(layer), rows.float()
        gate, up, down = (table[row].to(rows.device) for table in (self.gate, self.up, self.down))
        normed = states * inverse_scale(states)
        update = (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
        against = torch.sigmoid(-self.logits(row, states.detach()))
        return (update * against[..., None]).to(rows.dtype)

    def flops(self) -> float:
        """Of one router on one token."""
        return 2.0 * (self.inner[0].numel() + self.outer[0].numel())

    def adapter_flops(self) -> float:
        """Of one adapter on one token."""
        return 2.0 * (self.gate[0].numel() + self.up[0].numel() + self.down[0].numel())


@dataclass(kw_only=True)
class FlexiDepth(BlockRouting):
    """See the module's docstring, and ``BlockRouting`` for the other fields.

    Fields:
        narrow: the router's bottleneck is the stream's size by this.
        adapter: the adapter's cost is the MLP's by this.
    """

    name: ClassVar[str] = "flexidepth"
    paper: ClassVar[str] = "arXiv 2503.23798"
    capturable: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 4, "batch": 2, "length": 24, "weight_rate": 0.1}

    bias_rate: float = 5e-2
    narrow: int = 16
    adapter: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("narrow", "adapter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def kv_policy(self) -> KVPolicy:
        """Every token's keys and values are computed in every block."""
        return "project"

    def routed(self, layers: int) -> range:
        """The upper half."""
        return range(layers // 2, layers)

    def initial(self, model: nn.Module, corpus: Corpus) -> RouterWithAdapter:
        """Routers that execute everything, adapters that add nothing."""
        parts = Decoder.of(model)
        layers, hidden = parts.shape
        routed, random = self.routed(layers), torch.Generator().manual_seed(self.seed)

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=random) - 1) * hidden**-0.5

        count, narrow = len(routed), max(1, hidden // self.narrow)
        # An MLP of three matrices is as wide as its FLOPs say; others count as if they were such.
        wide = round(parts.blocks[-1].mlp_flops / (2 * 3 * hidden))
        width = max(1, wide // self.adapter)
        return RouterWithAdapter(
            routed,
            inner=uniform(count, narrow, hidden),
            gain=torch.ones(count, narrow),
            outer=torch.zeros(count, narrow),
            bias=torch.full((count, 1), _BIAS),
            gate=uniform(count, width, hidden),
            up=uniform(count, width, hidden),
            down=torch.zeros(count, hidden, width),
        )

    def built(self, layers: int) -> RouterWithAdapter:
        """The trained routers and adapters."""
        return RouterWithAdapter(self.routed(layers), **self.tensors)

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The confidence of the block whose gates were asked last, for its MLP."""
        if self._logits is None:
            return None, None
        return self._router.weights(layer, self._logits)

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """The adapter's update; it is billed among the MLPs, and its router once more."""
        if self.target_speedup == 1.0:
            return None
        update: Tensor | None = self._router.instead(layer, sublayer, rows)
        if update is not None:
            self.context.bill("mlp", self._router.adapter_flops(), None)
            self.context.bill("router", self._router.flops(), None)
        return update


def router_of(
    down: Tensor, gain: Tensor, up: Tensor, head: Tensor, norm: Tensor
) -> dict[str, Tensor]:
    """``inner``, ``gain`` and ``outer`` of one block's router, of the published one's parts.

    ``down`` ``[narrow, hidden]``, ``gain`` ``[narrow]`` of the norm behind it, ``up``
    ``[hidden, narrow]``, ``head`` ``[1, hidden]``, and ``norm`` ``[hidden]``, the gain of the
    block's own input norm, which the published router reads through. Between ``up`` and ``head``
    stands nothing, so they are one vector; a bias of either is for the caller to add up.
    """
    return {"inner": down * norm, "gain": gain, "outer": (head @ up)[0]}
