"""The tokens that one gate selects, and how they are gathered and put back.

One object a mask. How many are selected is the one thing that the host must wait for the device to
know; both masks of a block are asked about together, and the answer is read when it is needed.
Every projection runs on exactly the selected tokens. For the attention product alone the selected
queries of each sequence are laid into padded slots, or, where kernels want shapes that do not vary,
to their places among zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_KEYS_A_PART, _MOST_PARTS = 256, 8
"""In how many parts causal attention of gathered queries is computed."""
UNREAD = -1
"""The count of a selection that nobody needs to know."""


class Counts:
    """How many tokens each of several masks selects in each sequence: asked for, read later.

    ``masks`` is ``[masks, batch, tokens]`` and must not select padding. On CUDA the answer is
    copied by the device itself, behind what it has to do before, while the host goes on.
    """

    def __init__(self, masks: Tensor) -> None:
        self._masks = masks
        self._event = None
        if masks.device.type == "cuda":
            self._counts = masks.sum(-1).to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(masks.device))

    def read(self) -> list[list[int]]:
        """The counts, by mask and sequence."""
        if self._event is not None:
            self._event.synchronize()
            return self._counts.tolist()
        return self._masks.sum(-1).tolist()


@dataclass(eq=False)
class Selection:
    """Selected tokens of a ``[batch, tokens]`` mask, neither none nor all.

    Attributes:
        mask: bool ``[batch, tokens]``.
        count: number of selected tokens; UNREAD where all tokens are computed in any case.
        slots: slots a sequence in the attention product: the largest number selected in any.
    """

    mask: Tensor
    count: int
    slots: int

    @classmethod
    def of(cls, masks: Tensor, counts: Counts, real: int) -> list[Selection | bool]:
        """A selection for each of ``[masks, batch, tokens]``, or True or False where all ``real``
        tokens, which are no padding, or none are selected."""
        each = zip(masks.unbind(0), counts.read(), strict=True)
        return [cls.counted(mask, counted, real) for mask, counted in each]

    @classmethod
    def counted(cls, mask: Tensor, counts: Sequence[int], real: int) -> Selection | bool:
        """As ``of``, for one mask whose counts by sequence are given."""
        count = sum(counts)
        return count > 0 if count in (0, real) else cls(mask, count, max(counts))

    @cached_property
    def index(self) -> Tensor:
        """Selected tokens in the flattened batch, ascending: int64 ``[count]``."""
        flat = self.mask.flatten()
        if flat.device.type == "cpu":
            return flat.nonzero()[:, 0]
        return torch.nonzero_static(flat, size=self.count)[:, 0]  # nonzero would wait again

    @cached_property
    def rest(self) -> Tensor:
        """All others, padding included, in the flattened batch, ascending: int64."""
        flat = ~self.mask.flatten()
        if flat.device.type == "cpu":
            return flat.nonzero()[:, 0]
        return torch.nonzero_static(flat, size=flat.numel() - self.count)[:, 0]

    @cached_property
    def token(self) -> Tensor:
        """Column of each selected token in its sequence: int64 ``[count]``."""
        return self.index if self.mask.shape[0] == 1 else self.index % self.mask.shape[1]

    @cached_property
    def _slot(self) -> Tensor:
        """Position of each selected token among the flattened slots: int64 ``[count]``."""
        row = self.index // self.mask.shape[1]
        counts = self.mask.sum(1)
        first = counts.cumsum(0) - counts
        rank = torch.arange(self.count, device=row.device) - first[row]
        return row * self.slots + rank

    @cached_property
    def slot_token(self) -> Tensor:
        """Column of the token in each slot, 0 in unused ones: int64 ``[batch, slots]``."""
        if self.mask.shape[0] == 1:
            return self.token[None]
        columns = self.index.new_zeros(self.mask.shape[0] * self.slots)
        columns[self._slot] = self.token
        return columns.view(-1, self.slots)

    @cached_property
    def used(self) -> Tensor:
        """Which slots hold a token: bool ``[batch, slots]``."""
        slots = torch.arange(self.slots, device=self.mask.device)
        return slots < self.mask.sum(1, keepdim=True)

    def kept(self, numbers: Tensor) -> Tensor:
        """``[batch, tokens]`` of the selected tokens by slot, -1 in unused ones."""
        return torch.where(self.used, numbers.gather(1, self.slot_token), -1)

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

    def laid(self, rows: Tensor) -> Tensor:
        """``[count, ...]`` of the selected tokens into ``[batch, tokens, ...]``, zero elsewhere."""
        whole = rows.new_zeros(self.mask.numel(), *rows.shape[1:])
        return whole.index_copy_(0, self.index, rows).unflatten(0, self.mask.shape)

    def out_of_slots(self, padded: Tensor) -> Tensor:
        """``[batch, slots, size]`` back into ``[count, size]``."""
        flat = padded.flatten(0, 1)
        return flat if self.mask.shape[0] == 1 else flat.index_select(0, self._slot)

    def parts(self, keys: int) -> list[tuple[slice, int]]:
        """Parts of the slots under a causal mask, each with the number of keys that it may see.

        A causal kernel passes over the keys after a query by itself, under an explicit mask it does
        not, so that many keys are read in parts. On a CPU alone: elsewhere the host would have to
        ask where the parts end.
        """
        count = min(_MOST_PARTS, keys // _KEYS_A_PART)
        if count < 2 or self.mask.shape[0] > 1 or self.mask.device.type != "cpu":
            return [(slice(None), keys)]
        if self.mask.shape[1] != keys:
            return [(slice(None), keys)]  # a single query over a cache
        size = -(-self.count // count)
        stops = range(size, self.count + size, size)
        return [
            (slice(stop - size, stop), int(self.token[min(stop, self.count) - 1]) + 1)
            for stop in stops
        ]

    def put(self, hidden: Tensor, executed: Tensor) -> Tensor:
        """``executed`` for the selected tokens, else ``hidden``; ``[batch, tokens, size]``."""
        return torch.where(self.mask[..., None], executed, hidden)

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
            columns = torch.arange(length, device=keys.device)
            return additive(columns <= self.slot_token[:, None, :, None], keys.dtype)
        rows = self.rows_of(mask[..., :length])
        return additive(rows, keys.dtype) if rows.dtype == torch.bool else rows

    def rows_of(self, mask: Tensor) -> Tensor:
        """Rows of ``[batch or 1, 1, tokens, keys]`` for the slots."""
        if self.mask.shape[0] == 1:
            return mask.index_select(2, self.token)
        expanded = mask[:, 0].expand(self.mask.shape[0], -1, -1)
        index = self.slot_token[..., None].expand(-1, -1, mask.shape[-1])
        return expanded.gather(1, index)[:, None]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, the lowest number elsewhere: a fully masked row stays finite."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)
