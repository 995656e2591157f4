"""The passes that are timed: a prefill and steps over its cache, dense or with a method.

In eager mode dense is the stock model. Where decoding is replayed from CUDA graphs, dense is so as
well: a method that executes everything (``jobs.whole``) is attached in the same way.

``rescore`` scores documents with the very same passes: what is timed can be shown to be what was
scored.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.common.modes import EAGER
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach
from dyndepth.runtime.speculation import keeps_logits
from dyndepth.timing.busy import busy_of
from dyndepth.timing.memory import Peak, cache_bytes, peaks
from dyndepth.timing.pairing import draining

PHASES = {"prefill": "prompt", "decode": "generation"}
"""The timed phases, and what a trace calls them."""

Document = tuple[Any, ...]
"""(context ids, continuation ids, scored log-likelihood), and the document's id if it has one."""

How = Mapping[str, Any]
"""What ``attach`` is told of the mode; nothing in eager mode."""
AS_EVER: How = {}


@contextmanager
def running(mode: str) -> Iterator[How]:
    """How to attach in ``mode``; graphs that are captured are kept to the end of the block."""
    if mode == EAGER:
        yield AS_EVER
        return
    from dyndepth.runtime.graphs import Graphs

    with Graphs() as graphs:
        yield {"mode": graphs}


Call = Callable[..., Any]
"""What is called in the place of a model, with the same words: the model itself, or compiled."""
Choose = Callable[[Tensor], Tensor]
"""``logits [batch, vocabulary] -> ids [batch, 1]``."""


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each sequence, ids ``[batch, 1]``."""
    return logits.argmax(-1, keepdim=True)


def drawn(generator: torch.Generator) -> Choose:
    """Draws each sequence's token at temperature 1."""
    return lambda logits: torch.multinomial(logits.float().softmax(-1), 1, generator=generator)


def prefill(model: nn.Module, tokens: Tensor, call: Call | None = None) -> tuple[Tensor, Any]:
    """Logits of the last position ``[batch, vocabulary]`` and the cache, as a generation begins.

    ``tokens`` are ids, int64 ``[batch, length]``.
    """
    last_only = {"logits_to_keep": 1} if keeps_logits(type(model).forward) else {}
    out = (model if call is None else call)(tokens, use_cache=True, **last_only)
    return out.logits[:, -1], cache_of(out)


def first_token(
    model: nn.Module, tokens: Tensor, call: Call | None = None, choose: Choose = likeliest
) -> tuple[Tensor, Any]:
    """The token after ``tokens``, ids ``[batch, 1]``, and the cache; see ``prefill``."""
    logits, past = prefill(model, tokens, call)
    return choose(logits), past


def step(model: nn.Module, cache: Any, token: Tensor, call: Call | None = None) -> Tensor:
    """Logits ``[batch, vocabulary]`` after one more token, ids ``[batch, 1]``; the cache grows."""
    run = model if call is None else call
    return run(token, **{cache_argument(model): cache}, use_cache=True).logits[:, -1]


def decode(
    model: nn.Module,
    cache: Any,
    token: Tensor,
    steps: int,
    call: Call | None = None,
    choose: Choose = likeliest,
) -> Tensor:
    """Feed ``token`` and then what is chosen, ``steps`` times; returns the next token.

    An end of sequence changes nothing: a method must not win by stopping early.
    """
    for _ in range(steps):
        token = choose(step(model, cache, token, call))
    return token


class Stopwatch:
    """Seconds of named laps by the host's clock.

    Attributes:
        host: by lap, end to end, the device's queue drained at both ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.host: dict[str, list[float]] = defaultdict(list)
        self._synchronise = draining(device)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self._synchronise()
        started = time.perf_counter()
        yield
        self._synchronise()
        self.host[name].append(time.perf_counter() - started)


class Side:
    """One side of the pairs on one shape: the stock model, or a method attached to it.

    ``around`` attaches and reads the ledger, outside of the clock; ``run`` is what is timed,
    ``busy`` the same under a profiler, and ``peaks`` the same for its memory. Each call takes the
    next text: two sides that are called in turn get the same ones. ``how`` is what ``attach`` is
    told of the mode; ``call`` is called in the place of the stock model; with ``sample`` tokens are
    drawn at temperature 1, of a text always the same way.

    Attributes:
        phases: that a pass has, of ``PHASES``.
        watch: a lap for each of them, warm-up included.
        totals: one entry a call, the ledger's totals by lap; empty for the stock model.
        texts: batches ``[batch, length]``, as they were given.
        kept: one entry a run, by phase the bytes of keys and values at its end (None: unknown).
    """

    def __init__(
        self,
        model: nn.Module,
        method: DynamicDepthMethod | None,
        texts: Sequence[Tensor],
        new_tokens: int,
        how: How = AS_EVER,
        call: Call | None = None,
        sample: bool = False,
    ) -> None:
        self.model, self.method, self.new_tokens, self.how = model, method, new_tokens, how
        self.phases = tuple(PHASES) if new_tokens else ("prefill",)
        self.place = next(model.parameters()).device
        self.watch = Stopwatch(self.place)
        self.totals: list[dict[str, dict[str, Any]]] = []
        self.kept: list[dict[str, int | None]] = []
        self.texts, self.sample, self._call = texts, sample, call
        self._choose: Choose = likeliest
        self.restart()

    def restart(self) -> None:
        """Begin with the first text again."""
        self._next = cycle(enumerate(self.texts))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Chooses the text; the method is attached inside."""
        self.number, self.tokens = next(self._next)
        if self.sample:
            self.generator = torch.Generator(self.place).manual_seed(self.number)
            self._choose = drawn(self.generator)
        if self.method is None:
            yield
            return
        documents = [f"text {self.number}, row {row}" for row in range(len(self.tokens))]
        with attach(self.model, self.method, documents=documents, warn=False, **self.how) as trace:
            self.trace = trace
            yield
            self.totals.append({lap: trace.totals(phase) for lap, phase in PHASES.items()})

    def run(self) -> None:
        """A prompt with the first token's choice, and ``new_tokens`` steps, a lap each."""
        with self.watch.lap("prefill"):
            first, past = self._begin()
        kept = {"prefill": cache_bytes(past)}
        if self.new_tokens:
            with self.watch.lap("decode"):
                self._go_on(first, past)
            kept["decode"] = cache_bytes(past)
        self.kept.append(kept)

    def _begin(self) -> tuple[Any, Any]:
        """What a prefill leaves: what the steps begin with, and the cache."""
        return first_token(self.model, self.tokens, self._call, self._choose)

    def _go_on(self, first: Any, past: Any) -> None:
        """The steps."""
        decode(self.model, past, first, self.new_tokens, self._call, self._choose)

    def busy(self) -> dict[str, float | None]:
        """Seconds that the device works in each phase of one pass more; see ``busy.busy_of``."""
        return {name: busy_of(part, self.place) for name, part in self._parts().items()}

    def peaks(self) -> dict[str, Peak]:
        """Peak memory in each phase of one pass more; see ``memory.peaks``."""
        with self.around():
            places = list(dict.fromkeys(each.device for each in self.model.parameters()))
            return peaks(self._parts(), places)

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """The phases of a pass, to be run in this order."""
        begun: list[tuple[Any, Any]] = []
        parts: dict[str, Callable[[], Any]] = {"prefill": lambda: begun.append(self._begin())}
        return parts | ({"decode": lambda: self._go_on(*begun.pop())} if self.new_tokens else {})


@torch.inference_mode()
def rescore(
    model: nn.Module,
    method: DynamicDepthMethod,
    documents: Sequence[Document],
    how: How = AS_EVER,
) -> list[float]:
    """Log-likelihood of each document's continuation, by a timed prefill and timed steps.

    Each document runs alone and costs one step a token of its continuation.
    """
    device = next(model.parameters()).device
    found = []
    for context, continuation, _, *name in documents:
        named = [str(name[0])] if name else None
        with attach(model, method, documents=named, warn=False, **how):
            logits, past = prefill(model, torch.tensor([list(context)], device=device))
            total = 0.0
            for place, token in enumerate(continuation):
                if place:
                    fed = torch.tensor([[continuation[place - 1]]], device=device)
                    logits = step(model, past, fed)
                total += float(logits[0].float().log_softmax(-1)[token])
            found.append(total)
    return found


def attach_seconds(
    model: nn.Module, method: DynamicDepthMethod, how: How = AS_EVER, repeats: int = 5
) -> float:
    """Median seconds to attach and detach, which no timed call holds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with attach(model, method, warn=False, **how):
            pass
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[repeats // 2]
