"""Keys by the positions of their tokens, where not every token has one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.models.selection import Selection, additive


@dataclass(frozen=True, eq=False)
class Columns:
    """Which token each key of an attention is of.

    Attributes:
        positions: columns of the tokens in their sequences, padding counted: int64
            ``[batch, keys]``, -1 for a key that nobody may see.
        total: tokens of a sequence with those of this forward.
        before: tokens of a sequence before those of this forward.
        window: tokens that the attention reaches back, itself included; None: all, or as the mask
            says.
        whole: every token has a key, in order.
        plain: a query sees the keys up to its own and no others are there, so that a causal kernel
            needs no mask.
    """

    positions: Tensor
    total: int
    before: int = 0
    window: int | None = None
    whole: bool = False
    plain: bool = False

    def mask(self, given: Tensor | None, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """The additive mask of these keys: ``[batch, 1 or heads, queries, keys]``.

        ``given`` are the rows of the stock block's mask for the ``queries``, whose positions are
        int64 ``[batch or 1, queries]``: None (causal), bool or additive, ``[batch or 1, 1 or heads,
        queries, last tokens of a sequence]``. What nobody may see gets the lowest number, so that
        a row without any key stays finite.
        """
        seen, own = self.positions >= 0, self.positions[:, None, None]
        if given is None:
            rows = queries[:, None, :, None]
            allowed = seen[:, None, None] & (own <= rows)
            if self.window is not None:
                allowed = allowed & (own > rows - self.window)
            return additive(allowed, dtype)
        if not (self.whole and given.shape[-1] == self.total):
            at = self.positions - (self.total - given.shape[-1])
            seen, at = seen & (at >= 0), at.clamp_min(0)
            if len(at) == 1 and len(given) == 1:
                given = given.index_select(3, at[0])
            else:
                shape = (len(at), *given.shape[1:3])
                given = given.expand(*shape, -1).gather(3, at[:, None, None].expand(*shape, -1))
        seen = seen[:, None, None]
        if given.dtype == torch.bool:
            return additive(given & seen, dtype)
        return given.masked_fill(~seen, torch.finfo(given.dtype).min)

    def among(
        self, selection: Selection, given: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``mask`` for the slots of the selected tokens, of what the stock block is given for all
        of this forward's, with the ``bias`` of their scores."""
        given = None if given is None else selection.rows_of(given)
        mask = self.mask(given, selection.slot_token + self.before, dtype)
        if bias is None:
            return mask
        return mask + self.bias(bias).unflatten(0, (len(self.positions), -1)).to(mask.dtype)

    def bias(self, given: Tensor) -> Tensor:
        """A bias of scores, ``[batch x heads, 1, tokens]``, of these keys."""
        batch, keys = self.positions.shape
        each = given.unflatten(0, (batch, -1))
        at = self.positions.clamp_min(0)[:, None, None].expand(*each.shape[:3], keys)
        return each.gather(3, at).flatten(0, 1)
