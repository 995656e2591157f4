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
    ) -> Tensor:
        """One block, the last call of ``forward``.

        Its gates are not both True, but where ``ahead`` holds the part that its attention does for
        all tokens.
        """
        block, entered, call = self.blocks[index], hidden, len(forward.calls) - 1
        attention, mlp = gates
        if self.evict is not None:
            hidden = self.evict(forward, block, hidden, attention, arguments)
        elif isinstance(attention, Selection):
            hidden = self._attend(forward, block, hidden, attention, arguments, ahead)
        elif ahead is not None:
            if attention is True:
                branch = block.attention_laid(ahead, None, arguments)
                hidden = hidden + branch.view_as(hidden)
        elif attention is True or self.masked:
            hidden = hidden + _multiplied(block.attention_branch(hidden, arguments), attention)
        else:
            self._skip_attention(block, call in forward.kept, hidden, arguments)
        source = entered if block.parallel else hidden
        if isinstance(mlp, Selection):
            if self.limits.gather(MLP, mlp) and block.gathers(MLP):
                return self._feed(block, source, hidden, mlp, owned=hidden is not entered)
            forward.whole.add((call, MLP))
            return mlp.put(hidden, hidden + block.mlp_branch(source))
        if mlp is True or self.masked:
            return hidden + _multiplied(block.mlp_branch(source), mlp)
        return hidden

    def _attend(
        self,
        forward: Forward,
        block: Block,
        hidden: Tensor,
        selection: Selection,
        arguments: dict[str, Any],
        ahead: Ahead | None,
    ) -> Tensor:
        """The stream after an attention that the selected tokens execute."""
        can = ahead is not None or block.gathers(ATTENTION)
        if not (can and self.limits.gather(ATTENTION, selection)):
            forward.whole.add((len(forward.calls) - 1, ATTENTION))
            if ahead is None:
                branch = block.attention_branch(hidden, arguments)
            else:
                branch = block.attention_laid(ahead, None, arguments).view_as(hidden)
            return selection.put(hidden, hidden + branch)
        if self.early and ahead is None and block.lays:
            ahead = block.ahead(hidden, arguments)
            forward.laid.add(len(forward.calls) - 1)
        if ahead is None:
            update = block.attention_selected(hidden, selection, arguments)
        else:
            update = block.attention_laid(ahead, selection, arguments)
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, selection.index, update.to(flat.dtype)).view_as(hidden)

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

    def _feed(
        self, block: Block, source: Tensor, hidden: Tensor, selection: Selection, *, owned: bool
    ) -> Tensor:
        """The MLP branch of ``source``, added to ``hidden`` for the selected tokens alone.

        ``owned`` says that ``hidden`` was made in this block, so that it may be written to.
        """
        update = block.mlp_branch(source.flatten(0, 1).index_select(0, selection.index))
        flat = hidden.flatten(0, 1)
        add = flat.index_add_ if owned else flat.index_add
        return add(0, selection.index, update.to(flat.dtype)).view_as(hidden)


def _multiplied(branch: Tensor, gate: Settled) -> Tensor:
    """A computed branch times its gate, which is no Selection."""
    assert not isinstance(gate, Selection)
    if isinstance(gate, bool):
        return branch if gate else branch * 0.0
    return branch * gate.to(branch.dtype)[..., None]
