"""Scores and generates with an attached model: batches, masks, caches, and nothing of lm-eval.

A request is scored in two forwards. The *context pass* (prompt phase) runs the contexts of a batch,
padded on the left, and fills a cache; its last hidden state scores the first token of every
continuation. The *continuation pass* (generation phase) runs the continuations but for their last
token, padded on the right, over the cache, which is expanded to one row a continuation. Only the
scored positions go through the LM head.

Rounding apart, a result depends on its own tokens alone: padding is masked everywhere and positions
are counted without it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyndepth.blocks import cache_argument, cache_of, decoder
from dyndepth.runtime import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS_PER_CONTEXT = 2
"""Continuation passes run at most this many rows for each row of a full context batch."""
_PADDING = 32
"""Padding tokens that a batch may always hold; beyond, they are at most a quarter of its tokens.
About what a forward's fixed cost is worth in tokens, on a CPU and a small model."""
_LOGITS = 2**24
"""Logits held at a time: 64 MiB in float32."""


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


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete greedily.

    ``stop`` is asked after every token, with the token ids generated so far, whether that was the
    last; ``limit`` bounds their number.
    """

    document: str
    tokens: Sequence[int]
    limit: int
    stop: Callable[[list[int]], bool]


@torch.no_grad()
def score(
    model: PreTrainedModel, trace: Trace, groups: Sequence[Group], batch_size: int
) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """Log-likelihood of every continuation, and whether greedy decoding would produce it.

    ``trace`` is that of the method attached to ``model``. Yields (index of the group, one pair a
    continuation) as batches are done, longest first.
    """
    order = sorted(range(len(groups)), key=lambda i: groups[i].size, reverse=True)
    lengths = [len(groups[index].context) for index in order]
    for part in _parts(lengths, batch_size):
        chosen = order[part]
        batch = [groups[index] for index in chosen]
        yield from zip(chosen, _score_batch(model, trace, batch, batch_size), strict=True)


@torch.no_grad()
def generate(
    model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Greedy completions: (index of the prompt, generated token ids), the longest prompts first.

    A sequence that is done leaves the batch, so that nothing is computed or counted for it while
    the others go on.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens), reverse=True)
    lengths = [len(prompts[index].tokens) for index in order]
    for part in _parts(lengths, batch_size):
        chosen = order[part]
        batch = [prompts[index] for index in chosen]
        yield from zip(chosen, finish(model, trace, batch, begin(model, trace, batch)), strict=True)


@dataclass(frozen=True)
class Begun:
    """Prompts that were read, a row each.

    Attributes:
        first: the likeliest token after each, int64 ``[rows]``.
        mask: int64 ``[rows, tokens]``, 1 on the tokens of the prompts.
        cache: of their keys and values.
    """

    first: Tensor
    mask: Tensor
    cache: Any

    def rows(self, rows: Tensor) -> Begun:
        """The chosen rows, repeated where ``rows`` (int64 ``[n]``) repeats; self is kept."""
        rows = rows.to(self.mask.device)
        return Begun(self.first[rows], self.mask[rows], _rows_of(self.cache, rows))


@torch.no_grad()
def begin(model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt]) -> Begun:
    """Read ``prompts`` as one batch; ``trace`` is as in ``score``."""
    device = next(model.parameters()).device
    tokens, mask = _padded([prompt.tokens for prompt in prompts], "left", device)
    first, cache = _likeliest(model, trace, prompts, tokens, mask)
    return Begun(first, mask, cache)


@torch.no_grad()
def finish(
    model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt], begun: Begun
) -> list[list[int]]:
    """The greedy completions of ``prompts``, one or more, which ``begun`` holds row by row."""
    best, mask, cache = begun.first, begun.mask, begun.cache
    done: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while True:
        going = []
        for place, (row, token) in enumerate(zip(alive, best.tolist(), strict=True)):
            done[row].append(token)
            if len(done[row]) < prompts[row].limit and not prompts[row].stop(done[row]):
                going.append(place)
        if not going:
            return done
        keep = torch.tensor(going, device=mask.device)
        if len(going) < len(alive):
            cache = _rows_of(cache, keep)
        alive = [alive[place] for place in going]
        mask = torch.cat((mask[keep], mask.new_ones(len(going), 1)), 1)
        batch = [prompts[row] for row in alive]
        best, cache = _likeliest(model, trace, batch, best[keep, None], mask, cache)


def _parts(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Batches of sequences, given their descending lengths: few rows rather than much padding."""
    start, useful, padding = 0, 0, 0
    for index, length in enumerate(lengths):
        gap = lengths[start] - length
        crowded = padding + gap > max(_PADDING, (useful + length) / 4)
        if index > start and (crowded or index - start == most):
            yield slice(start, index)
            start, useful, padding, gap = index, 0, 0, 0
        useful += length
        padding += gap
    if lengths:
        yield slice(start, len(lengths))


def _score_batch(
    model: PreTrainedModel, trace: Trace, batch: list[Group], batch_size: int
) -> list[list[tuple[float, bool]]]:
    device = next(model.parameters()).device
    contexts, mask = _padded([group.context for group in batch], "left", device)
    trace.documents = [group.document for group in batch]
    hidden, cache = _forward(model, contexts, mask)

    pairs = [(row, tokens) for row, group in enumerate(batch) for tokens in group.continuations]
    first_log, first_best = _first_tokens(trace, hidden[:, -1], pairs)
    log = first_log.double()
    greedy = first_best
    longer = [index for index, (_, tokens) in enumerate(pairs) if len(tokens) > 1]
    longer.sort(key=lambda index: len(pairs[index][1]), reverse=True)
    lengths = [len(pairs[index][1]) - 1 for index in longer]
    for part in _parts(lengths, _ROWS_PER_CONTEXT * batch_size):
        chunk = longer[part]
        rows = torch.tensor([pairs[index][0] for index in chunk], device=device)
        trace.documents = [batch[pairs[index][0]].document for index in chunk]
        rest_log, rest_best = _remaining_tokens(
            model, trace, [pairs[index][1] for index in chunk], _rows_of(cache, rows), mask[rows]
        )
        where = torch.tensor(chunk, device=device)
        log[where] += rest_log
        greedy[where] &= rest_best
    results = iter(zip(log.tolist(), greedy.tolist(), strict=True))
    return [[next(results) for _ in group.continuations] for group in batch]


def _first_tokens(
    trace: Trace, hidden: Tensor, pairs: list[tuple[int, Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Log-probability of each continuation's first token, and whether it is the likeliest.

    ``hidden`` is ``[contexts, hidden]``; ``pairs`` are (row of the context, continuation).
    """
    rows = torch.tensor([row for row, _ in pairs], device=hidden.device)
    targets = torch.tensor([tokens[0] for _, tokens in pairs], device=hidden.device)
    every = torch.arange(hidden.shape[0], device=hidden.device)
    log, best = _log_probabilities(trace.readout(hidden, every))
    return log[rows, targets], best[rows] == targets


def _remaining_tokens(
    model: PreTrainedModel,
    trace: Trace,
    continuations: list[Sequence[int]],
    cache: Any,
    context_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each continuation after its first token, and whether all are likeliest."""
    device = context_mask.device
    inputs, valid = _padded([tokens[:-1] for tokens in continuations], "right", device)
    targets, _ = _padded([tokens[1:] for tokens in continuations], "right", device)
    hidden, _ = _forward(model, inputs, torch.cat((context_mask, valid), 1), cache)
    places = valid.bool()
    rows = places.nonzero()[:, 0]
    flat, wanted = hidden[places], targets[places]
    log = torch.zeros(len(continuations), dtype=torch.float64, device=device)
    misses = torch.zeros(len(continuations), dtype=torch.int64, device=device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for part in torch.arange(len(rows), device=device).split(max(1, _LOGITS // vocabulary)):
        every, best = _log_probabilities(trace.readout(flat[part], rows[part]))
        target = wanted[part]
        log.index_add_(0, rows[part], every.gather(1, target[:, None])[:, 0].double())
        misses.index_add_(0, rows[part], (best != target).long())
    return log, misses == 0


def _log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at least float32, and likeliest token; ``logits`` is ``[n, vocabulary]``.

    By log_softmax as in lm-eval, though logsumexp is closer to float64: over 50,000 tokens the
    two differ by 1e-5 a token on a CPU, which would show against published scores.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=exact), logits.argmax(-1)


def _likeliest(
    model: PreTrainedModel,
    trace: Trace,
    batch: Sequence[Prompt],
    inputs: Tensor,
    mask: Tensor,
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """The likeliest token after each row of ``inputs``, and the cache; see ``_forward``."""
    trace.documents = [prompt.document for prompt in batch]
    hidden, cache = _forward(model, inputs, mask, cache)
    logits = trace.readout(hidden[:, -1], torch.arange(len(batch), device=inputs.device))
    return logits.argmax(-1), cache


def _forward(
    model: PreTrainedModel, inputs: Tensor, mask: Tensor, cache: Any = None
) -> tuple[Tensor, Any]:
    """Final hidden states ``[batch, tokens, hidden]`` and the cache.

    ``mask`` is int64 ``[batch, past + tokens]``, 1 on real tokens.
    """
    owner = decoder(model)
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(owner.forward).parameters:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        arguments["position_ids"] = positions[:, -inputs.shape[1] :]
    arguments[cache_argument(owner)] = cache
    out = owner(input_ids=inputs, **arguments)
    return out.last_hidden_state, cache_of(out)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache that holds the chosen rows, repeated where ``rows`` repeats; ``cache`` is kept."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _padded(
    sequences: Sequence[Sequence[int]], side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 ``[batch, longest]``; padding has id 0."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
