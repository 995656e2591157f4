"""Speculation: part of the model drafts, all of it verifies, over one cache.

A draft runs the method's gates, token by token; layers that it leaves out count its tokens without
storing them. It is then cropped off the cache, and one forward of the whole model over the last
token and the drafted ones stores what stands; what does not stand is cropped in turn. So what is
written is what the whole model writes: greedily token by token, rounding apart (a verification
reads several tokens at once, by other kernels than a step does), and in distribution where tokens
are drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once
from inspect import signature
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dyndepth.common.errors import UserError
from dyndepth.method import Draft, DynamicDepthMethod, Verified
from dyndepth.models.caches import cache_argument
from dyndepth.models.rotary import one_table, steady
from dyndepth.runtime.acceptance import Round
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.memory import kept_with
from dyndepth.runtime.trace import Trace

Ends = Callable[[Sequence[int]], bool]
"""Whether the last of these tokens, all that were written, ends the text."""


@torch.no_grad()
def speculate(
    model: Any,
    trace: Trace,
    method: DynamicDepthMethod,
    prompt: Sequence[int],
    *,
    limit: int,
    ends: Ends = lambda written: False,
    choice: Choice | None = None,
    cache: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[int, ...]]:
    """Write after ``prompt``, token ids, of which ``cache`` may hold the first: the tokens of a
    round at a time, those of the first the prompt's one.

    ``method``, which speculates, is attached to ``model``; ``trace`` is what ``attach`` gave. At
    most ``limit`` tokens are written; ``choice`` says how, greedily by default. The rounds after
    the first go into ``trace.speculation``, with seconds by ``clock``.

    However it ends, also by an exception inside a draft, the cache then holds the prompt and what
    was written but for the last token, and no draft is under way.

    Raises UserError for a cache that cannot be cropped, or holds all of the prompt;
    FloatingPointError where logits are not numbers.
    """
    loop = _Loop(model, trace, method, list(prompt), choice or Choice(), cache, clock)
    written = loop.written
    with loop.whole():
        yield loop.begin()
        while len(written) < limit and not ends(written):
            drafted, shares = loop.draft(limit - len(written) - 1)
            yield loop.verify(drafted, shares, ends)


class _Loop:
    """One text that is being written.

    Attributes:
        written: the tokens so far.
        held: tokens of prompt and text that are in the cache for good.
    """

    def __init__(
        self,
        model: Any,
        trace: Trace,
        method: DynamicDepthMethod,
        prompt: list[int],
        choice: Choice,
        cache: Any,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.trace, self.method, self.choice = model, trace, method, choice
        self.clock, self.prompt = clock, prompt
        self.cache = DynamicCache() if cache is None else cache
        _check_croppable(self.cache)
        self.written: list[int] = []
        self.held = int(self.cache.get_seq_length())
        if self.held >= len(prompt):
            raise UserError(
                f"the cache holds {self.held} tokens, and the prompt has {len(prompt)}: one at "
                "least must be left to read"
            )
        self._device = model.get_input_embeddings().weight.device
        self._cache = {cache_argument(model): self.cache}
        self._steady = steady(model)
        self._started = clock()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """However this ends, cache and trace are left as between two rounds."""
        try:
            yield
        finally:
            self.trace.drafting = False
            layers: Any = self.cache.layers
            for layer in layers:
                over = layer.get_seq_length() - self.held
                if over > 0:
                    layer.crop(-over)

    def begin(self) -> tuple[int, ...]:
        """Read the prompt; the first token."""
        logits = self._run(torch.tensor([self.prompt[self.held :]], device=self._device), 1)
        _, _, token = self.choice.judge(self.written, [], [], logits)
        self.held = len(self.prompt)
        self.written.append(token)
        return (token,)

    def draft(self, most: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Up to ``most`` tokens, each int64 ``[]``, and the distributions that they were drawn
        from; off the cache again."""
        self._started = self.clock()
        most = self._within_one_table(most)
        drafted: list[Tensor] = []
        shares: list[Tensor | None] = []
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._read: list[float] = []
        fed = torch.tensor([[self.written[-1]]], device=self._device)
        self.trace.drafting = True
        while len(drafted) < most and self.method.more(
            Draft(len(drafted), self._probabilities, self._memory())
        ):
            logits = self._run(fed, 1)[0]
            so_far: list[int] = []
            if self.choice.rules is not None:
                so_far = [*self.written, *(int(each) for each in drafted)]
            token, share = self.choice.draw(so_far, logits)
            drafted.append(token)
            shares.append(share)
            self._seen.append((token, logits))
            fed = token[None, None]
        self.trace.drafting = False
        if drafted:
            self.cache.crop(-len(drafted))
        return drafted, shares

    def verify(
        self, drafted: Sequence[Tensor], shares: Sequence[Tensor | None], ends: Ends
    ) -> tuple[int, ...]:
        """What is written of a draft; the method is told."""
        between = self.clock()
        last = torch.tensor([self.written[-1]], device=self._device)
        fed = torch.cat((last, *(each[None] for each in drafted)))[None]
        logits = self._run(fed, len(drafted) + 1)
        tokens, accepted, own = self.choice.judge(self.written, drafted, shares, logits)
        new: list[int] = []
        for token in (*tokens[:accepted], own):
            new.append(token)
            self.written.append(token)
            if ends(self.written):
                break
        wrong = len(drafted) + 1 - len(new)
        if wrong:
            self.trace.reject(wrong)
            self.cache.crop(-wrong)
        self.held += len(new)
        finished = self.clock()
        self.trace.speculation.rounds.append(
            Round(
                drafted=tuple(tokens),
                accepted=accepted,
                tokens=tuple(new),
                probabilities=tuple(self._read),
                draft_s=between - self._started,
                verify_s=finished - between,
            )
        )
        if drafted:
            self.method.verified(Verified(len(drafted), accepted, self._memory()))
        return tuple(new)

    def _run(self, ids: Tensor, rows: int) -> Tensor:
        """Logits ``[rows, vocabulary]`` after the last of ``ids``, int64 ``[1, tokens]``."""
        last_only = {"logits_to_keep": rows} if _keeps_logits(type(self.model).forward) else {}
        out = self.model(ids, **self._cache, use_cache=True, **last_only)
        found: Tensor = out.logits[0, -rows:]
        return found

    def _within_one_table(self, most: int) -> int:
        """As many of ``most`` tokens as are read by the same rotary tables as the next one."""
        if self._steady:
            return most
        read = len(self.prompt) + len(self.written)
        return next(n for n in count(most, -1) if n <= 0 or one_table(self.model, read, read + n))

    def _probabilities(self) -> list[float]:
        for token, logits in self._seen[len(self._read) :]:
            self._read.append(float(logits.float().softmax(-1)[token]))
        return list(self._read)

    def _memory(self) -> dict[str, Tensor]:
        kept = kept_with(self.cache)
        return {} if kept is None else kept.memory


def _check_croppable(cache: Any) -> None:
    """Raises UserError for a cache whose last tokens cannot be taken off again."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.is_sliding:
            raise UserError(
                f"a {type(layer).__name__} of the cache cannot give up drafted tokens; leave the "
                "cache out, or give a DynamicCache() that was made without a configuration, which "
                "keeps all tokens"
            )


@once
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in signature(forward).parameters
