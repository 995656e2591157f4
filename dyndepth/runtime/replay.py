"""What a method may try at the place of one token: single blocks, run once more.

A verification is watched block by block. Of the last token that stands, which is the last of the
cache, any block can then be run on other streams, all at once: they are one sequence whose tokens
see the keys of those before that token, and each its own. The cache is read and never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.models.blocks import Block, Decoder
from dyndepth.models.selection import additive
from dyndepth.runtime.flops import Bill, BlockCosts, Forward, Ledger

Run = Callable[[int, Callable[..., Tensor], Tensor, dict[str, Any]], Tensor]
_BY_TOKEN = ("position_embeddings", "position_ids")
"""Arguments of a block that hold something for each token: ``[1, tokens, ...]``, or several."""


class Replay:
    """Watches the verifications of one attached model, for a method that ``reads_states``.

    ``run`` is what each block does, watched or not; ``ledger`` is billed, if there is one. Raises
    UserError for a model whose attention takes no mask of the kind that is needed.

    Attributes:
        reran: blocks that were run once more since the last verification began.
    """

    def __init__(self, parts: Decoder, run: Run, ledger: Ledger | None) -> None:
        kernel = parts.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise UserError(
                "a method that runs blocks again needs masks that attention "
                f"{kernel!r} does not take; load the model with attn_implementation='sdpa'"
            )
        self._blocks, self._run, self._ledger = parts.blocks, run, ledger
        self.reran = 0
        self._watching = False
        self._seen: list[tuple[Tensor, dict[str, Any]]] = []
        self._last: Tensor | None = None
        self._forward: Forward | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a verification of one sequence without padding: what blocks are given is kept
        until ``forget``."""
        self.forget()
        self.reran = 0
        self._watching = True
        try:
            yield
            # Others may follow before it is told what stands: a rule on logits may run the model.
            self._forward = None if self._ledger is None else self._ledger.last
        except BaseException:
            self.forget()
            raise
        finally:
            self._watching = False

    def forget(self) -> None:
        """Let go of what was seen."""
        self._seen, self._last = [], None

    def block(
        self,
        index: int,
        stock: Callable[..., Tensor],
        hidden: Tensor,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The forward of one block: ``run``'s."""
        out = self._run(index, stock, hidden, arguments)
        if self._watching:
            self._seen.append((hidden, arguments))
            self._last = out
        return out

    def at(self, cache: Any, token: int) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
        """``states`` and ``rerun`` of a ``Verified``, for a token of the verification, which is the
        last in ``cache``. States of several devices are on that of the first block."""
        assert self._last is not None
        each = [*(hidden for hidden, _ in self._seen), self._last]
        states = torch.stack([hidden[0, token].to(each[0].device) for hidden in each])
        return states, partial(self._rerun, cache, token)

    def _rerun(self, cache: Any, token: int, layer: int, rows: Tensor) -> Tensor:
        if not self._seen:
            raise MethodFault("rerun holds until `verified` returns, and was called after that")
        hidden, arguments = self._seen[layer]
        if rows.ndim != 2 or rows.shape[1] != hidden.shape[2]:
            raise MethodFault(
                f"rerun takes rows [n, {hidden.shape[2]}], here {list(rows.shape)} were given"
            )
        block, before = self._blocks[layer], int(cache.get_seq_length()) - 1
        device, rows = rows.device, rows[None].to(hidden)
        given = _at(block, arguments, cache.layers[block.index], token, before, rows)
        if self._ledger is not None:
            self._bill(self._ledger.costs, layer, token, rows.shape[1], before)
        self.reran += 1
        return block.states(rows, given)[1][0].to(device)

    def _bill(self, costs: BlockCosts, layer: int, token: int, count: int, before: int) -> None:
        """To the token in whose place it was."""
        last = self._forward
        assert last is not None
        each = costs.projections + costs.mlp + costs.score * (before + count)
        place = torch.zeros(last.batch, last.width, dtype=torch.bool)
        place[:, token] = True
        last.bills.append(Bill("draft", float(each[layer]) * count, place))


def _at(
    block: Block, arguments: dict[str, Any], slot: Any, token: int, before: int, rows: Tensor
) -> dict[str, Any]:
    """What a block is given for ``rows`` ``[1, n, hidden]`` in the place of ``token``, with
    ``before`` tokens before it in the cache's layer ``slot``."""
    count = rows.shape[1]

    def repeated(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(repeated, given))
        return given[:, token : token + 1].expand(-1, count, *given.shape[2:])

    changed: dict[str, Any] = {block.cache_argument: _Over(slot, before)}
    for name in _BY_TOKEN:
        if arguments.get(name) is not None:
            changed[name] = repeated(arguments[name])
    mask = arguments.get("attention_mask")
    if mask is None:  # all is seen
        mask = rows.new_ones(1, 1, token + 1, before + 1, dtype=torch.bool)
    seen = mask[:, :, token : token + 1, :before].expand(-1, -1, count, -1)
    own = torch.eye(count, dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        own = additive(own, mask.dtype)
    changed["attention_mask"] = torch.cat((seen, own[None, None]), -1)
    if block.bias_argument is not None:
        bias = arguments[block.bias_argument]
        own = bias[..., before : before + 1].expand(-1, -1, count)
        changed[block.bias_argument] = torch.cat((bias[..., :before], own), -1)
    return arguments | changed


class _Over:
    """In the place of a cache: the first tokens of one of its layers, and nothing is kept."""

    def __init__(self, slot: Any, before: int) -> None:
        self._slot, self._before = slot, before

    def update(
        self, keys: Tensor, values: Tensor, *given: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values with those before them, ``[1, heads, tokens, head size]``."""
        past = (self._slot.keys, self._slot.values)
        first, second = (each[:, :, : self._before].to(keys.device) for each in past)
        return torch.cat((first, keys), 2), torch.cat((second, values), 2)
