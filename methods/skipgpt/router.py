"""The routers of SkipGPT: one linear map a sublayer on the stream that enters the block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndepth.training import Router


class LinearRouter(Router):
    """Logits ``normalise(h) @ weight + bias`` in float32; execute where not negative.

    ``weight`` is ``[layers, 2, hidden]``, ``bias`` ``[layers, 2]`` (attention, MLP). The paper's
    two logits (execute, skip) decide by their difference, which is this one logit.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, normalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.normalise = normalise

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of both sublayers: ``[batch, tokens, hidden] -> [batch, tokens, 2]``."""
        hidden = hidden.float()
        logits = hidden @ self.weight[layer].T
        if self.normalise:
            # The scale of the stream is one number a token: taken off after the product.
            logits = logits * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return logits + self.bias[layer]
