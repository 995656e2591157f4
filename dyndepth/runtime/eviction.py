"""An attention in which tokens that skip it are invisible, to every token after them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyndepth.method import ATTENTION
from dyndepth.models.blocks import Block
from dyndepth.models.key_columns import Columns
from dyndepth.models.selection import UNREAD, Selection
from dyndepth.runtime.evicting_layer import evicting, evicts
from dyndepth.runtime.flops import Forward
from dyndepth.runtime.gates import Settled
from dyndepth.runtime.limits import Limits


@dataclass(frozen=True)
class Eviction:
    """Executes attentions under the policy ``evict``; see ``Executor`` for its attributes."""

    limits: Limits
    masked: bool

    def __call__(
        self,
        forward: Forward,
        block: Block,
        hidden: Tensor,
        gate: Settled,
        arguments: dict[str, Any],
    ) -> Tensor | None:
        """The attention branch of the last call of ``forward``, as ``Executor.attention``."""
        past, tokens = arguments.get(block.cache_argument), hidden.shape[1]
        if gate is True and not evicts(past, block.index):
            return block.attention_branch(hidden, arguments)
        slot = None if past is None else evicting(past, block.index, forward.attended)
        if gate is False and not self.masked:
            if slot is not None:
                slot.skip(tokens)
            return None
        before = 0 if slot is None else slot.passed
        if isinstance(gate, Selection) and self._gathers(block, gate):
            positions = torch.where(gate.used, gate.slot_token + before, -1)
            plain = _plain(forward, block, slot, arguments)
            # As many slots as tokens are not yet those of the tokens, in every sequence.
            columns = _columns(slot, positions, tokens, None)
            columns = replace(columns, plain=plain, whole=False)
            self._tell(forward, slot, columns)
            return block.attention_among(hidden, gate, columns, arguments)

        executes = _executes(gate, forward, hidden)
        everyone = torch.arange(before, before + tokens, device=hidden.device)
        positions = torch.where(executes, everyone, -1)
        stored = gate if isinstance(gate, Selection) and tokens > 1 else None
        if stored is not None and stored.count == UNREAD:
            stored = None
        columns = _columns(slot, positions, tokens, stored)
        self._tell(forward, slot, columns)
        mask = columns.mask(arguments.get("attention_mask"), everyone[None], hidden.dtype)
        if isinstance(gate, Tensor) and gate.requires_grad:
            # Of a kept token's key, log gate is 0 and moves as the gate does.
            own = mask[..., -tokens:] + (gate - gate.detach()).to(mask.dtype)[:, None, None]
            mask = torch.cat([mask[..., :-tokens], own], -1)
        given = arguments | {"attention_mask": mask}
        if block.bias_argument is not None:
            given[block.bias_argument] = columns.bias(arguments[block.bias_argument])
        if isinstance(gate, Selection):
            forward.whole.add((len(forward.calls) - 1, ATTENTION))
        return block.attention_branch(hidden, given)

    def _gathers(self, block: Block, selection: Selection) -> bool:
        return block.gathers(ATTENTION) and self.limits.among(selection)

    def _tell(self, forward: Forward, slot: Any, columns: Columns) -> None:
        """Tell the ledger how many keys there are, seen and in all."""
        if self.masked:
            return
        seen = (columns.positions >= 0).sum(1) if slot is None else slot.visible(columns)
        forward.evicted[len(forward.calls) - 1] = seen, columns.positions.shape[1]


def _columns(slot: Any, positions: Tensor, tokens: int, stored: Selection | None) -> Columns:
    """Whose keys the attention will see, those of ``positions`` being the new ones."""
    if slot is None:
        return Columns(positions, tokens, whole=positions.shape[1] == tokens)
    return slot.expect(positions, tokens, stored)


def _plain(forward: Forward, block: Block, slot: Any, arguments: dict[str, Any]) -> bool:
    """Whether the tokens of this forward are all that its queries see, up to their own."""
    if block.bias_argument is not None or (slot is not None and slot.positions is not None):
        return False
    if arguments.get("attention_mask") is None:
        return True
    # A mask that hides padding alone, of which nothing is selected.
    near = block.window is None or forward.keys <= block.window
    return forward.attended is not None and near


def _executes(gate: Settled, forward: Forward, hidden: Tensor) -> Tensor:
    """Bool ``[batch, tokens]``: who executes, padding left out."""
    if isinstance(gate, Selection):
        return gate.mask
    if isinstance(gate, bool):
        found = torch.full(hidden.shape[:2], gate, dtype=torch.bool, device=hidden.device)
    else:
        found = gate.detach() > 0.5
    return found if forward.valid is None else found & forward.valid.to(found.device)
