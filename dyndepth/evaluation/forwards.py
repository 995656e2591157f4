"""Forwards of token sequences through an attached model: batches by tokens, padding, masks, caches.

Rounding apart, a result depends on its own tokens alone: padding is masked everywhere and positions
are counted without it. Where a model's rotary tables depend on the longest sequence of a forward
(``dyndepth.models.rotary``), callers put those together that are read by the same.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from dyndepth.models.blocks import decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.memory import join, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BUDGET = {"cpu": 1024}
_LARGE_BUDGET = 16384
_FIXED = 1 / 32
"""A forward's fixed cost, as a part of the budget: what it is worth to pad rather than to split.
On a CPU and a small model it is that of about 32 tokens."""


def budget_of(device: torch.device) -> int:
    """Tokens, padding included, that a forward may hold on ``device``: what keeps it busy."""
    return _BUDGET.get(device.type, _LARGE_BUDGET)


def parts(lengths: Sequence[int], most: int, budget: int) -> Iterator[slice]:
    """Batches of sequences, given their descending lengths, that cost least.

    A batch costs its rows times its longest, and a forward's fixed cost. It holds at most ``most``
    rows and ``budget`` tokens, but for a single sequence that is longer.
    """
    costs, starts = [0.0], [0]
    for stop in range(1, len(lengths) + 1):
        least, best = float("inf"), stop - 1
        for start in range(stop - 1, max(stop - most, 0) - 1, -1):
            tokens = (stop - start) * lengths[start]
            if tokens > budget and stop - start > 1:
                break
            cost = costs[start] + tokens + _FIXED * budget
            if cost < least:
                least, best = cost, start
        costs.append(least)
        starts.append(best)
    found = []
    stop = len(lengths)
    while stop:
        found.append(slice(starts[stop], stop))
        stop = starts[stop]
    yield from reversed(found)


def forward(
    model: PreTrainedModel, inputs: Tensor, mask: Tensor, cache: Any = None, *, keep: bool = True
) -> tuple[Tensor, Any]:
    """Final hidden states ``[batch, tokens, hidden]`` and the cache, None unless ``keep``.

    ``mask`` is int64 ``[batch, past + tokens]``, 1 on real tokens.
    """
    owner = decoder(model)
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": keep}
    if "position_ids" in inspect.signature(owner.forward).parameters:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        arguments["position_ids"] = positions[:, -inputs.shape[1] :]
    arguments[cache_argument(owner)] = cache
    out = owner(input_ids=inputs, **arguments)
    # A model that is spread over devices ends on another one than it began on.
    return out.last_hidden_state.to(inputs.device), cache_of(out) if keep else None


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache that holds the chosen rows, repeated where ``rows`` repeats; ``cache`` is kept."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        keys = getattr(layer, "keys", None)
        layer.batch_select_indices(rows if keys is None else rows.to(keys.device))
    select(chosen, rows)
    return chosen


def joined(masks: Sequence[Tensor], caches: Sequence[Any]) -> tuple[Tensor, Any] | None:
    """Sequences of several batches as one: masks ``[rows, tokens]`` and caches, padded on the left.

    The caches are kept. None for caches that can't be padded: static ones, and those that hold some
    of a layer's tokens only; and where methods keep different kinds of things with them.
    """
    if len(caches) == 1:
        return masks[0], caches[0]
    width = max(mask.shape[1] for mask in masks)
    widest = next(
        cache for mask, cache in zip(masks, caches, strict=True) if mask.shape[1] == width
    )
    whole = copy.copy(widest)
    whole.layers = []
    for number, layer in enumerate(widest.layers):
        layers = [cache.layers[number] for cache in caches]
        held = [getattr(one, "keys", None) is not None for one in layers]
        partly = any(getattr(one, "skipped", 0) for one in layers) and any(held)
        partly = partly or any(hasattr(one, "passed") for one in layers)
        if not isinstance(layer, DynamicLayer) or partly or any(held) != all(held):
            return None
        layer = copy.copy(layer)
        if all(held):
            layer.keys = _stacked([one.keys for one in layers], dim=2)
            layer.values = _stacked([one.values for one in layers], dim=2)
        whole.layers.append(layer)
    if not join(whole, caches, [mask.shape[1] for mask in masks]):
        return None
    return _stacked(masks, dim=1), whole


def _stacked(tensors: Sequence[Any], dim: int) -> Tensor:
    """Rows of tensors that differ in ``dim``, where zeros are put before what there is."""
    size = max(tensor.shape[dim] for tensor in tensors)
    after = [0, 0] * (tensors[0].ndim - dim - 1)
    return torch.cat([pad(tensor, [*after, size - tensor.shape[dim], 0]) for tensor in tensors])


def padded(
    sequences: Sequence[Sequence[int]], side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 ``[batch, longest]``; padding has id 0.

    Raises ValueError for a sequence without a token, whose states would be those of padding.
    """
    if not all(map(len, sequences)):
        raise ValueError("a sequence without a token can't be read")
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at least float32, and likeliest token; ``logits`` is ``[n, vocabulary]``.

    By log_softmax as in lm-eval, though logsumexp is closer to float64: over 50,000 tokens the
    two differ by 1e-5 a token on a CPU, which would show against published scores.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=exact), logits.argmax(-1)
