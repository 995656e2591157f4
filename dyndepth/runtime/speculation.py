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
from contextlib import contextmanager, nullcontext
from functools import cache as once
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dyndepth.common.errors import UserError
from dyndepth.method import Draft, DynamicDepthMethod, Verified
from dyndepth.models.blocks import causal_lm
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
    FloatingPointError where the whole model's logits are not numbers.
    """
    loop = _Loop(model, trace, method, list(prompt), choice or Choice(), cache, clock)
    written = loop.written
    if limit < 1:
        return
    with loop.whole():
        yield loop.begin()
        while len(written) < limit and not ends(written):
            loop.draft(limit - len(written) - 1)
            yield loop.verify(ends)


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
        check_croppable(self.cache)
        self.written: list[int] = []
        self.held = int(self.cache.get_seq_length())
        if self.held >= len(prompt):
            raise UserError(
                f"the cache holds {self.held} tokens, and the prompt has {len(prompt)}: one at "
                "least must be left to read"
            )
        self._device = model.get_input_embeddings().weight.device
        self._cache = {cache_argument(model): self.cache}
        self._keeps_logits = keeps_logits(type(causal_lm(model)).forward)
        self._steady = steady(model)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """However this ends, cache and trace are left as between two rounds."""
        try:
            yield
        finally:
            self.trace.drafting = self.trace.verifying = False
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

    def draft(self, most: int) -> None:
        """Up to ``most`` tokens, each int64 ``[]``, with the distributions that they were drawn
        from and the logits behind them; off the cache again."""
        self._started = self.clock()
        self._drafted: list[Tensor] = []
        self._shares: list[Tensor | None] = []
        self._logits: list[Tensor] = []
        self._read: list[float] = []
        drafted = self._drafted
        so_far = list(self.written) if self.choice.rules is not None else []
        self._last = fed = torch.tensor([[self.written[-1]]], device=self._device)
        self.trace.drafting = True
        while len(drafted) < most and self._one_table(len(drafted) + 1) and self._more():
            logits = self._run(fed, 1)[0]
            token, share = self.choice.draw(so_far, logits)
            if self.choice.rules is not None:
                so_far.append(int(token))
            drafted.append(token)
            self._shares.append(share)
            self._logits.append(logits)
            fed = token[None, None].to(self._device)
        self.trace.drafting = False
        if drafted:
            self.cache.crop(-len(drafted))

    def verify(self, ends: Ends) -> tuple[int, ...]:
        """What is written of the draft; the method is told.

        Where this fails, nothing of the round stands.
        """
        between, before = self.clock(), len(self.written)
        drafted = self._drafted
        fed = self._last
        if drafted:
            fed = torch.cat((fed, torch.stack(drafted)[None].to(self._device)), 1)
        replay = self.trace.replay if drafted else None
        self.trace.verifying = True
        with nullcontext() if replay is None else replay.watching():
            logits = self._run(fed, len(drafted) + 1)
        self.trace.verifying = False
        try:
            tokens, accepted, own = self.choice.judge(self.written, drafted, self._shares, logits)
            for token in (*tokens[:accepted], own):
                self.written.append(token)
                if ends(self.written):
                    break
            new = tuple(self.written[before:])
            wrong = len(drafted) + 1 - len(new)
            self.trace.reject(wrong)
            if wrong:
                self.cache.crop(-wrong)
            verified = self.clock()
            if drafted:
                at = () if replay is None else replay.at(self.cache, len(new) - 1)
                self.method.verified(Verified(len(drafted), accepted, self._memory(), *at))
        except BaseException:
            self.trace.reject(len(drafted) + 1)
            del self.written[before:]
            raise
        finally:
            if replay is not None:
                replay.forget()
        self.held += len(new)
        self.trace.speculation.rounds.append(
            Round(
                drafted=tuple(tokens),
                accepted=accepted,
                tokens=new,
                probabilities=tuple(self._read),
                draft_s=between - self._started + self.clock() - verified,
                verify_s=verified - between,
                reran=0 if replay is None else replay.reran,
            )
        )
        return new

    def _run(self, ids: Tensor, rows: int) -> Tensor:
        """Logits ``[rows, vocabulary]`` after the last of ``ids``, int64 ``[1, tokens]``."""
        last_only = {"logits_to_keep": rows} if self._keeps_logits else {}
        out = self.model(ids, **self._cache, use_cache=True, **last_only)
        found: Tensor = out.logits[0, -rows:]
        return found

    def _one_table(self, drafted: int) -> bool:
        """Whether so many tokens are read by the same rotary tables as the one before them."""
        read = len(self.prompt) + len(self.written)
        return self._steady or one_table(self.model, read, read + drafted)

    def _more(self) -> bool:
        return self.method.more(Draft(len(self._drafted), self._probabilities, self._memory()))

    def _probabilities(self) -> list[float]:
        for place in range(len(self._read), len(self._drafted)):
            share = self._logits[place].float().softmax(-1)[self._drafted[place]]
            # A draft may overflow: what is not a number is nothing to go on with.
            self._read.append(float(share.nan_to_num(0.0)))
        return list(self._read)

    def _memory(self) -> dict[str, Tensor]:
        kept = kept_with(self.cache)
        return {} if kept is None else kept.memory


def check_croppable(cache: Any) -> None:
    """Raises UserError for a cache whose last tokens cannot be taken off again."""
    for layer in getattr(cache, "layers", [cache]):
        # One that keeps tokens in a way of its own (a window, quantised) does not give them back.
        kept = isinstance(layer, DynamicLayer) and type(layer).update is DynamicLayer.update
        if not kept:
            raise UserError(
                f"a {type(layer).__name__} of the cache cannot give up drafted tokens; leave the "
                "cache out, or give a DynamicCache() that was made without a configuration, which "
                "keeps all tokens"
            )


@once
def keeps_logits(forward: Callable[..., Any]) -> bool:
    """Whether a model's ``forward`` can be asked for the logits of its last tokens alone."""
    return "logits_to_keep" in signature(forward).parameters
