"""Losses of whole windows without the logits of whole windows.

The blocks run over all tokens at once; the LM head and what follows it over so many positions that
their logits in float32 stay below a limit. These are computed once more in the backward pass, for
beside a small model with a large vocabulary logits and their gradients outweigh everything else.
Where all fit within the limit, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from dyndepth.models.blocks import Decoder

LOGIT_BYTES = 2**28
"""Of float32 logits that are held at a time."""


def final_states(parts: Decoder, ids: Tensor) -> Tensor:
    """What the LM head reads of ``ids`` ``[batch, length]``: ``[batch, length, hidden]``."""
    # A model that is spread over devices ends on another one than it began on.
    return parts.owner(input_ids=ids, use_cache=False).last_hidden_state.to(ids.device)


def next_token_nats(model: nn.Module, ids: Tensor, first: int = 0) -> Tensor:
    """Mean cross-entropy in nats of ``model`` predicting each next token of ``ids``.

    ``ids`` is ``[batch, length]``; predictions made before position ``first`` do not count.
    """
    parts = Decoder.of(model)
    read = parts.readout

    def nats(rows: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(read(rows).float(), wanted, reduction="sum")

    rows = final_states(parts, ids)[:, first:-1].flatten(0, 1)
    wanted = ids[:, first + 1 :].flatten()
    return torch.stack(_in_chunks(parts, nats, rows, wanted)).sum() / len(wanted)


def divergence_of_states(parts: Decoder, dense: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of predictions, each given by its final state.

    ``dense`` and ``found`` are ``[batch, n, hidden]``; only the second gets a gradient. Returns
    ``[batch, n]``.
    """
    read = parts.readout

    def nats(dense: Tensor, found: Tensor) -> Tensor:
        with torch.no_grad():
            expected = read(dense).float().log_softmax(-1)
        got = read(found).float().log_softmax(-1)
        return kl_div(got, expected, reduction="none", log_target=True).sum(-1)

    rows = (dense.flatten(0, 1), found.flatten(0, 1))
    return torch.cat(_in_chunks(parts, nats, *rows)).view(found.shape[:2])


def _in_chunks(parts: Decoder, nats: Callable[..., Tensor], *rows: Tensor) -> list[Tensor]:
    """``nats`` of so many rows at a time as logits may be held of."""
    size = max(1, LOGIT_BYTES // (4 * parts.config.vocab_size))
    if len(rows[0]) <= size:
        return [nats(*rows)]
    # Only where something is dropped must the second computation draw what the first drew.
    random = any(module.training for module in parts.head.modules())
    return [
        checkpoint(nats, *some, use_reentrant=False, preserve_rng_state=random)
        for some in zip(*(each.split(size) for each in rows), strict=True)
    ]
