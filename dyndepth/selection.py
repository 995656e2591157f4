"""The tokens that one gate selects, and how they are gathered and put back.

One object a mask. The host waits for the device at the ``nonzero`` that lists the selected tokens
and, in batches, where padding and the largest number in a sequence must be known. In a batch the
selected queries of each sequence are laid into padded slots for the attention product alone; every
projection runs on exactly the selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(eq=False)
class Selection:
    """Selected tokens of a ``[batch, tokens]`` mask, neither none nor all.

    Attributes:
        mask: bool ``[batch, tokens]``.
        index: int64 ``[count]``, positions in the flattened batch, ascending.
    """

    mask: Tensor
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor, valid: Tensor | None) -> Selection | bool:
        """A selection, or True or False where all or none of the valid tokens are selected."""
        index = mask.flatten().nonzero()[:, 0]
        if index.numel() == 0:
            return False
        if index.numel() == mask.numel() or (valid is not None and index.numel() == valid.sum()):
            return True
        return cls(mask, index)

    @property
    def count(self) -> int:
        """Number of selected tokens."""
        return self.index.numel()

    @cached_property
    def token(self) -> Tensor:
        """Column of each selected token in its sequence: int64 ``[count]``."""
        return self.index % self.mask.shape[1]

    @cached_property
    def slots(self) -> int:
        """Slots a sequence in the attention product: the largest number selected in any."""
        if self.mask.shape[0] == 1:
            return self.count
        return int(self.mask.sum(1).max())

    @cached_property
    def _slot(self) -> Tensor:
        """Position of each selected token among the flattened slots: int64 ``[count]``."""
        row = self.index // self.mask.shape[1]
        counts = self.mask.sum(1)
        first = counts.cumsum(0) - counts
        rank = torch.arange(self.count, device=row.device) - first[row]
        return row * self.slots + rank

    @cached_property
    def _slot_token(self) -> Tensor:
        """Column of the token in each slot, 0 in unused ones: int64 ``[batch, slots]``."""
        columns = self.index.new_zeros(self.mask.shape[0] * self.slots)
        columns[self._slot] = self.token
        return columns.view(-1, self.slots)

    def gather(self, table: Tensor) -> Tensor:
        """Rows of a ``[batch or 1, tokens, size]`` table for the selected tokens."""
        if table.shape[0] == 1:
            return table[0].index_select(0, self.token)
        return table.flatten(0, 1).index_select(0, self.index)

    def into_slots(self, rows: Tensor) -> Tensor:
        """``[count, ...]`` of the selected tokens into ``[batch, slots, ...]``."""
        if self.mask.shape[0] == 1:
            return rows[None]
        padded = rows.new_zeros(self.mask.shape[0] * self.slots, *rows.shape[1:])
        return padded.index_copy_(0, self._slot, rows).unflatten(0, (-1, self.slots))

    def out_of_slots(self, padded: Tensor) -> Tensor:
        """``[batch, slots, size]`` back into ``[count, size]``."""
        flat = padded.flatten(0, 1)
        return flat if self.mask.shape[0] == 1 else flat.index_select(0, self._slot)

    def mask_rows(self, mask: Tensor | None, keys: Tensor) -> Tensor:
        """Rows of the attention mask for the slots, additive: ``[batch or 1, 1, slots, keys]``.

        ``mask`` is what the stock block was given: None (causal, nothing padded, and either no
        past or a single query), bool or additive ``[batch, 1, tokens, keys]``. ``keys`` is
        ``[batch, heads, keys, size]``.
        """
        length = keys.shape[2]
        if mask is None:
            if self.mask.shape[1] == 1:
                return keys.new_zeros(1, 1, 1, length)
            columns = self.token[None] if self.mask.shape[0] == 1 else self._slot_token
            allowed = torch.arange(length, device=keys.device) <= columns[:, None, :, None]
            return _additive(allowed, keys.dtype)
        mask = mask[..., :length]
        if self.mask.shape[0] == 1:
            rows = mask.index_select(2, self.token)
        else:
            expanded = mask[:, 0].expand(self.mask.shape[0], -1, -1)
            rows = expanded.gather(1, self._slot_token[..., None].expand(-1, -1, length))[:, None]
        return _additive(rows, keys.dtype) if rows.dtype == torch.bool else rows


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, the lowest number elsewhere: a fully masked row stays finite."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)
