"""A method that speculates on the clock: its passes, and what its drafts came to, beside dense's.

A pass is the loop of ``dyndepth.runtime.speculation``: the prompt and its first token, then as many
tokens as dense takes steps, greedily or drawn at temperature 1. It saves bytes and time, no FLOPs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime.acceptance import Round
from dyndepth.runtime.attach import attach
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.draft_costs import DraftCosts, chance, tokens_a_round
from dyndepth.runtime.speculation import speculate
from dyndepth.timing.latency import MS
from dyndepth.timing.pairing import draining
from dyndepth.timing.passes import AS_EVER, How, Side

Row = dict[str, Any]

TEMPERATURES = (0.0, 1.0)
"""At which a method that speculates is timed, and dense beside it."""
LAPS = 3
"""Passes more, on a GPU, whose drafts and verifications are timed one by one."""


class Drafted(Side):
    """A method that speculates, on one shape of one sequence; see ``Side``.

    Attributes:
        rounds: one entry a call of ``around``: the drafts of its pass.
    """

    def __init__(
        self,
        model: nn.Module,
        method: DynamicDepthMethod,
        texts: Sequence[Tensor],
        new_tokens: int,
        how: How = AS_EVER,
        sample: bool = False,
    ) -> None:
        super().__init__(model, method, texts, new_tokens, how, sample=sample)
        self.rounds: list[list[Round]] = []
        self._clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def around(self) -> Iterator[None]:
        """Chooses the text; the method is attached inside."""
        with super().around():
            yield
            self.rounds.append(self.trace.speculation.rounds)

    def _begin(self) -> tuple[Any, Any]:
        assert self.method is not None
        past = DynamicCache()
        (prompt,) = self.tokens.tolist()
        writing = speculate(
            self.model,
            self.trace,
            self.method,
            prompt,
            limit=self.new_tokens + 1,
            choice=self._chosen(),
            cache=past,
            clock=self._clock,
        )
        next(writing)
        return writing, past

    def _chosen(self) -> Choice:
        return Choice(sample=True, generator=self.generator) if self.sample else Choice()

    def _go_on(self, first: Any, past: Any) -> None:
        deque(first, maxlen=0)

    def laps(self, pairs: int) -> list[Round]:
        """Rounds whose seconds are those of the device: of the last ``pairs`` passes, or, where a
        clock that waits for the device would have slowed those, of ``LAPS`` more."""
        if self.place.type == "cpu":
            return [each for one in self.rounds[-pairs:] for each in one]
        drain = draining(self.place)

        def drained() -> float:
            drain()
            return time.perf_counter()

        timed, self._clock = self._clock, drained
        try:
            for _ in range(LAPS):
                with self.around():
                    self.run()
        finally:
            self._clock = timed
        return [each for one in self.rounds[-LAPS:] for each in one]


def columns(
    rounds: Sequence[Round],
    laps: Sequence[Round],
    costs: DraftCosts,
    dense_s: float,
    temperature: float,
    fit_s: float | None,
) -> Row:
    """What is said of drafts in a row of ``decode``.

    ``rounds`` are those of the timed passes, ``laps`` those whose seconds count, ``costs`` by bytes
    and ``dense_s`` the seconds of one step of dense. A prediction takes the lengths that the drafts
    had, and their tokens to be accepted alike, see ``draft_costs.chance``.
    """
    drafted = sum(len(each.drafted) for each in laps)
    draft = sum(each.draft_s for each in laps) / drafted if drafted else None
    verify = sum(each.verify_s for each in laps) / len(laps)
    proposed = sum(len(each.drafted) for each in rounds)
    found: Row = {
        "temperature": temperature,
        "acceptance": sum(each.accepted for each in rounds) / proposed if proposed else None,
        "tokens_per_verify": sum(len(each.tokens) for each in rounds) / len(rounds),
        "draft_ms": None if draft is None else MS * draft,
        "verify_ms": MS * verify,
        "predicted_speedup": predicted(rounds, costs),
        "predicted_by_times": predicted(
            rounds, DraftCosts((draft or 0.0) / dense_s, verify / dense_s)
        ),
        "fit_s": fit_s,
    }
    return found


def no_columns() -> Row:
    """The columns of ``columns`` of what does not draft."""
    rounds = ("acceptance", "tokens_per_verify", "draft_ms", "verify_ms")
    costs = ("predicted_speedup", "predicted_by_times", "fit_s")
    return {"temperature": 0.0, **dict.fromkeys((*rounds, *costs))}


def predicted(rounds: Sequence[Round], costs: DraftCosts) -> float | None:
    """The speedup that the cost model gives drafts of these lengths at the acceptance of these
    rounds; None where nothing was drafted."""
    acceptance = chance(rounds)
    if acceptance is None:
        return None
    lengths = [len(each.drafted) for each in rounds]
    tokens = sum(tokens_a_round(acceptance, length) for length in lengths)
    return tokens / (sum(lengths) * costs.draft + len(lengths) * costs.verify)


def read_costs(
    model: nn.Module, method: DynamicDepthMethod, prompt: Sequence[int], new_tokens: int
) -> DraftCosts:
    """What drafts and verifications cost by bytes, as counted: the weights of every module that a
    pass of eager mode calls in them, over those that one forward of the whole model does, the
    prompt's. What a method runs again after a verification is part of it.

    Embeddings are left out, of which a row is read. ``prompt`` are ids. A draft that drafts nothing
    costs nothing.
    """
    read = {True: 0, False: 0}
    with attach(model, method, count=False, warn=False) as trace:
        handles = [
            module.register_forward_pre_hook(_counting(read, trace, own))
            for module in model.modules()
            if (own := _own_bytes(model, module))
        ]
        try:
            writing = speculate(model, trace, method, prompt, limit=new_tokens + 1)
            next(writing)
            step, read[False] = read[False], 0
            deque(writing, maxlen=0)
        finally:
            for handle in handles:
                handle.remove()
    rounds = trace.speculation.rounds
    drafted = sum(len(each.drafted) for each in rounds)
    if not drafted:
        return DraftCosts(0.0)
    return DraftCosts(read[True] / drafted / step, read[False] / len(rounds) / step)


def _counting(read: dict[bool, int], trace: Any, own: int) -> Callable[..., None]:
    def hook(module: Any, args: Any) -> None:
        read[trace.drafting] += own

    return hook


def _own_bytes(model: nn.Module, module: nn.Module) -> int:
    """Bytes of a module's own weights, none of the embeddings'."""
    if isinstance(module, nn.Embedding) or module is model:
        return 0
    return sum(each.numel() * each.element_size() for each in module.parameters(recurse=False))
