"""One block under settled gates: what its two sublayers compute, and for which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dyndepth.method import ATTENTION, MLP
from dyndepth.models.blocks import Ahead, Block
from dyndepth.models.selection import Selection
from dyndepth.runtime.cache import skip_tokens
from dyndepth.runtime.eviction import Eviction
from dyndepth.runtime.flops import Forward
from dyndepth.runtime.gates import Settled
from dyndepth.runtime.limits import Limits

Weights = tuple[Tensor | None, Tensor | None]
"""Factors on attention and MLP, float ``[batch, tokens]``; None: 1."""


@dataclass(frozen=True)
class Executor:
    """Executes blocks.

    Attributes:
        blocks: of the model.
        limits: when selected tokens are gathered.
        masked: the backend that computes everything and multiplies.
        project: keys and values of skipped tokens are kept.
        evict: what executes attentions where skipped tokens are invisible; None: they are not.
        early: see ``asks_early``.
    """

    blocks: Sequence[Block]
    limits: Limits
    masked: bool
    project: bool
    evict: Eviction | None
    early: bool

    def __call__(
        self,
        forward: Forward,
        index: int,
        hidden: Tensor,
        gates: tuple[Settled, Settled],
        arguments: dict[str, Any],
        ahead: Ahead | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """One block, the last call of ``forward``.

        Its gates are not both True, but where ``ahead`` holds the part that its attention does for
        all tokens. ``weights`` are of methods that have some (``updates.Updating``).
        """
        block, entered = self.blocks[index], hidden
        attention, mlp = gates
        branch = self.attention(forward, block, hidden, attention, arguments, ahead)
        if branch is not None:
            hidden = added(hidden, branch, attention, owned=False)
        source = entered if block.parallel else hidden
        branch = self.mlp(forward, block, source, mlp)
        if branch is None:
            return hidden
        return added(hidden, branch, mlp, owned=hidden is not entered)

    def attention(
        self,
        forward: Forward,
        block: Block,
        hidden: Tensor,
        gate: Settled,
        arguments: dict[str, Any],
        ahead: Ahead | None,
    ) -> Tensor | None:
        """The attention branch of all tokens, ``[batch, tokens, hidden]``, or of those selected,
        ``[count, hidden]``; None where nobody executes it. The cache gets its due."""
        if self.evict is not None:
            return self.evict(forward, block, hidden, gate, arguments)
        if isinstance(gate, Selection):
            return self._attend(forward, block, hidden, gate, arguments, ahead)
        if ahead is not None:
            if gate is not True:
                return None
            return block.attention_laid(ahead, None, arguments).view_as(hidden)
        if gate is True or self.masked:
            return block.attention_branch(hidden, arguments)
        kept = len(forward.calls) - 1 in forward.kept
        self._skip_attention(block, kept, hidden, arguments)
        return None

    def mlp(self, forward: Forward, block: Block, source: Tensor, gate: Settled) -> Tensor | None:
        """The MLP branch of ``source``, as in ``attention``."""
        if isinstance(gate, Selection):
            if self.limits.gather(MLP, gate) and block.gathers(MLP):
                return block.mlp_branch(source.flatten(0, 1).index_select(0, gate.index))
            forward.whole.add((len(forward.calls) - 1, MLP))
            return block.mlp_branch(source)
        return block.mlp_branch(source) if gate is True or self.masked else None

    def _attend(
        self,
        forward: Forward,
        block: Block,
        hidden: Tensor,
        selection: Selection,
        arguments: dict[str, Any],
        ahead: Ahead | None,
    ) -> Tensor:
        """``attention`` that the selected tokens execute."""
        can = ahead is not None or block.gathers(ATTENTION)
        if not (can and self.limits.gather(ATTENTION, selection)):
            forward.whole.add((len(forward.calls) - 1, ATTENTION))
            if ahead is None:
                return block.attention_branch(hidden, arguments)
            return block.attention_laid(ahead, None, arguments).view_as(hidden)
        if self.early and ahead is None and block.lays:
            ahead = block.ahead(hidden, arguments)
            forward.laid.add(len(forward.calls) - 1)
        if ahead is None:
            return block.attention_selected(hidden, selection, arguments)
        return block.attention_laid(ahead, selection, arguments)

    def _skip_attention(
        self, block: Block, kept: bool, hidden: Tensor, arguments: dict[str, Any]
    ) -> None:
        """What a wholly skipped attention still owes to the cache; ``kept``: as if projected."""
        cache = arguments.get(block.cache_argument)
        if cache is None:
            return
        if self.project or kept:
            block.keep(hidden, arguments)
        else:
            skip_tokens(cache, block.index, hidden.shape[1])


def added(hidden: Tensor, branch: Tensor, gate: Settled, *, owned: bool) -> Tensor:
    """The stream with the branch of those that execute it: of all tokens or, ``[count, hidden]``,
    of those selected.

    ``owned`` says that ``hidden`` was made in this block, so that it may be written to.
    """
    if not isinstance(gate, Selection):
        return hidden + _multiplied(branch, gate)
    if branch.ndim == hidden.ndim:
        return gate.put(hidden, hidden + branch)
    flat = hidden.flatten(0, 1)
    add = flat.index_add_ if owned else flat.index_add
    return add(0, gate.index, branch.to(flat.dtype)).view_as(hidden)


def _multiplied(branch: Tensor, gate: bool | Tensor) -> Tensor:
    """A computed branch times its gate."""
    if isinstance(gate, bool):
        return branch if gate else branch * 0.0
    return branch * gate.to(branch.dtype)[..., None]
