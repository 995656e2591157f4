"""A tiny Llama written out, one sequence at a time, where some tokens skip some blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decision = tuple[Tensor, Tensor | float]
"""Who runs a block, bool ``[tokens]``, and the weight of their updates, one each or one number."""


def scaled(stream: Tensor) -> Tensor:
    """Each token by its root mean square."""
    return stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def evicting(model, ids: Tensor, decide: Callable[[int, Tensor], Decision]) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` where a block sees those that run it and no others.

    Their sub-sequence goes through the block's own modules, at its real positions.
    ``decide(layer, stream [tokens, hidden])``.
    """
    inner, logits = model.model, []
    for row in ids:
        stream = inner.embed_tokens(row)
        for layer, block in enumerate(inner.layers):
            runs, weight = decide(layer, stream)
            at = runs.nonzero()[:, 0]
            if not len(at):
                continue
            part = stream[at][None]
            weight = weight[at][:, None] if isinstance(weight, Tensor) else weight
            tables = inner.rotary_emb(part, at[None])
            attended = block.self_attn(block.input_layernorm(part), tables, attention_mask=None)[0]
            between = part + weight * attended
            after = between + weight * block.mlp(block.post_attention_layernorm(between))
            stream = stream.clone()
            stream[at] = after[0]
        logits.append(model.lm_head(inner.norm(stream)))
    return torch.stack(logits)
