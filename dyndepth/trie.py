"""Many static plans on the same tokens at once: what they share is computed once.

``prefixes`` says who computes what, ``trie_pass`` runs it; here are states and losses of plain
text. Continuations are scored by ``score``, from ``continuations``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyndepth.continuations import score
from dyndepth.errors import UserError
from dyndepth.trie_pass import BATCH_TOKENS, Trie

__all__ = ["losses", "score", "streams"]


@torch.no_grad()
def streams(
    model: nn.Module, plans: Tensor, ids: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Final hidden states of every plan, each distinct plan once.

    Args:
        plans: bool ``[plans, layers, 2]``, True = execute; sublayers attention, mlp.
        ids: int64 ``[batch, tokens]``; the whole text runs under the plans.
        mask: ``[batch, tokens]``, int64 or bool, not 0 on real tokens; None: nothing is padded.

    Returns int64 ``[plans]``, which stream each plan ends in, and the streams ``[distinct, batch,
    tokens, hidden]`` after the final norm. Raises UserError for plans of another shape or type, and
    for a model with a method attached.
    """
    trie = Trie(model, plans)
    return torch.tensor(trie.schedule.which), _streams(trie, ids, mask)


@torch.no_grad()
def losses(model: nn.Module, plans: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window under each plan.

    ``plans`` as in ``streams``; ``ids`` int64 ``[batch, tokens]``, at least two tokens. Returns
    float64 ``[plans, batch]`` on the CPU.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise UserError(f"windows must be [batch, tokens] of at least 2 tokens, not {ids.shape}")
    trie = Trie(model, plans)
    rows = max(1, BATCH_TOKENS // (trie.schedule.count * ids.shape[1]))
    found = torch.cat([_losses(trie, part) for part in ids.split(rows)], 1)
    return found[trie.schedule.which]


def _streams(trie: Trie, ids: Tensor, mask: Tensor | None) -> Tensor:
    """``[streams, batch, tokens, hidden]``."""
    arguments: dict[str, Any] = {}
    if mask is not None:
        mask = mask.to(trie.device).long()
        arguments["attention_mask"] = mask
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    states = trie.forward(input_ids=ids.to(trie.device), **arguments)
    return states.unflatten(0, (trie.schedule.count, -1))


def _losses(trie: Trie, ids: Tensor) -> Tensor:
    """float64 ``[streams, batch]`` on the CPU."""
    hidden = _streams(trie, ids, None)[:, :, :-1]
    targets = ids[:, 1:].to(trie.device).expand(trie.schedule.count, -1, -1).flatten()
    found = [
        cross_entropy(logits, wanted, reduction="none")
        for logits, wanted in trie.logits(hidden.flatten(0, 2), targets)
    ]
    return torch.cat(found).cpu().double().view(hidden.shape[:-1]).mean(-1)
