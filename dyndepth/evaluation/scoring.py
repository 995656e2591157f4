"""Scores with an attached model: passes over batches, and nothing of lm-eval.

A request is scored in two passes. The *context pass* (prompt phase) runs the contexts of a batch,
padded on the left, and fills a cache; its last hidden state scores the first token of every
continuation. The *continuation pass* (generation phase) runs the continuations but for their last
token, padded on the right, over the cache, which is expanded to one row a continuation. Only the
scored positions go through the LM head. Where documents may share, a beginning that many contexts
have in common is a forward of its own, run once, and the context pass runs what is left of each
context over its cache; each document is billed all of its context as if it had been read at once.
Continuations are short, so that several context passes wait for one continuation pass.

Where a model reads a context by other rotary tables than context and continuation together, nothing
may be cached: such a document is scored alone. Batches hold documents of the same tables.

``score_alone`` is the yardstick: one forward a continuation, no cache, no batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyndepth.evaluation.forwards import (
    budget_of,
    forward,
    joined,
    log_probabilities,
    padded,
    parts,
    rows_of,
)
from dyndepth.models.blocks import blocks
from dyndepth.models.rotary import one_table, tables
from dyndepth.runtime.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ROWS_PER_CONTEXT = 4
"""Continuation passes run at most this many rows for each row of a full context batch."""
_COPIED = 2**14
"""Tokens of contexts that a continuation pass may hold copies of."""
_HELD = 4096
"""Tokens of contexts that may wait in caches for their continuations, padding included."""
_LOGITS = 2**24
"""Logits held at a time: 64 MiB in float32."""

Scored = list[tuple[float, bool]]
"""Of one group: log-likelihood of each continuation, and whether greedy decoding would write it."""


@dataclass(frozen=True)
class Group:
    """Continuations of one document that share their context; all token ids, none empty."""

    document: str
    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def size(self) -> tuple[int, int]:
        """Lengths that decide the order of batches: context, longest continuation."""
        return len(self.context), max(map(len, self.continuations))

    @property
    def read(self) -> tuple[int, int]:
        """Tokens that are read: of the context, and with the longest continuation but its last."""
        context, continuation = self.size
        return context, context + continuation - 1


@torch.no_grad()
def score(
    model: PreTrainedModel,
    trace: Trace,
    groups: Sequence[Group],
    batch_size: int,
    *,
    sharing: bool = False,
) -> Iterator[tuple[int, Scored]]:
    """Log-likelihood of every continuation, and whether greedy decoding would produce it.

    ``trace`` is that of the method attached to ``model``; a forward holds at most ``batch_size``
    contexts, fewer where they are long. ``sharing`` lets documents share the forward of an equal
    beginning: right only for methods that decide by tokens alone. Yields (index of the group, one
    pair a continuation) as batches are done, longest first.
    """
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        if one_table(model, *group.read):
            together[tables(model, group.read[0])].append(index)
        else:
            yield index, score_alone(model, trace, group)
    for indices in together.values():
        some = [groups[index] for index in indices]
        for place, results in _score(model, trace, some, batch_size, sharing):
            yield indices[place], results


def _score(
    model: PreTrainedModel,
    trace: Trace,
    groups: Sequence[Group],
    batch_size: int,
    sharing: bool,
) -> Iterator[tuple[int, Scored]]:
    """``score`` of documents that are read by the same tables."""
    budget = budget_of(next(model.parameters()).device)
    everyone = list(range(len(groups)))
    contexts = [group.context for group in groups]
    # A beginning may be so short that it is read by other tables than the whole.
    sharing = sharing and one_table(model, 1, len(contexts[0])) and not _slides(model, groups)
    found = shared_prefixes(contexts) if sharing else [(0, everyone)]
    alone = [index for length, members in found if not length for index in members]
    reads = _read(model, trace, groups, alone, found, batch_size, budget)
    for together in _held(reads):
        whole = joined([one.mask for one in together], [one.cache for one in together])
        several = together if whole is None else [_Read.of(together, *whole)]
        for one in several:
            _finish(model, trace, one, batch_size)
            yield from one.results()


def _slides(model: PreTrainedModel, groups: Sequence[Group]) -> bool:
    """Whether some attention may reach back less far than a row is wide.

    A window is counted in columns, and what follows a shared beginning has padding before it: a row
    is at most as wide as the longest beginning, rest and continuation of different documents.
    """
    windows = [block.window for block in blocks(model) if block.window is not None]
    if not windows or not groups:
        return False
    sizes = [group.size for group in groups]
    longest = 2 * max(context for context, _ in sizes) + max(more for _, more in sizes)
    return min(windows) < longest


@dataclass
class _Read:
    """Contexts that were read, a row each, and what is known of their continuations.

    Attributes:
        indices, groups: of each row.
        mask, cache: of the contexts, ``[rows, tokens]``.
        pairs: (row, continuation), all continuations in order.
        log, greedy: of each pair's first token, and in the end of all its tokens: float64 and bool
            ``[pairs]``.
    """

    indices: list[int]
    groups: list[Group]
    mask: Tensor
    cache: Any
    pairs: list[tuple[int, Sequence[int]]]
    log: Tensor
    greedy: Tensor

    @classmethod
    def of(cls, several: list[_Read], mask: Tensor, cache: Any) -> _Read:
        """Several as one, with their joined mask and cache."""
        if len(several) == 1:
            return several[0]
        groups = [group for one in several for group in one.groups]
        return cls(
            [index for one in several for index in one.indices],
            groups,
            mask,
            cache,
            _pairs(groups),
            torch.cat([one.log for one in several]),
            torch.cat([one.greedy for one in several]),
        )

    def results(self) -> Iterator[tuple[int, Scored]]:
        """Index of each group, and what its continuations came to."""
        results = iter(zip(self.log.tolist(), self.greedy.tolist(), strict=True))
        for index, group in zip(self.indices, self.groups, strict=True):
            yield index, [next(results) for _ in group.continuations]


def _pairs(groups: Sequence[Group]) -> list[tuple[int, Sequence[int]]]:
    return [(row, tokens) for row, group in enumerate(groups) for tokens in group.continuations]


def _held(reads: Iterator[_Read]) -> Iterator[list[_Read]]:
    """Batches of contexts whose continuations are scored together."""
    together: list[_Read] = []
    for one in reads:
        together.append(one)
        rows = sum(len(each.mask) for each in together)
        if rows * max(each.mask.shape[1] for each in together) >= _HELD:
            yield together
            together = []
    if together:
        yield together


def _read(
    model: PreTrainedModel,
    trace: Trace,
    groups: Sequence[Group],
    alone: list[int],
    found: list[tuple[int, list[int]]],
    batch_size: int,
    budget: int,
) -> Iterator[_Read]:
    """Context passes of all groups; arguments as in ``score``, ``found`` as in
    ``shared_prefixes``."""
    everyone = range(len(groups))
    yield from _read_all(model, trace, groups, alone, [0] * len(groups), None, batch_size)
    shared = sorted((one for one in found if one[0]), key=lambda one: one[0], reverse=True)
    for part in parts([length for length, _ in shared], batch_size, budget):
        beginnings = [groups[members[0]].context[:length] for length, members in shared[part]]
        readers = [[groups[index] for index in members] for _, members in shared[part]]
        begun = _begin_shared(model, trace, beginnings, readers)
        row_of = {index: row for row, (_, members) in enumerate(shared[part]) for index in members}
        rows = [row_of.get(index, 0) for index in everyone]
        yield from _read_all(model, trace, groups, list(row_of), rows, begun, batch_size)


@torch.no_grad()
def score_alone(model: PreTrainedModel, trace: Trace, group: Group) -> Scored:
    """As ``score``, each continuation of ``group`` in one forward after its context.

    Nothing is shared, padded or kept: what a method pools over its batch is one sequence's.
    """
    device = next(model.parameters()).device
    length = len(group.context)
    trace.documents, trace.prompt_length = [group.document], length
    results = []
    for continuation in group.continuations:
        ids = torch.tensor([[*group.context, *continuation[:-1]]], device=device)
        hidden, _ = forward(model, ids, torch.ones_like(ids), keep=False)
        targets = torch.tensor([continuation], device=device)
        scored = torch.ones_like(targets, dtype=torch.bool)
        log, greedy = _token_sums(model, trace, hidden[:, length - 1 :], targets, scored)
        results.append((log.item(), bool(greedy)))
    trace.prompt_length = None
    return results


@dataclass(frozen=True)
class _Shared:
    """Beginnings of contexts that were read, a row each: their cache and mask, as in
    ``generation.Begun``."""

    mask: Tensor
    cache: Any


def _begin_shared(
    model: PreTrainedModel,
    trace: Trace,
    beginnings: list[Sequence[int]],
    readers: list[list[Group]],
) -> _Shared:
    """Read each beginning once, for all of its readers; each is billed it within its context."""
    ids, mask = padded(beginnings, "left", next(model.parameters()).device)
    trace.documents = None
    _, cache = forward(model, ids, mask)
    trace.bill_last([[(one.document, len(one.context)) for one in row] for row in readers])
    return _Shared(mask, cache)


def _read_all(
    model: PreTrainedModel,
    trace: Trace,
    groups: Sequence[Group],
    chosen: list[int],
    rows: list[int],
    shared: _Shared | None,
    batch_size: int,
) -> Iterator[_Read]:
    """Read the chosen groups' contexts; ``rows`` has, for each of all, its beginning in
    ``shared``."""
    device = next(model.parameters()).device
    begun = [0] * len(groups) if shared is None else shared.mask.sum(1)[rows].tolist()

    def size(index: int) -> tuple[int, int]:
        context, continuation = groups[index].size
        return context - begun[index], continuation

    order = sorted(chosen, key=size, reverse=True)
    lengths = [size(index)[0] for index in order]
    for part in parts(lengths, batch_size, budget_of(device)):
        batch = [groups[index] for index in order[part]]
        rest = [groups[index].context[begun[index] :] for index in order[part]]
        ids, mask = padded(rest, "left", device)
        trace.documents = [group.document for group in batch]
        cache = None
        if shared is not None:
            which = torch.tensor([rows[index] for index in order[part]], device=device)
            mask, cache = torch.cat((shared.mask[which], mask), 1), rows_of(shared.cache, which)
            trace.prompt_length = mask.sum(1)
        hidden, cache = forward(model, ids, mask, cache)
        trace.prompt_length = None
        pairs = _pairs(batch)
        log, best = _first_tokens(trace, hidden[:, -1], pairs)
        yield _Read(order[part], batch, mask, cache, pairs, log.double(), best)


def _finish(model: PreTrainedModel, trace: Trace, read: _Read, batch_size: int) -> None:
    """The continuation passes: adds what follows the first tokens to ``log`` and ``greedy``."""
    pairs, device = read.pairs, read.mask.device
    longer = [index for index, (_, tokens) in enumerate(pairs) if len(tokens) > 1]
    longer.sort(key=lambda index: len(pairs[index][1]), reverse=True)
    lengths = [len(pairs[index][1]) - 1 for index in longer]
    copies = max(1, _COPIED // (read.mask.shape[1] + max(lengths, default=0)))
    most = min(_ROWS_PER_CONTEXT * batch_size, copies)
    for part in parts(lengths, most, budget_of(device)):
        chunk = longer[part]
        rows = torch.tensor([pairs[index][0] for index in chunk], device=device)
        trace.documents = [read.groups[pairs[index][0]].document for index in chunk]
        inputs, valid = padded([pairs[index][1][:-1] for index in chunk], "right", device)
        targets, _ = padded([pairs[index][1][1:] for index in chunk], "right", device)
        seen = torch.cat((read.mask[rows], valid), 1)
        hidden, _ = forward(model, inputs, seen, rows_of(read.cache, rows))
        rest_log, rest_best = _token_sums(model, trace, hidden, targets, valid.bool())
        where = torch.tensor(chunk, device=device)
        read.log[where] += rest_log
        read.greedy[where] &= rest_best


def _first_tokens(
    trace: Trace, hidden: Tensor, pairs: list[tuple[int, Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Log-probability of each continuation's first token, and whether it is the likeliest.

    ``hidden`` is ``[contexts, hidden]``; ``pairs`` are (row of the context, continuation).
    """
    rows = torch.tensor([row for row, _ in pairs], device=hidden.device)
    targets = torch.tensor([tokens[0] for _, tokens in pairs], device=hidden.device)
    every = torch.arange(hidden.shape[0], device=hidden.device)
    log, best = log_probabilities(trace.readout(hidden, every))
    return log[rows, targets], best[rows] == targets


def _token_sums(
    model: PreTrainedModel, trace: Trace, hidden: Tensor, targets: Tensor, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's sum of log-probabilities, float64, and whether all its targets are the likeliest.

    ``hidden`` is ``[rows, tokens, hidden]``, ``targets`` and ``scored`` (bool) ``[rows, tokens]``.
    """
    rows = scored.nonzero()[:, 0]
    flat, wanted = hidden[scored], targets[scored]
    log = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
    misses = torch.zeros(len(targets), dtype=torch.int64, device=hidden.device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for part in torch.arange(len(rows), device=rows.device).split(max(1, _LOGITS // vocabulary)):
        every, best = log_probabilities(trace.readout(flat[part], rows[part]))
        target = wanted[part]
        log.index_add_(0, rows[part], every.gather(1, target[:, None])[:, 0].double())
        misses.index_add_(0, rows[part], (best != target).long())
    return log, misses == 0


LEAST = 8
"""Tokens that a prefix must have to be worth a forward of its own."""


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Every sequence once: (length of a common prefix, indices of the sequences that have it).

    The length is 0 for a sequence that shares none; otherwise it is at least ``LEAST`` and leaves
    each sequence its last token. Sequences are taken in lexicographic order, in which equal
    beginnings are neighbours, and one joins those before it unless that saves fewer tokens.
    """
    order = sorted(range(len(sequences)), key=lambda index: list(sequences[index]))
    found: list[tuple[int, list[int]]] = []
    for index in order:
        own = len(sequences[index]) - 1
        if found:
            length, members = found[-1]
            common = min(length or own, own, _common(sequences[members[-1]], sequences[index]))
            common = min(common, len(sequences[members[0]]) - 1)
            if common >= LEAST and common * len(members) >= length * (len(members) - 1):
                found[-1] = common, [*members, index]
                continue
        found.append((0, [index]))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
