"""The routers of SkipGPT: a map a sublayer, of the stream that enters its block, to one logit.

The paper's two logits (execute, skip) decide by their difference, which is this one logit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyndepth.fitting.routers import Router, inverse_scale


class LinearRouter(Router):
    """Logits ``n(h) @ weight + bias`` in float32; execute where not negative.

    ``weight`` is ``[layers, 2, hidden]``, ``bias`` ``[layers, 2]`` (attention, MLP); ``n`` divides
    by the root mean square if ``normalise``, else it is the identity. ``statistics`` are mean and
    deviation of ``n(h)``, each ``[layers, hidden]``: given them, weights and biases are those of
    the standardised stream, which is how they learn evenly; ``folded`` gives the plain ones.
    Logits lie on the stream's device, wherever the router does.
    """

    mean: Tensor | None
    deviation: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        normalise: bool,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.normalise = normalise
        mean, deviation = statistics or (None, None)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of both sublayers: ``[batch, tokens, hidden] -> [batch, tokens, 2]``."""
        hidden = hidden.float()
        weight, bias = (each.to(hidden.device) for each in self._plain(layer))
        logits = hidden @ weight.T
        if self.normalise:
            # The scale of the stream is one number a token: taken off after the product.
            logits = logits * inverse_scale(hidden)
        return logits + bias

    def _plain(self, layer: int) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight[layer], self.bias[layer]
        if self.mean is not None and self.deviation is not None:
            weight = weight / self.deviation[layer]
            bias = bias - weight @ self.mean[layer]
        return weight, bias

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Tensors that need no statistics: ``weight`` and ``bias``."""
        pairs = [self._plain(layer) for layer in range(len(self.weight))]
        return {
            "weight": torch.stack([weight for weight, _ in pairs]).detach().cpu(),
            "bias": torch.stack([bias for _, bias in pairs]).detach().cpu(),
        }


class MLPRouter(Router):
    """Logits ``relu(n(h) @ inner + inner_bias) @ weight + bias``: the reference code's variant.

    ``inner`` is ``[layers, 2, width, hidden]``, ``inner_bias`` ``[layers, 2, width]``, ``weight``
    ``[layers, 2, width]``, ``bias`` ``[layers, 2]``; the reference takes ``width = hidden / 4``.
    """

    def __init__(
        self, inner: Tensor, inner_bias: Tensor, weight: Tensor, bias: Tensor, *, normalise: bool
    ) -> None:
        super().__init__()
        self.inner = nn.Parameter(inner.float())
        self.inner_bias = nn.Parameter(inner_bias.float())
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.normalise = normalise

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of both sublayers: ``[batch, tokens, hidden] -> [batch, tokens, 2]``."""
        hidden = hidden.float()
        if self.normalise:
            hidden = hidden * inverse_scale(hidden)
        tables = (self.inner, self.inner_bias, self.weight, self.bias)
        inner, inner_bias, weight, bias = (table[layer].to(hidden.device) for table in tables)
        active = torch.relu(hidden @ inner.flatten(0, 1).T + inner_bias.flatten())
        return (active.unflatten(-1, weight.shape) * weight).sum(-1) + bias

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: each.detach().cpu() for name, each in self.named_parameters()}


def build(tensors: dict[str, Tensor], *, normalise: bool) -> LinearRouter | MLPRouter:
    """The router that a fit's tensors describe."""
    if "inner" in tensors:
        return MLPRouter(**tensors, normalise=normalise)
    return LinearRouter(tensors["weight"], tensors["bias"], normalise=normalise)


def flops_per_token(tensors: dict[str, Tensor]) -> float:
    """FLOPs of one block's two routers on one token."""
    inner = tensors["inner"][0].numel() if "inner" in tensors else 0
    return 2.0 * (inner + tensors["weight"][0].numel())


def kaiming(*shape: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform values; the last dimension is the fan-in."""
    bound = math.sqrt(6 / shape[-1])
    return (2 * torch.rand(*shape, generator=generator) - 1) * bound
