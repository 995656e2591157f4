"""One forward of a model over all streams of a schedule (``prefix_trie``).

All streams that a sublayer runs for are computed together, in calls of a size that suits the
caches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import Block, Decoder
from dyndepth.models.rotary import forget, tables
from dyndepth.models.selection import Selection
from dyndepth.models.watching import watched
from dyndepth.runtime.attach import attached
from dyndepth.runtime.patching import run_by
from dyndepth.runtime.prefix_trie import Moves, Schedule, Step

BATCH_TOKENS = 2**15
"""Tokens times distinct plans that a batch holds: 72 MiB of states 576 wide in float32."""
_CALL_TOKENS = 2048
"""Tokens that one call of a sublayer computes, about, on a CPU."""
_LOGITS = 2**23
"""Logits held at a time: 32 MiB in float32."""

Override = Callable[[Block], dict[str, Any]]
"""Arguments of a block in place of the decoder's."""


class Trie:
    """Plans on one model.

    ``plans`` is bool ``[plans, layers, 2]``; for ``narrows`` see ``Schedule``. Raises UserError for
    plans of another shape or type, and for a model whose blocks cannot be run by others.
    """

    def __init__(self, model: nn.Module, plans: Tensor, *, narrows: bool = False) -> None:
        self.model = model
        self.parts = _parts(model)
        self.schedule = Schedule(_checked(plans, len(self.parts.layers)), narrows)
        self.device = next(model.parameters()).device

    def forward(
        self, *, read: Tensor | None = None, override: Override | None = None, **arguments: Any
    ) -> Tensor:
        """States after the final norm, of the decoder's forward with ``arguments``.

        ``read`` is bool ``[batch, tokens]``, the positions that are wanted of each stream. All rows
        must be read by the same rotary tables. Returns
        ``[streams, read, hidden]``, or for None ``[streams x batch, tokens, hidden]``.
        """
        forget(self.model)
        work = _Pass(self.parts.blocks, self.schedule, read, override)
        with run_by(self.parts.blocks, work.run):
            self.parts.owner(use_cache=False, **arguments)
        return self.parts.norm(work.ended()).to(self.device)

    def logits(self, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits, at least float32, and their targets, in parts.

        ``states`` is ``[n, hidden]``, ``targets`` ``[n, ...]``.
        """
        vocabulary = self.parts.head.weight.shape[0]
        read, most = self.parts.readout, max(1, _LOGITS // vocabulary)
        for part, wanted in zip(states.split(most), targets.split(most), strict=True):
            logits = read(part)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted


def _parts(model: nn.Module) -> Decoder:
    """The model's parts; UserError for a model whose blocks cannot be run by others."""
    if attached(model):
        raise UserError("plans can't run together while a method is attached; leave that attach")
    parts = Decoder.of(model)
    implementation = parts.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UserError(
            f"plans run together with the attention 'sdpa' or 'eager', not {implementation!r}"
        )
    for index, block in enumerate(parts.blocks):
        if watched(block.attention):
            raise UserError(
                f"plans can't run together past a hook: the attention of block {index} has one, or "
                "a forward of its own; remove it"
            )
    return parts


def _checked(plans: Tensor, layers: int) -> Any:
    """The plans as nested lists."""
    if plans.dtype != torch.bool or plans.ndim != 3 or plans.shape[1:] != (layers, 2):
        raise UserError(
            f"plans must be bool [plans, {layers}, 2] for this model, not {plans.dtype} "
            f"{list(plans.shape)}"
        )
    if not len(plans):
        raise UserError("no plans were given; at least one is needed")
    return plans.tolist()


class _Pass:
    """The blocks' work in one forward of the decoder; arguments as in ``Trie.forward``.

    What the blocks return to the decoder is not looked at. The states are kept here: ``wide`` is
    ``[places, batch, tokens, hidden]``, ``narrow`` ``[places, read, hidden]``.
    """

    def __init__(
        self,
        split: Sequence[Block],
        schedule: Schedule,
        read: Tensor | None,
        override: Override | None,
    ) -> None:
        self.split, self.schedule, self.read = split, schedule, read
        self.override = override
        self.wide: Tensor
        self.narrow: Tensor
        self.places: Tensor  # of what is read, in the flattened batch

    def run(self, index: int, stock: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One block for all streams; see ``patching.run_by``."""
        if index == 0:
            self._begin(hidden)
        self._follow(hidden.device)
        block = self.split[index]
        if self.override is not None:
            arguments = arguments | send_to_device(self.override(block), hidden.device)
        attention, mlp = self.schedule.steps[index]
        before = self.wide.clone() if block.parallel else None
        self._narrow_down(attention.narrowed)
        self._attend_last(block, attention.last, arguments)
        self._attend(block, attention.wide, arguments)
        self._narrow_down(mlp.narrowed)
        wide, narrow = self.wide, self.narrow
        if before is not None:
            wide, narrow = self._entered(before, attention, mlp)
        self._feed(block, self.wide, mlp.wide, wide)
        self._feed(block, self.narrow, mlp.narrow, narrow)
        return hidden

    def _begin(self, hidden: Tensor) -> None:
        self.wide = hidden.new_empty(self.schedule.wide.count, *hidden.shape)
        self.wide[0] = hidden
        if self.read is not None:
            self.places = self.read.flatten().nonzero()[:, 0]
        rows = len(self.places) if self.schedule.narrows else 0
        self.narrow = hidden.new_empty(self.schedule.narrow.count, rows, hidden.shape[-1])

    def _follow(self, device: torch.device) -> None:
        """Take everything to the block's device: a model may be spread over several."""
        self.wide, self.narrow = self.wide.to(device), self.narrow.to(device)
        if self.read is not None:
            self.read, self.places = self.read.to(device), self.places.to(device)

    def ended(self) -> Tensor:
        """The streams after the last block."""
        ends = torch.tensor(self.schedule.ends, device=self.wide.device)
        if self.schedule.narrows:
            return self.narrow.index_select(0, ends)
        if self.read is not None:
            return self.wide.flatten(1, 2)[ends[:, None], self.places]
        return self.wide.index_select(0, ends).flatten(0, 1)

    def _parts(self, moves: Moves, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Sources and targets of as many streams of ``tokens`` as one call computes."""
        device, count = self.wide.device, len(moves.sources)
        most = max(1, _CALL_TOKENS // tokens if device.type == "cpu" else count)
        for start in range(0, count, most):
            part = slice(start, start + most)
            yield (
                torch.tensor(moves.sources[part], device=device),
                torch.tensor(moves.targets[part], device=device),
            )

    def _narrow_down(self, moves: Moves) -> None:
        for source, target in zip(moves.sources, moves.targets, strict=True):
            self.narrow[target] = self.wide[source].flatten(0, 1).index_select(0, self.places)

    def _attend(self, block: Block, moves: Moves, arguments: dict[str, Any]) -> None:
        _, rows, tokens, _ = self.wide.shape
        for sources, targets in self._parts(moves, rows * tokens):
            hidden = self.wide.index_select(0, sources)
            flat = hidden.flatten(0, 1)
            flat += block.attention_branch(flat, _given(block, arguments, rows, len(sources)))
            self.wide.index_copy_(0, targets, hidden)

    def _feed(self, block: Block, store: Tensor, moves: Moves, read: Tensor) -> None:
        """The MLP of streams in ``store``; what it reads of them lies in ``read``."""
        if not moves.sources:
            return
        for sources, targets in self._parts(moves, store[0].shape[:-1].numel()):
            hidden = store.index_select(0, sources)
            flat = hidden.flatten(0, -2)
            flat += block.mlp_branch(
                flat if read is store else read.index_select(0, sources).flatten(0, -2)
            )
            store.index_copy_(0, targets, hidden)

    def _entered(self, before: Tensor, attention: Step, mlp: Step) -> tuple[Tensor, Tensor]:
        """Of every place in both stores, the state with which its stream entered the block, where
        both branches read that; ``before`` is the wide store then."""
        origin = list(range(len(before)))
        for source, target in zip(attention.wide.sources, attention.wide.targets, strict=True):
            origin[target] = source
        narrow = self.narrow.clone()
        for moves in (attention.last, mlp.narrowed):
            for source, target in zip(moves.sources, moves.targets, strict=True):
                came = source if moves is attention.last else origin[source]
                narrow[target] = before[came].flatten(0, 1).index_select(0, self.places)
        return before[origin], narrow

    def _attend_last(self, block: Block, moves: Moves, arguments: dict[str, Any]) -> None:
        """Attention of the positions that are read, over keys and values of all."""
        _, rows, tokens, size = self.wide.shape
        for sources, targets in self._parts(moves, rows * tokens):
            assert self.read is not None
            count = len(sources)
            slots = int(self.read.sum(1).max())
            selection = Selection(self.read.repeat(count, 1), count * len(self.places), slots)
            hidden = self.wide.index_select(0, sources).flatten(0, 1)
            given = _given(block, arguments, rows, count)
            update = block.attention_selected(hidden, selection, given)
            update += hidden.flatten(0, 1).index_select(0, selection.index)
            self.narrow.index_copy_(0, targets, update.view(count, -1, size))


def _given(block: Block, arguments: dict[str, Any], rows: int, times: int) -> dict[str, Any]:
    """A block's arguments for ``times`` streams of ``rows`` sequences each."""
    given = _repeated(arguments, rows, times)
    if block.bias_argument is not None:  # a row a head, of each sequence
        bias = arguments[block.bias_argument]
        given = given | {block.bias_argument: bias.repeat(times, 1, 1)}
    return given


def _repeated(value: Any, rows: int, times: int) -> Any:
    """A block's arguments for ``times`` streams: tensors of ``rows`` sequences are repeated.

    Those that all sequences share, with a first dimension of 1, stay as they are.
    """
    if rows == 1 or times == 1:
        return value
    if isinstance(value, dict):
        return {name: _repeated(one, rows, times) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeated(one, rows, times) for one in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


@torch.no_grad()
def streams(
    model: nn.Module, plans: Tensor, ids: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Final hidden states of every plan, each distinct plan once.

    Args:
        plans: bool ``[plans, layers, 2]``, True = execute; sublayers attention, mlp.
        ids: int64 ``[batch, tokens]``; the whole text runs under the plans.
        mask: ``[batch, tokens]``, int64 or bool, not 0 on real tokens; None: nothing is padded.

    Returns int64 ``[plans]``, which stream each plan ends in, and the streams ``[distinct, batch,
    tokens, hidden]`` after the final norm. Raises UserError for plans of another shape or type, and
    for a model with a method attached.
    """
    trie = Trie(model, plans)
    return torch.tensor(trie.schedule.which), _streams(trie, ids, mask)


@torch.no_grad()
def losses(model: nn.Module, plans: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window under each plan.

    ``plans`` as in ``streams``; ``ids`` int64 ``[batch, tokens]``, at least two tokens. Returns
    float64 ``[plans, batch]`` on the CPU.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise UserError(f"windows must be [batch, tokens] of at least 2 tokens, not {ids.shape}")
    trie = Trie(model, plans)
    rows = max(1, BATCH_TOKENS // (trie.schedule.count * ids.shape[1]))
    found = torch.cat([_losses(trie, part) for part in ids.split(rows)], 1)
    return found[trie.schedule.which]


def _streams(trie: Trie, ids: Tensor, mask: Tensor | None) -> Tensor:
    """``[streams, batch, tokens, hidden]``."""
    ids = ids.to(trie.device)
    if mask is None:
        return trie.forward(input_ids=ids).unflatten(0, (trie.schedule.count, -1))
    mask = mask.to(trie.device).long()
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, length in enumerate(mask.sum(1).tolist()):
        alike[tables(trie.model, length)].append(row)
    parts = [_padded(trie, ids[rows], mask[rows]) for rows in alike.values()]
    order = torch.tensor([row for rows in alike.values() for row in rows], device=trie.device)
    return torch.cat(parts, 1)[:, order.argsort()]


def _padded(trie: Trie, ids: Tensor, mask: Tensor) -> Tensor:
    """``_streams`` of rows that are read by the same tables."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    states = trie.forward(input_ids=ids, attention_mask=mask, position_ids=positions)
    return states.unflatten(0, (trie.schedule.count, -1))


def _losses(trie: Trie, ids: Tensor) -> Tensor:
    """float64 ``[streams, batch]`` on the CPU."""
    hidden = _streams(trie, ids, None)[:, :, :-1]
    targets = ids[:, 1:].to(trie.device).expand(trie.schedule.count, -1, -1).flatten()
    found = [
        cross_entropy(logits, wanted, reduction="none")
        for logits, wanted in trie.logits(hidden.flatten(0, 2), targets)
    ]
    return torch.cat(found).cpu().double().view(hidden.shape[:-1]).mean(-1)
