"""Generates with an attached model, greedily, and nothing of lm-eval: see
``dyndepth.evaluation.scoring``.

A method that speculates writes by drafts, one prompt after another; all others write in batches.
The cache is kept as long as the model's rotary tables are the same. Where a text grows so long that
they become others, all of it is read anew: each token is that of one forward over all before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyndepth.evaluation.forwards import budget_of, forward, padded, parts, rows_of
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.rotary import one_table, tables
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.speculation import speculate
from dyndepth.runtime.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HELD = 8
"""Prompts that are completed together may hold this many budgets of tokens: what follows runs one
token a row, and is the cheaper the more rows there are."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete greedily.

    ``stop`` is asked after every token, with the token ids generated so far, whether that was the
    last; ``limit`` bounds their number. ``rules`` gives the logits ``[vocabulary]`` whose likeliest
    token is taken, from those token ids and the model's own logits; None: these.
    """

    document: str
    tokens: Sequence[int]
    limit: int
    stop: Callable[[list[int]], bool]
    rules: Callable[[Sequence[int], Tensor], Tensor] | None = None


_BROKEN = -1
"""In place of a token where the logits are not numbers."""


def completed(
    model: PreTrainedModel,
    trace: Trace,
    method: DynamicDepthMethod,
    prompts: Sequence[Prompt],
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy completions under ``method``, which is attached, in the way that its declared facts
    allow: (index of the prompt, generated token ids)."""
    if method.speculates:
        return generate_drafted(model, trace, method, prompts)
    return generate(model, trace, prompts, 1 if method.pooled else batch_size)


@torch.no_grad()
def generate(
    model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Greedy completions: (index of the prompt, generated token ids), the longest prompts first.

    At most ``batch_size`` prompts run at once. A sequence that is done leaves the batch, so that
    nothing is computed or counted for it while the others go on.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens), reverse=True)
    held = _HELD * budget_of(next(model.parameters()).device)
    together: dict[Hashable, list[int]] = defaultdict(list)
    for index in order:
        length, limit = len(prompts[index].tokens), prompts[index].limit
        one = one_table(model, length, length + limit - 1)
        # Those whose tables change must do so at the same step.
        together[tables(model, length) if one else length].append(index)
    for indices in together.values():
        lengths = [len(prompts[index].tokens) for index in indices]
        for part in parts(lengths, batch_size, held):
            batch = [prompts[index] for index in indices[part]]
            texts = finish(model, trace, batch, begin(model, trace, batch))
            yield from zip(indices[part], texts, strict=True)


def generate_drafted(
    model: PreTrainedModel, trace: Trace, method: DynamicDepthMethod, prompts: Sequence[Prompt]
) -> Iterator[tuple[int, list[int]]]:
    """What ``generate`` gives without a method, by drafts of ``method``, which speculates and is
    attached: (index of the prompt, generated token ids), in the order of ``prompts``.

    A text whose rotary tables change as it grows is written without drafts: what was cached before
    is read anew there, which a draft would have to be, too. Raises as ``finish``.
    """
    for index, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        if one_table(model, length, length + prompt.limit - 1):
            yield index, _drafted(model, trace, method, prompt)
        else:
            (text,) = finish(model, trace, [prompt], begin(model, trace, [prompt]))
            yield index, text


def _drafted(
    model: PreTrainedModel, trace: Trace, method: DynamicDepthMethod, prompt: Prompt
) -> list[int]:
    trace.documents = [prompt.document]
    rounds = speculate(
        model,
        trace,
        method,
        prompt.tokens,
        limit=prompt.limit,
        ends=lambda written: prompt.stop(list(written)),
        choice=Choice(prompt.rules),
    )
    return [token for tokens in rounds for token in tokens]


@dataclass(frozen=True)
class Begun:
    """Prompts that were read, a row each.

    Attributes:
        first: the likeliest token after each, int64 ``[rows]``; negative where there is none.
        mask: int64 ``[rows, tokens]``, 1 on the tokens of the prompts.
        cache: of their keys and values.
    """

    first: Tensor
    mask: Tensor
    cache: Any

    def rows(self, rows: Tensor) -> Begun:
        """The chosen rows, repeated where ``rows`` (int64 ``[n]``) repeats; self is kept."""
        rows = rows.to(self.mask.device)
        return Begun(self.first[rows], self.mask[rows], rows_of(self.cache, rows))


@torch.no_grad()
def begin(model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt]) -> Begun:
    """Read ``prompts`` as one batch; ``trace`` is as in ``score``."""
    device = next(model.parameters()).device
    tokens, mask = padded([prompt.tokens for prompt in prompts], "left", device)
    first, cache = _likeliest(model, trace, prompts, [()] * len(prompts), tokens, mask)
    return Begun(first, mask, cache)


@torch.no_grad()
def finish(
    model: PreTrainedModel, trace: Trace, prompts: Sequence[Prompt], begun: Begun
) -> list[list[int]]:
    """The greedy completions of ``prompts``, one or more, which ``begun`` holds row by row.

    Where the model's rotary tables change before the last token, all prompts must be of one length.
    Raises FloatingPointError where logits are not numbers: no token is the likeliest then.
    """
    best, mask, cache = begun.first, begun.mask, begun.cache
    done: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while True:
        going = []
        for place, (row, token) in enumerate(zip(alive, best.tolist(), strict=True)):
            if token == _BROKEN:
                raise FloatingPointError("a logit of a completion is not a number")
            done[row].append(token)
            if len(done[row]) < prompts[row].limit and not prompts[row].stop(done[row]):
                going.append(place)
        if not going:
            return done
        keep = torch.tensor(going, device=mask.device)
        if len(going) < len(alive):
            cache = rows_of(cache, keep)
        alive = [alive[place] for place in going]
        mask = torch.cat((mask[keep], mask.new_ones(len(going), 1)), 1)
        batch, written = [prompts[row] for row in alive], [done[row] for row in alive]
        length = len(batch[0].tokens)
        read = length + len(written[0])
        if one_table(model, read - 1, read):
            best, cache = _likeliest(model, trace, batch, written, best[keep, None], mask, cache)
            continue
        whole = [[*prompt.tokens, *more] for prompt, more in zip(batch, written, strict=True)]
        trace.prompt_length = length
        inputs, mask = padded(whole, "left", mask.device)
        best, cache = _likeliest(model, trace, batch, written, inputs, mask)
        trace.prompt_length = None


def _likeliest(
    model: PreTrainedModel,
    trace: Trace,
    batch: Sequence[Prompt],
    written: Sequence[Sequence[int]],
    inputs: Tensor,
    mask: Tensor,
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """The token to write after each row of ``inputs``, and the cache; see ``forward``.

    ``written`` has the tokens that follow each prompt so far.
    """
    trace.documents = [prompt.document for prompt in batch]
    hidden, cache = forward(model, inputs, mask, cache)
    logits = trace.readout(hidden[:, -1], torch.arange(len(batch), device=inputs.device))
    if any(prompt.rules is not None for prompt in batch):
        logits = torch.stack(
            [
                row.float() if prompt.rules is None else prompt.rules(tokens, row)
                for prompt, tokens, row in zip(batch, written, logits, strict=True)
            ]
        )
    best = logits.argmax(-1)
    # A logit that is no number is the largest to argmax.
    broken = logits.gather(-1, best[:, None])[:, 0].isnan()
    return best.masked_fill(broken, _BROKEN), cache
