"""Many static plans on the same tokens at once: what they share is computed once.

``prefixes`` says who computes what, ``trie_pass`` runs it; here are states and losses of plain
text. Continuations are scored by ``score``, from ``continuations``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyndepth.common.errors import UserError
from dyndepth.continuations import score
from dyndepth.rotary import tables
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
    ids = ids.to(trie.device)
    if mask is None:
        return trie.forward(input_ids=ids).unflatten(0, (trie.schedule.count, -1))
    mask = mask.to(trie.device).long()
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, length in enumerate(mask.sum(1).tolist()):
        alike[tables(trie.model, length)].append(row)
    parts = [_padded(trie, ids[rows], mask[rows]) for rows in alike.values()]
    order = torch.tensor([row for rows in alike.values() for row in rows], device=trie.device)
    return torch.cat(parts, 1)[:, order.argsort()]


def _padded(trie: Trie, ids: Tensor, mask: Tensor) -> Tensor:
    """``_streams`` of rows that are read by the same tables."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    states = trie.forward(input_ids=ids, attention_mask=mask, position_ids=positions)
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
