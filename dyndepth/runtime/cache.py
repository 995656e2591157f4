"""Keeps a Hugging Face cache honest about tokens that a layer never saw.

Lengths and masks of a forward are read from one layer's cache, usually the first. A layer whose
attention was skipped stores nothing, so it must still count; otherwise positions and masks of every
later step are silently wrong.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dyndepth.common.errors import UserError


def skip_tokens(past: Any, layer: int, tokens: int) -> None:
    """Tell the cache that ``layer`` was passed by ``tokens`` tokens without storing them.

    ``past`` is a ``transformers`` Cache. The layer gets a class of its own that counts; sliding
    windows, which count by themselves, are only advanced. Raises UserError for a static cache.
    """
    fill(past, layer + 1)
    slot: Any = past.layers[layer]
    if not hasattr(slot, "skipped"):
        if not isinstance(slot, DynamicLayer):
            raise UserError(
                f"a {type(slot).__name__} of the cache cannot count tokens that it does not store; "
                "use a dynamic cache with methods that keep no keys and values"
            )
        slot.__class__ = _counting(type(slot))
    if hasattr(slot, "cumulative_length"):
        slot.cumulative_length += tokens
    else:
        slot.skipped += tokens


def has_lane(past: Any, layers: int) -> bool:
    """Whether ``past``, the cache of a model of ``layers`` blocks, holds a dense lane."""
    return len(past.layers) > layers


def dense_lane(past: Any, layers: int) -> Any:
    """The cache of a second run over the same tokens, kept inside ``past``; made when absent.

    The lane is the layers of ``past`` from ``layers`` on: the same kinds as the first, so that
    whatever reads, crops, reorders or selects from ``past`` treats both alike. It begins as a copy
    of what ``past`` holds. Raises UserError for a static cache.
    """
    if not has_lane(past, layers):
        fill(past, layers)
        for slot in past.layers:
            if not isinstance(slot, DynamicLayer):
                raise UserError(
                    f"a {type(slot).__name__} of the cache cannot be looked ahead with; use a "
                    "dynamic cache with methods that know the dense model's predictions"
                )
        # Growing a dynamic layer makes new tensors, so that the copies may share the old ones.
        past.layers.extend([copy.copy(slot) for slot in past.layers])
    lane = copy.copy(past)
    lane.layers = past.layers[layers:]
    return lane


def fill(past: Any, layers: int) -> None:
    """Have ``past`` hold ``layers`` layers, if it is of the kind that adds them as they come."""
    while len(past.layers) < layers and past.layer_class_to_replicate is not None:
        past.layers.append(past.layer_class_to_replicate())


@cache
def _counting(stock: Any) -> type:
    """A cache layer class that adds the skipped tokens to its length."""

    class Counting(stock):
        skipped = 0

        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.skipped

        def reset(self) -> None:
            super().reset()
            self.skipped = 0

        def crop(self, tokens_to_remove: int) -> None:
            uncounted = min(self.skipped, abs(tokens_to_remove))
            self.skipped -= uncounted
            if self.is_initialized:
                super().crop(-(abs(tokens_to_remove) - uncounted))
            elif hasattr(self, "cumulative_length"):
                self.cumulative_length -= abs(tokens_to_remove)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.is_initialized:
                super().reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.is_initialized:
                super().batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.is_initialized:
                super().batch_select_indices(indices)

    Counting.__name__ = Counting.__qualname__ = stock.__name__
    return Counting
