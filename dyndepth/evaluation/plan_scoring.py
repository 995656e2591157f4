"""Scores continuations under many static plans at once.

Each document is one row (``Packed``). From a stream's last attention on, only the positions that
are scored go on. A batch holds what is read by the same rotary tables: a document whose
continuations are not is in several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from dyndepth.common.errors import UserError
from dyndepth.evaluation.scoring import Group
from dyndepth.models.blocks import Block, decoder
from dyndepth.models.caches import cache_argument
from dyndepth.models.rotary import forget, one_table, tables
from dyndepth.runtime.many_plans import BATCH_TOKENS, Trie

Scored = tuple[Tensor, Tensor]
"""Of one continuation: log-probabilities float64 ``[plans, tokens]`` and whether each token is the
likeliest, bool ``[plans, tokens]``; both on the CPU."""


@torch.no_grad()
def score(
    model: nn.Module,
    plans: Tensor,
    groups: Sequence[Group],
    *,
    phases: Literal["both", "generation"] = "both",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, list[Scored]]]:
    """Log-probability of every token of every continuation under every plan.

    The numbers are those of ``scoring.score`` with each plan attached alone. Under ``phases``
    "generation" contexts run at full depth, once for all plans, and only the continuations run
    under the plans. ``plans`` as in ``many_plans.streams``; ``batch_tokens`` bounds the tokens of a
    batch times the number of distinct plans, but for a single document that is longer. Yields
    (index of the group, one pair a continuation) as batches are done, longest first.
    """
    if phases not in ("both", "generation"):
        raise UserError(f"phases must be 'both' or 'generation', not {phases!r}")
    whole = phases == "both"
    trie = Trie(model, plans, narrows=whole)
    score_batch = _score_whole if whole else _score_after_dense
    found: dict[int, dict[int, Scored]] = defaultdict(dict)
    for shares in _by_tables(model, groups):
        sizes = [_size(share.group, trie.schedule.count, whole) for share in shares]
        for chosen in batches(sizes, batch_tokens):
            some = [shares[place] for place in chosen]
            scored = score_batch(trie, [share.group for share in some])
            for share, results in zip(some, scored, strict=True):
                own = found[share.index]
                own.update(zip(share.places, results, strict=True))
                if len(own) == len(groups[share.index].continuations):
                    del found[share.index]
                    yield share.index, [own[place] for place in range(len(own))]


@dataclass(frozen=True)
class _Share:
    """Continuations of the group ``index``, at ``places`` among them, as a group."""

    index: int
    places: list[int]
    group: Group


def _by_tables(model: nn.Module, groups: Sequence[Group]) -> list[list[_Share]]:
    """The groups, in parts that are read by the same rotary tables."""
    found: dict[tuple[int, ...], list[_Share]] = defaultdict(list)
    for index, group in enumerate(groups):
        own: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, tokens in enumerate(group.continuations):
            own[tables(model, len(group.context) + len(tokens) - 1)].append(place)
        for names, places in own.items():
            some = [group.continuations[place] for place in places]
            found[names].append(_Share(index, places, replace(group, continuations=some)))
    return list(found.values())


def _size(group: Group, plans: int, whole: bool) -> Size:
    context = len(group.context)
    more = sum(len(tokens) - 1 for tokens in group.continuations)
    if whole:
        return context + more, plans * (context + more)
    # The dense pass is padded by contexts, the other by continuations; the context costs more.
    return context, max(context, plans * more)


def _score_whole(trie: Trie, batch: list[Group]) -> list[list[Scored]]:
    """Contexts and continuations, all under the plans."""
    packed = Packed.of(batch, True, trie.device)
    columns = torch.arange(packed.ids.shape[1], device=trie.device)
    last = columns == packed.lengths[:, None] - 1
    read = last | (packed.segments > 0)
    states = _forward(trie, packed, read, packed.segments, packed.positions, None)
    first = last[read]
    return _scored(trie, batch, packed, states[:, first], states[:, ~first])


def _score_after_dense(trie: Trie, batch: list[Group]) -> list[list[Scored]]:
    """Contexts at full depth, then the continuations under the plans."""
    packed = Packed.of(batch, False, trie.device)
    contexts = _contexts(trie.model, batch, trie.device)
    hidden, cache = _dense(trie.model, contexts)
    first = hidden[torch.arange(len(batch), device=trie.device), packed.lengths - 1][None]
    rest = first.new_empty(trie.schedule.count, 0, first.shape[-1])
    if packed.ids.shape[1]:
        columns = torch.arange(contexts.shape[1], device=trie.device).expand(len(batch), -1)
        before = (columns < packed.lengths[:, None]).long() - 1  # 0, and -1 on padding
        segments = torch.cat((before, packed.segments), 1)
        positions = torch.cat((columns, packed.positions), 1)
        rest = _forward(trie, packed, packed.segments > 0, segments, positions, cache)
    return _scored(trie, batch, packed, first, rest)


def _contexts(model: nn.Module, batch: list[Group], device: torch.device) -> Tensor:
    """The contexts, int64 ``[batch, tokens]``, padded on the right.

    To the length of the longest document where the contexts alone would be read by other tables.
    """
    context, whole = (max(sizes) for sizes in zip(*(group.read for group in batch), strict=True))
    more = 0 if one_table(model, context, whole) else whole - context
    rows = table([group.context for group in batch], 0, device)
    return pad(rows, (0, more))


def _dense(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """Final hidden states at full depth, and keys and values of every token.

    Padding on the right needs no mask. The cache is given, because one that the model makes may
    forget what its sliding windows no longer reach.
    """
    forget(model)
    owner, cache = decoder(model), DynamicCache()
    out = owner(input_ids=ids, **{cache_argument(owner): cache}, use_cache=True)
    # A model that is spread over devices ends on another one than it began on.
    return out.last_hidden_state.to(ids.device), cache


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


def _forward(
    trie: Trie, packed: Packed, read: Tensor, segments: Tensor, positions: Tensor, cache: Any
) -> Tensor:
    """What is read of each stream, after the final norm: ``[streams, read, hidden]``.

    ``segments`` and ``positions`` are those of all keys; ``cache`` holds those before the packed
    tokens.
    """
    parts = trie.parts
    dtype = parts.model.get_input_embeddings().weight.dtype
    windows = {block.window for block in parts.blocks} | {None}
    masks = {window: tree_mask(packed, segments, positions, window, dtype) for window in windows}

    bias = parts.position_bias(positions, dtype)

    def override(block: Block) -> dict[str, Any]:
        given: dict[str, Any] = {"attention_mask": masks[block.window], **bias}
        if cache is not None:
            layer = cache.layers[block.index]
            given[block.cache_argument] = _Prompt(layer.keys, layer.values)
        return given

    given = {} if bias else {"attention_mask": masks[None], "position_ids": packed.positions}
    return trie.forward(read=read, override=override, input_ids=packed.ids, **given)


def _scored(
    trie: Trie, batch: list[Group], packed: Packed, first: Tensor, rest: Tensor
) -> list[list[Scored]]:
    """Results a document, from states after the final norm.

    ``first`` is ``[streams or 1, batch, hidden]`` and predicts each continuation's first token,
    ``rest`` ``[streams, continuation tokens, hidden]`` the others.
    """
    openings = [[tokens[0] for tokens in group.continuations] for group in batch]
    following = [[token] for group in batch for row in group.continuations for token in row[1:]]
    first_log, first_best = _read_out(trie, first, table(openings, 0, trie.device))
    wanted = torch.tensor(following, dtype=torch.long, device=trie.device).view(-1, 1)
    rest_log, rest_best = _read_out(trie, rest, wanted)
    which = torch.tensor(trie.schedule.which)
    shared = which if first.shape[0] > 1 else torch.zeros_like(which)
    first_log, first_best = first_log[shared], first_best[shared]
    rest_log, rest_best = rest_log[which, :, 0], rest_best[which, :, 0]
    return [
        [
            (
                torch.cat((first_log[:, row, [number]], rest_log[:, span]), 1),
                torch.cat((first_best[:, row, [number]], rest_best[:, span]), 1),
            )
            for number, span in enumerate(spans)
        ]
        for row, spans in enumerate(packed.spans)
    ]


def _read_out(trie: Trie, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of some tokens at each position, and whether each is the likeliest.

    ``states`` is ``[streams, positions, hidden]``, ``targets`` int64 ``[positions, choices]``.
    Returns float64 and bool ``[streams, positions, choices]`` on the CPU.
    """
    count = states.shape[0]
    logs, hits = [], []
    for logits, wanted in trie.logits(states.flatten(0, 1), targets.repeat(count, 1)):
        # log_softmax, as in scoring and lm-eval: see scoring for why.
        logs.append(logits.log_softmax(-1).gather(1, wanted))
        hits.append(logits.argmax(-1, keepdim=True) == wanted)
    shape = (count, *targets.shape)
    return torch.cat(logs).cpu().double().view(shape), torch.cat(hits).cpu().view(shape)


_PADDING = 0.125
"""Padding that a batch may hold as a share of its tokens."""

Size = tuple[int, int]
"""What a document takes: its length, which is padded to the batch's longest, and its weight, which
is held."""


def batches(sizes: Sequence[Size], most: int) -> Iterator[list[int]]:
    """Indices of documents of similar lengths, longest first, that are held together.

    A batch holds as much as its heaviest document times their number: at most ``most``, but for a
    single document that is heavier.
    """
    batch: list[int] = []
    heaviest = padding = useful = 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        length, weight = sizes[index]
        gap = sizes[batch[0]][0] - length if batch else 0
        crowded = padding + gap > _PADDING * (useful + length)
        if batch and (crowded or max(heaviest, weight) * (len(batch) + 1) > most):
            yield batch
            batch, heaviest, padding, useful, gap = [], 0, 0, 0, 0
        batch.append(index)
        heaviest = max(heaviest, weight)
        padding += gap
        useful += length
    if batch:
        yield batch


@dataclass(frozen=True)
class Packed:
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
    def of(cls, batch: Sequence[Group], contexts: bool, device: torch.device) -> Packed:
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
        return cls(
            table(tokens, 0, device),
            table(positions, 0, device),
            table(segments, -1, device),
            torch.tensor([len(group.context) for group in batch], device=device),
            spans,
        )


def tree_mask(
    packed: Packed, segments: Tensor, positions: Tensor, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Additive mask ``[batch, 1, tokens, keys]``.

    A token sees what stands before it in its context and in its own continuation, and of that what
    its attention's ``window`` reaches. ``segments`` and ``positions`` are those of the keys, int64
    ``[batch, keys]``; the last keys are the packed tokens themselves.
    """
    tokens, length = packed.ids.shape[1], segments.shape[1]
    theirs = segments[:, None, :]
    seen = (theirs == 0) | (theirs == packed.segments[:, :, None])
    seen &= torch.ones(tokens, length, dtype=torch.bool, device=seen.device).tril(length - tokens)
    if window is not None:
        seen &= packed.positions[:, :, None] - positions[:, None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def table(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of different lengths, filled up on the right: int64 ``[rows, longest]``."""
    width = max(map(len, rows))
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), width)
