"""A cache layer that holds some tokens' keys and values, and knows whose they are.

A token that skipped the attention has none there. Lengths and masks count it all the same; who
reads the keys goes by their positions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dyndepth.common.errors import UserError
from dyndepth.models.key_columns import Columns
from dyndepth.models.selection import Selection
from dyndepth.runtime.cache import fill

_LEAST = 64
"""Keys below which gaps are left as they are."""
_KINDS = (DynamicLayer.update, DynamicSlidingWindowLayer.update)


def evicts(past: Any, layer: int) -> bool:
    """Whether ``layer`` of a cache lacks tokens, or has been told of some that it shall lack."""
    return past is not None and layer < len(past.layers) and hasattr(past.layers[layer], "passed")


def evicting(past: Any, layer: int, attended: Tensor | None) -> Any:
    """``layer`` of the cache ``past``, given a class of its own where it has none yet.

    ``attended`` is bool ``[batch, tokens]``, False on padding, of the cache's tokens at least; None
    where nothing is padded. Raises UserError for a layer that is not dynamic, or is quantised.
    """
    fill(past, layer + 1)
    slot: Any = past.layers[layer]
    if hasattr(slot, "passed"):
        return slot
    kind: Any = type(slot)
    if getattr(kind, "update", None) not in _KINDS or bool(getattr(slot, "skipped", 0)):
        raise UserError(
            f"a {type(slot).__name__} of the cache cannot leave single tokens out; use a dynamic "
            "cache with methods that evict"
        )
    total = slot.get_seq_length()
    held = slot.keys.shape[2] if slot.is_initialized else 0
    slot.__class__ = _evicting(kind)
    slot.passed = total
    if held:
        device = slot.keys.device
        positions = torch.arange(total, device=device).expand(slot.keys.shape[0], -1)
        if attended is not None:
            real = attended[:, :total].to(device)
            positions = torch.where(real, positions, -1)
        gone, slot.positions = positions[:, : total - held], positions[:, total - held :]
        slot.gone = (gone >= 0).sum(1)
    return slot


@cache
def _evicting(stock: Any) -> type:
    """The class of a layer of the class ``stock`` that evicts."""

    class Evicting(stock):
        """See the module.

        Attributes:
            passed: tokens that came by.
            positions: of the keys, as ``Columns`` has them; None while there is none.
            gone: keys of each sequence that a sliding window left behind: int64 ``[batch]``.
        """

        keys: Tensor
        values: Tensor
        passed = 0
        positions: Tensor | None = None
        gone: Tensor | int = 0
        _full = _LEAST
        _coming: tuple[Tensor, int, Selection | None] | None = None

        @property
        def _window(self) -> int | None:
            return self.sliding_window if self.is_sliding else None

        def expect(self, positions: Tensor, tokens: int, stored: Selection | None) -> Columns:
            """Before an ``update``: its keys are of ``positions``, ``[batch, keys]``, of the next
            ``tokens``; of those tokens, ``stored`` are kept, if the keys are of all.

            Returns whose keys ``update`` will return.
            """
            self._coming = positions, tokens, stored
            whole = self.positions is None and positions.shape[1] == tokens and not self.passed
            if self.positions is not None:
                positions = torch.cat([self.positions, positions], 1)
            return Columns(positions, self.passed + tokens, self.passed, self._window, whole)

        def skip(self, tokens: int) -> None:
            """So many tokens come by, none of which is kept."""
            self.passed += tokens
            self._count()

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            tokens = keys.shape[2]
            if self._coming is None:
                new = torch.arange(self.passed, self.passed + tokens, device=keys.device)
                self._coming = new.expand(len(keys), -1), tokens, None
            (new, tokens, stored), self._coming = self._coming, None
            self.passed += tokens
            before: tuple[Tensor, Tensor] = self.keys, self.values
            found = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
            self.keys, self.values = found
            if stored is not None:
                of_stored = [_compact(stored, each) for each in (keys, values)]
                self.keys, self.values = (
                    torch.cat([old, each], 2) for old, each in zip(before, of_stored, strict=True)
                )
                new = stored.kept(new)
            old = self.positions
            self.positions = new if old is None else torch.cat([old, new], 1)
            if self.is_sliding and not self.record_past:
                self._slide()
            elif self.positions.shape[1] >= self._full and len(keys) > 1:
                self._pack()
            self._count()
            return found

        def visible(self, columns: Columns) -> Tensor:
            """How many tokens of each sequence have a key, with those of the ``columns``."""
            return (columns.positions >= 0).sum(1) + self.gone

        def get_seq_length(self) -> int:
            return self.passed

        def reset(self) -> None:
            super().reset()
            self.passed, self.positions, self.gone, self._coming = 0, None, 0, None
            self._full = _LEAST

        def crop(self, tokens_to_remove: int) -> None:
            full = self.is_sliding and self.passed >= self.sliding_window
            if tokens_to_remove > 0 or (full and not self.record_past):
                super().crop(tokens_to_remove)  # which says why not
            self.passed = max(self.passed + tokens_to_remove, 0)
            self._count()
            if self.positions is None:
                return
            self.positions = self.positions.masked_fill(self.positions >= self.passed, -1)
            empty = (self.positions < 0).all(0).flip(0)
            self._hold(slice(0, len(empty) - int(empty.long().cumprod(0).sum())))
            if full:
                self._slide()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.positions is not None:
                self._rows(lambda each: each.index_select(0, beam_idx.to(each.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.positions is not None:
                self._rows(lambda each: each.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.positions is not None:
                self._rows(lambda each: each[indices.to(each.device)])

        def _rows(self, of: Any) -> None:
            self.keys, self.values = of(self.keys), of(self.values)
            self.positions = of(self.positions)
            self.gone = of(self.gone) if isinstance(self.gone, Tensor) else self.gone

        def _hold(self, columns: slice) -> None:
            assert self.positions is not None
            self.positions = self.positions[:, columns]
            self.keys, self.values = self.keys[:, :, columns], self.values[:, :, columns]

        def _slide(self) -> None:
            """Let go of the first keys, which no later token reaches."""
            assert self.positions is not None
            if self.positions.shape[1] < self.sliding_window:
                return
            out = self.positions <= self.passed - self.sliding_window
            left = int(out.all(0).long().cumprod(0).sum())
            self.gone = (self.positions[:, :left] >= 0).sum(1) + self.gone
            self._hold(slice(left, None))

        def _pack(self) -> None:
            """Close the gaps that rows have where others have keys, once they may be many."""
            assert self.positions is not None
            used = self.positions >= 0
            most = int(used.sum(1).max())
            if most < 0.8 * used.shape[1]:
                order = used.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
                self.positions = self.positions.gather(1, order)
                self.keys, self.values = (
                    each.gather(
                        2, order[:, None, :, None].expand(*each.shape[:2], -1, each.shape[3])
                    )
                    for each in (self.keys, self.values)
                )
            self._full = max(_LEAST, most + most // 4)

        def _count(self) -> None:
            if self.is_sliding:
                self.cumulative_length = self.passed

    Evicting.__name__ = Evicting.__qualname__ = stock.__name__
    return Evicting


def _compact(selection: Selection, states: Tensor) -> Tensor:
    """Keys or values ``[batch, heads, tokens, size]`` of the selected tokens, by slot."""
    rows = states.transpose(1, 2).flatten(0, 1).index_select(0, selection.index)
    return selection.into_slots(rows).transpose(1, 2)
