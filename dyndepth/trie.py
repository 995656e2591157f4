"""Many static plans on the same tokens at once: what they share is computed once.

Skipping a sublayer is the identity, so two plans have the same hidden states, and are one *stream*,
for as long as they executed the same sublayers. The streams form a trie of executed prefixes. It is
walked layer by layer: at each sublayer the plans of a stream that execute it go on in a computed
stream, the others keep the old one, and all streams that a sublayer runs for are computed together,
in calls of a size that suits the caches.

Continuations are scored in one row a document: its context, then one continuation after the other,
under a mask in which a continuation sees the context and itself. From a stream's last attention on,
only the positions that are scored go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyndepth.blocks import Block, blocks, cache_argument, causal_lm, decoder
from dyndepth.errors import UserError
from dyndepth.method import ATTENTION, MLP
from dyndepth.runtime import _MARK, run_by
from dyndepth.scoring import Group
from dyndepth.selection import Selection

Scored = tuple[Tensor, Tensor]
"""Of one continuation: log-probabilities float64 ``[plans, tokens]`` and whether each token is the
likeliest, bool ``[plans, tokens]``; both on the CPU."""

_BATCH_TOKENS = 2**15
"""Tokens times distinct plans that a batch holds: 72 MiB of states 576 wide in float32."""
_CALL_TOKENS = 2048
"""Tokens that one call of a sublayer computes, about, on a CPU."""
_LOGITS = 2**23
"""Logits held at a time: 32 MiB in float32."""
_PADDING = 0.125
"""Padding that a batch may hold as a share of its tokens."""


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
    split = _split(model)
    schedule = _Schedule(_checked(plans, len(split)), narrows=False)
    return schedule.which, _text_streams(model, split, schedule, ids, mask)


@torch.no_grad()
def losses(model: nn.Module, plans: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window under each plan.

    ``plans`` as in ``streams``; ``ids`` int64 ``[batch, tokens]``, at least two tokens. Returns
    float64 ``[plans, batch]`` on the CPU.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise UserError(f"windows must be [batch, tokens] of at least 2 tokens, not {ids.shape}")
    split = _split(model)
    schedule = _Schedule(_checked(plans, len(split)), narrows=False)
    rows = max(1, _BATCH_TOKENS // (schedule.count * ids.shape[1]))
    found = [_window_losses(model, split, schedule, part) for part in ids.split(rows)]
    return torch.cat(found, 1)[schedule.which]


@torch.no_grad()
def score(
    model: nn.Module,
    plans: Tensor,
    groups: Sequence[Group],
    *,
    phases: Literal["both", "generation"] = "both",
    batch_tokens: int = _BATCH_TOKENS,
) -> Iterator[tuple[int, list[Scored]]]:
    """Log-probability of every token of every continuation under every plan.

    The numbers are those of ``scoring.score`` with each plan attached alone. Under ``phases``
    "generation" contexts run at full depth, once for all plans, and only the continuations run
    under the plans. ``plans`` as in ``streams``; ``batch_tokens`` bounds the tokens of a batch
    times the number of distinct plans, but for a single document that is longer. Yields (index of
    the group, one pair a continuation) as batches are done, longest first.
    """
    if phases not in ("both", "generation"):
        raise UserError(f"phases must be 'both' or 'generation', not {phases!r}")
    split = _split(model)
    schedule = _Schedule(_checked(plans, len(split)), narrows=phases == "both")
    score_batch = _score_whole if phases == "both" else _score_after_dense
    sizes = [_size(group, schedule.count, phases) for group in groups]
    for chosen in _batches(sizes, batch_tokens):
        batch = [groups[index] for index in chosen]
        yield from zip(chosen, score_batch(model, split, schedule, batch), strict=True)


# --- what is asked ------------------------------------------------------------------------------


def _split(model: nn.Module) -> list[Block]:
    """The model's blocks; UserError for a model whose blocks cannot be run by others."""
    if hasattr(decoder(model), _MARK):
        raise UserError("plans can't run together while a method is attached; leave that attach")
    split = blocks(model)
    for block in split:
        if "forward" in vars(block.layer):
            raise UserError(
                f"block {block.index} has a forward of its own (an accelerate hook?), which hides "
                "the plans; remove it, or load the model on one device"
            )
    implementation = causal_lm(model).config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UserError(
            f"plans run together with the attention 'sdpa' or 'eager', not {implementation!r}"
        )
    return split


def _checked(plans: Tensor, layers: int) -> list[Any]:
    """The plans as nested lists."""
    if plans.dtype != torch.bool or plans.ndim != 3 or plans.shape[1:] != (layers, 2):
        raise UserError(
            f"plans must be bool [plans, {layers}, 2] for this model, not {plans.dtype} "
            f"{list(plans.shape)}"
        )
    if not len(plans):
        raise UserError("no plans were given; at least one is needed")
    return plans.tolist()


# --- who computes what --------------------------------------------------------------------------


@dataclass
class _Places:
    """Places of one store of streams; a place that is given up is taken again."""

    count: int = 0
    spare: list[int] = field(default_factory=list)

    def take(self) -> int:
        if self.spare:
            return self.spare.pop()
        self.count += 1
        return self.count - 1


@dataclass
class _Moves:
    """Streams that one operation reads at ``sources`` and puts at ``targets``."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, source: int, target: int) -> None:
        self.sources.append(source)
        self.targets.append(target)


@dataclass
class _Step:
    """What one sublayer does, in this order.

    Attributes:
        narrowed: wide streams that no longer need all positions: copied, not computed.
        last: wide streams for which it is the last attention; what it puts is narrow.
        wide, narrow: streams that it computes at all their positions.
    """

    narrowed: _Moves = field(default_factory=_Moves)
    last: _Moves = field(default_factory=_Moves)
    wide: _Moves = field(default_factory=_Moves)
    narrow: _Moves = field(default_factory=_Moves)


@dataclass(frozen=True)
class _Stream:
    plans: list[int]
    place: int
    narrow: bool


class _Schedule:
    """Which streams each sublayer runs for, given the plans, and where they are kept.

    A stream is *wide*, all positions, until no plan in it has an attention to come, and from then
    on, if ``narrows``, *narrow*: only the positions that are read.

    Attributes:
        steps: one pair of steps a layer, attention and MLP.
        wide, narrow: places in the two stores.
        ends: place of each stream in the end, all narrow or all wide.
        which: stream that each plan ends in, int64 ``[plans]``.
        count: number of streams in the end.
    """

    def __init__(self, plans: list[Any], narrows: bool) -> None:
        self.plans = plans
        self.narrows = narrows
        self.wide, self.narrow = _Places(), _Places()
        self._last = [
            max((layer for layer, gates in enumerate(plan) if gates[ATTENTION]), default=-1)
            for plan in plans
        ]
        now = [_Stream(list(range(len(plans))), self.wide.take(), narrow=False)]
        self.steps: list[tuple[_Step, _Step]] = []
        for layer in range(len(plans[0])):
            now, attention = self._advance(layer, ATTENTION, now)
            now, mlp = self._advance(layer, MLP, now)
            self.steps.append((attention, mlp))
        self.ends = [stream.place for stream in now]
        self.count = len(now)
        self.which = torch.empty(len(plans), dtype=torch.long)
        for number, stream in enumerate(now):
            self.which[stream.plans] = number

    def _advance(
        self, layer: int, sublayer: int, now: list[_Stream]
    ) -> tuple[list[_Stream], _Step]:
        """The streams after one sublayer, and what it does."""
        step, after, left = _Step(), [], []
        for stream in now:
            gates = {plan: self.plans[plan][layer][sublayer] for plan in stream.plans}
            rest = [plan for plan, gate in gates.items() if not gate]
            run = [plan for plan, gate in gates.items() if gate]
            kept = bool(rest)  # whether somebody still needs the stream where it is
            if rest and not stream.narrow and self._narrows(rest, layer):
                kept = False
                after.append(_Stream(rest, self.narrow.take(), narrow=True))
                step.narrowed.add(stream.place, after[-1].place)
            elif rest:
                after.append(_Stream(rest, stream.place, stream.narrow))
            if run and not stream.narrow and self._narrows(run, layer):
                place = self.narrow.take()
                after.append(_Stream(run, place, narrow=True))
                if sublayer == ATTENTION:
                    step.last.add(stream.place, place)
                else:
                    step.narrowed.add(stream.place, place)
                    step.narrow.add(place, place)
            elif run:
                places, moves = (
                    (self.narrow, step.narrow) if stream.narrow else (self.wide, step.wide)
                )
                place = places.take() if kept else stream.place
                kept = True
                after.append(_Stream(run, place, stream.narrow))
                moves.add(stream.place, place)
            if not kept:
                left.append(stream.place)
        self.wide.spare += left  # only now: the step may still read them
        return after, step

    def _narrows(self, plans: list[int], layer: int) -> bool:
        """Whether none of the plans has an attention after ``layer``."""
        return self.narrows and all(self._last[plan] <= layer for plan in plans)


# --- the pass over the trie ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """Keys and values ``[rows, heads, keys, size]`` before the tokens of a pass, as a cache.

    Every stream sees them; it does not grow.
    """

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the stock attention asks for: the prompt's and the pass's own, for each stream."""
        times = keys.shape[0] // self.keys.shape[0]
        return (
            torch.cat((self.keys.repeat(times, 1, 1, 1), keys), 2),
            torch.cat((self.values.repeat(times, 1, 1, 1), values), 2),
        )


class _Pass:
    """One forward of the decoder over all streams.

    Args:
        read: bool ``[batch, tokens]``, the positions that are wanted of each stream; None: all.
        override: ``override(block)`` gives arguments of a block in place of the decoder's.

    The decoder passes the result of the last block through its final norm; what the other blocks
    return is not looked at. The states are kept here: ``wide`` is ``[places, batch, tokens,
    hidden]``, ``narrow`` ``[places, read, hidden]``.
    """

    def __init__(
        self,
        split: list[Block],
        schedule: _Schedule,
        read: Tensor | None = None,
        override: Callable[[Block], dict[str, Any]] | None = None,
    ) -> None:
        self.split, self.schedule, self.read = split, schedule, read
        self.override = override
        self.wide: Tensor
        self.narrow: Tensor

    def run(self, index: int, stock: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One block for all streams; see ``runtime.run_by``."""
        if index == 0:
            self._begin(hidden)
        block = self.split[index]
        if self.override is not None:
            arguments = arguments | self.override(block)
        attention, mlp = self.schedule.steps[index]
        self._narrow_down(attention.narrowed)
        self._attend_last(block, attention.last, arguments)
        self._attend(block, attention.wide, arguments)
        self._narrow_down(mlp.narrowed)
        self._feed(block, self.wide, mlp.wide)
        if self.schedule.narrows:
            self._feed(block, self.narrow, mlp.narrow)
        return self._end() if index == len(self.split) - 1 else hidden

    def _begin(self, hidden: Tensor) -> None:
        self.wide = hidden.new_empty(self.schedule.wide.count, *hidden.shape)
        self.wide[0] = hidden
        if self.read is not None:
            self.places = self.read.flatten().nonzero()[:, 0]
        if self.schedule.narrows:
            shape = (self.schedule.narrow.count, len(self.places), hidden.shape[-1])
            self.narrow = hidden.new_empty(shape)

    def _end(self) -> Tensor:
        """``[streams x batch, tokens, hidden]``, or ``[streams, read, hidden]``."""
        ends = torch.tensor(self.schedule.ends, device=self.wide.device)
        if self.schedule.narrows:
            return self.narrow.index_select(0, ends)
        if self.read is not None:
            return self.wide.flatten(1, 2)[ends[:, None], self.places]
        return self.wide.index_select(0, ends).flatten(0, 1)

    def _parts(self, moves: _Moves, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Sources and targets of as many streams of ``tokens`` as one call computes."""
        device = self.wide.device
        most = max(1, _CALL_TOKENS // tokens) if device.type == "cpu" else len(moves.sources)
        for start in range(0, len(moves.sources), max(1, most)):
            part = slice(start, start + most)
            yield (
                torch.tensor(moves.sources[part], device=device),
                torch.tensor(moves.targets[part], device=device),
            )

    def _narrow_down(self, moves: _Moves) -> None:
        for source, target in zip(moves.sources, moves.targets, strict=True):
            self.narrow[target] = self.wide[source].flatten(0, 1).index_select(0, self.places)

    def _attend(self, block: Block, moves: _Moves, arguments: dict[str, Any]) -> None:
        _, rows, tokens, _ = self.wide.shape
        for sources, targets in self._parts(moves, rows * tokens):
            hidden = self.wide.index_select(0, sources)
            flat = hidden.flatten(0, 1)
            flat += block.attention_branch(flat, _repeated(arguments, rows, len(sources)))
            self.wide.index_copy_(0, targets, hidden)

    def _feed(self, block: Block, store: Tensor, moves: _Moves) -> None:
        for sources, targets in self._parts(moves, store[0].shape[:-1].numel()):
            hidden = store.index_select(0, sources)
            flat = hidden.flatten(0, -2)
            flat += block.mlp_branch(flat)
            store.index_copy_(0, targets, hidden)

    def _attend_last(self, block: Block, moves: _Moves, arguments: dict[str, Any]) -> None:
        """Attention of the positions that are read, over keys and values of all."""
        _, rows, tokens, size = self.wide.shape
        for sources, targets in self._parts(moves, rows * tokens):
            assert self.read is not None
            count = len(sources)
            given = _repeated(arguments, rows, count)
            selection = Selection(
                self.read.repeat(count, 1),
                torch.cat([self.places + stream * rows * tokens for stream in range(count)]),
            )
            hidden = self.wide.index_select(0, sources).flatten(0, 1)
            normed = block.attention_norm(hidden)
            keys, values = block.keys_values(normed, given)
            read = normed.flatten(0, 1).index_select(0, selection.index)
            cosine, sine = (selection.gather(table) for table in _tables(given, rows * count))
            queries = selection.into_slots(block.queries(read, cosine, sine))
            rows_of_mask = selection.mask_rows(given["attention_mask"], keys)
            out = selection.out_of_slots(block.attend(queries, keys, values, rows_of_mask))
            update = hidden.flatten(0, 1).index_select(0, selection.index) + block.output(out)
            self.narrow.index_copy_(0, targets, update.view(count, -1, size))


def _tables(arguments: dict[str, Any], rows: int) -> Iterator[Tensor]:
    """Cosines and sines of the positions, ``[rows, tokens, size]``."""
    for table in arguments["position_embeddings"]:
        yield table.expand(rows, -1, -1)


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


# --- plain text ---------------------------------------------------------------------------------


def _text_streams(
    model: nn.Module, split: list[Block], schedule: _Schedule, ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Streams ``[streams, batch, tokens, hidden]`` of a text under the plans."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"use_cache": False}
    if mask is not None:
        mask = mask.to(device).long()
        arguments["attention_mask"] = mask
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with run_by(split, _Pass(split, schedule).run):
        out = decoder(model)(input_ids=ids.to(device), **arguments)
    return out.last_hidden_state.unflatten(0, (schedule.count, -1))


def _window_losses(
    model: nn.Module, split: list[Block], schedule: _Schedule, ids: Tensor
) -> Tensor:
    """float64 ``[streams, batch]`` on the CPU."""
    hidden = _text_streams(model, split, schedule, ids, None)[:, :, :-1]
    head = causal_lm(model).get_output_embeddings()
    targets = ids[:, 1:].to(hidden.device).expand(schedule.count, -1, -1).flatten()
    found = []
    flat = hidden.flatten(0, 2)
    for part, wanted in zip(_logit_parts(flat, head), targets.split(_held(head)), strict=True):
        logits = head(part)
        exact = torch.promote_types(logits.dtype, torch.float32)
        found.append(cross_entropy(logits.to(exact), wanted, reduction="none"))
    return torch.cat(found).cpu().double().view(hidden.shape[:-1]).mean(-1)


# --- continuations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """Continuations of a batch of documents, one row a document, padded on the right.

    Attributes:
        ids, positions: int64 ``[batch, tokens]``.
        segments: int64 ``[batch, tokens]``: 0 in the context, from 1 on the continuation's number,
            -1 on padding.
        lengths: tokens of each context, int64 ``[batch]``.
        spans: for each row, for each continuation, its part of all continuation tokens, in order.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    lengths: Tensor
    spans: list[list[slice]]

    @classmethod
    def of(cls, batch: Sequence[Group], contexts: bool, device: torch.device) -> _Packed:
        """Every continuation but for its last token, after its context if ``contexts``."""
        tokens: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        spans: list[list[slice]] = []
        done = 0
        for group in batch:
            length = len(group.context)
            row = list(group.context) if contexts else []
            place, segment = list(range(len(row))), [0] * len(row)
            spans.append([])
            for number, continuation in enumerate(group.continuations, start=1):
                more = len(continuation) - 1
                row += continuation[:-1]
                place += range(length, length + more)
                segment += [number] * more
                spans[-1].append(slice(done, done + more))
                done += more
            tokens.append(row)
            positions.append(place)
            segments.append(segment)
        lengths = torch.tensor([len(group.context) for group in batch], device=device)
        tables = (_table(tokens, 0, device), _table(positions, 0, device))
        return cls(*tables, _table(segments, -1, device), lengths, spans)

    @property
    def last(self) -> Tensor:
        """The last position of each context: bool ``[batch, tokens]``."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns == self.lengths[:, None] - 1


def _score_whole(
    model: nn.Module, split: list[Block], schedule: _Schedule, batch: list[Group]
) -> Iterator[list[Scored]]:
    """Contexts and continuations, all under the plans."""
    packed = _Packed.of(batch, True, next(model.parameters()).device)
    read = packed.last | (packed.segments > 0)
    keys = (packed.segments, packed.positions)
    states = _tree_pass(model, split, schedule, packed, read, keys, None)
    first = packed.last[read]
    return _scored(
        model,
        schedule,
        batch,
        packed,
        states[:, first.nonzero()[:, 0]],
        states[:, (~first).nonzero()[:, 0]],
    )


def _score_after_dense(
    model: nn.Module, split: list[Block], schedule: _Schedule, batch: list[Group]
) -> Iterator[list[Scored]]:
    """Contexts at full depth, then the continuations under the plans."""
    device = next(model.parameters()).device
    packed = _Packed.of(batch, False, device)
    contexts = _table([list(group.context) for group in batch], 0, device)
    hidden, cache = _dense(model, contexts)
    columns = torch.arange(contexts.shape[1], device=device).expand(len(batch), -1)
    first = hidden[torch.arange(len(batch), device=device), packed.lengths - 1][None]
    rest = first.new_empty(schedule.count, 0, first.shape[-1])
    if packed.ids.shape[1]:
        unseen = (columns < packed.lengths[:, None]).long() - 1
        keys = (
            torch.cat((unseen, packed.segments), 1),
            torch.cat((columns, packed.positions), 1),
        )
        rest = _tree_pass(model, split, schedule, packed, packed.segments > 0, keys, cache)
    return _scored(model, schedule, batch, packed, first, rest)


def _dense(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """Final hidden states at full depth, and keys and values of every token.

    Padding on the right needs no mask. The cache is given, because one that the model makes may
    forget what its sliding windows no longer reach.
    """
    from transformers import DynamicCache

    owner, cache = decoder(model), DynamicCache()
    out = owner(input_ids=ids, **{cache_argument(owner): cache}, use_cache=True)
    return out.last_hidden_state, cache


def _tree_pass(
    model: nn.Module,
    split: list[Block],
    schedule: _Schedule,
    packed: _Packed,
    read: Tensor,
    keys: tuple[Tensor, Tensor],
    cache: Any,
) -> Tensor:
    """What is read of each stream, after the final norm: ``[streams, read, hidden]``.

    ``keys`` are segments and positions of all keys, int64 ``[batch, keys]``; ``cache`` holds those
    before the packed tokens.
    """
    dtype = causal_lm(model).get_input_embeddings().weight.dtype
    windows = {_window(block) for block in split} | {None}
    masks = {window: _tree_mask(packed, keys, window, dtype) for window in windows}

    def override(block: Block) -> dict[str, Any]:
        given: dict[str, Any] = {"attention_mask": masks[_window(block)]}
        if cache is not None:
            layer = cache.layers[block.index]
            given[block.cache_argument] = _Prompt(layer.keys, layer.values)
        return given

    with run_by(split, _Pass(split, schedule, read, override).run):
        out = decoder(model)(
            input_ids=packed.ids,
            attention_mask=masks[None],
            position_ids=packed.positions,
            use_cache=False,
        )
    return out.last_hidden_state


def _window(block: Block) -> int | None:
    """Tokens that a block's attention reaches back, itself included; None: all."""
    attention = block.attention
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _tree_mask(
    packed: _Packed, keys: tuple[Tensor, Tensor], window: int | None, dtype: torch.dtype
) -> Tensor:
    """Additive mask ``[batch, 1, tokens, keys]``; the last keys are the packed tokens themselves.

    A token sees what stands before it in its context and in its own continuation.
    """
    segments, positions = keys
    mine = packed.segments[:, :, None]
    theirs = segments[:, None, :]
    tokens, length = packed.ids.shape[1], segments.shape[1]
    seen = (theirs == 0) | (theirs == mine)
    seen &= torch.ones(tokens, length, dtype=torch.bool, device=seen.device).tril(length - tokens)
    if window is not None:
        seen &= packed.positions[:, :, None] - positions[:, None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _scored(
    model: nn.Module,
    schedule: _Schedule,
    batch: list[Group],
    packed: _Packed,
    first: Tensor,
    rest: Tensor,
) -> Iterator[list[Scored]]:
    """Results a document, from states after the final norm.

    ``first`` is ``[streams or 1, batch, hidden]`` and predicts each continuation's first token,
    ``rest`` ``[streams, continuation tokens, hidden]`` the others.
    """
    head = causal_lm(model).get_output_embeddings()
    openings = [[tokens[0] for tokens in group.continuations] for group in batch]
    following = [token for group in batch for tokens in group.continuations for token in tokens[1:]]
    device = rest.device
    first_log, first_best = _read_out(head, first, _table(openings, 0, device))
    rest_log, rest_best = _read_out(
        head, rest, torch.tensor(following, dtype=torch.long, device=device)[:, None]
    )
    which = schedule.which
    shared = which if first.shape[0] > 1 else torch.zeros_like(which)
    first_log, first_best = first_log[shared], first_best[shared]
    rest_log, rest_best = rest_log[which, :, 0], rest_best[which, :, 0]
    for row, spans in enumerate(packed.spans):
        yield [
            (
                torch.cat((first_log[:, row, [number]], rest_log[:, span]), 1),
                torch.cat((first_best[:, row, [number]], rest_best[:, span]), 1),
            )
            for number, span in enumerate(spans)
        ]


def _read_out(head: nn.Module, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of some tokens at each position, and whether each is the likeliest.

    ``states`` is ``[streams, positions, hidden]``, ``targets`` int64 ``[positions, choices]``.
    Returns float64 and bool ``[streams, positions, choices]`` on the CPU.
    """
    count, positions = states.shape[:2]
    shape = (count, positions, targets.shape[1])
    wanted = targets.repeat(count, 1)
    logs, hits = [], []
    for part, target in zip(
        _logit_parts(states.flatten(0, 1), head), wanted.split(_held(head)), strict=True
    ):
        logits = head(part)
        # log_softmax, as in scoring and lm-eval: see scoring for why.
        exact = torch.promote_types(logits.dtype, torch.float32)
        logs.append(logits.log_softmax(-1, dtype=exact).gather(1, target))
        hits.append(logits.argmax(-1, keepdim=True) == target)
    return torch.cat(logs).cpu().double().view(shape), torch.cat(hits).cpu().view(shape)


def _held(head: Any) -> int:
    """Positions whose logits are held at a time."""
    return max(1, _LOGITS // head.weight.shape[0])


def _logit_parts(states: Tensor, head: nn.Module) -> tuple[Tensor, ...]:
    return states.split(_held(head))


# --- batches ------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class _Size:
    """What a document takes: ``weight`` is held, ``length`` is padded to the batch's longest."""

    length: int
    weight: int


def _size(group: Group, plans: int, phases: str) -> _Size:
    context = len(group.context)
    more = sum(len(tokens) - 1 for tokens in group.continuations)
    if phases == "both":
        return _Size(context + more, plans * (context + more))
    # The dense pass is padded by contexts, the other by continuations; the context costs more.
    return _Size(context, max(context, plans * more))


def _batches(sizes: Sequence[_Size], most: int) -> Iterator[list[int]]:
    """Indices of documents of similar lengths, longest first, that are held together."""
    batch: list[int] = []
    held = padding = useful = 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        if batch:
            gap = sizes[batch[0]].length - size.length
            weight = max(held, size.weight)
            crowded = padding + gap > _PADDING * (useful + size.length)
            if crowded or weight * (len(batch) + 1) > most:
                yield batch
                batch, held, padding, useful = [], 0, 0, 0
            else:
                padding += gap
        batch.append(index)
        held = max(held, size.weight)
        useful += size.length
    if batch:
        yield batch


def _table(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of different lengths, filled up on the right: int64 ``[rows, longest]``."""
    width = max(map(len, rows))
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), width)
