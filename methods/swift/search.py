"""The search for the sublayers that a draft leaves out, and the texts that it is scored on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from dyndepth.common.errors import UserError
from dyndepth.fitting.removal import plan_without
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity, Phases
from dyndepth.models.blocks import blocks
from dyndepth.models.caches import cache_argument
from dyndepth.models.rotary import forget
from dyndepth.runtime.attach import attach

Score = Callable[[Tensor], float]
"""Of a plan, bool ``[layers, 2]``: the higher the better, 1 at most."""


@dataclass(kw_only=True)
class _Plan(DynamicDepthMethod):
    """Runs ``plan`` in generated tokens."""

    name: ClassVar[str] = "one plan"
    granularity: ClassVar[Granularity] = "static"
    paper: ClassVar[str] = "none"

    plan: Tensor

    @property
    def phases(self) -> Phases:
        """The prompt is always read in full."""
        return "generation"

    def start(self, context: ForwardContext) -> Tensor:
        """The plan."""
        return self.plan


@contextmanager
def matchness(model: nn.Module, prompts: Tensor, window: int) -> Iterator[Score]:
    """Inside, scores plans: the share of tokens at which the likeliest under the plan is the whole
    model's.

    The texts are what the whole model writes after ``prompts``, int64 ``[prompts, length]``:
    ``window`` + 1 tokens, greedily, an end of text among them or not. A plan reads the first
    ``window`` of each in one forward, over keys and values of the prompt at full depth.
    """
    device = next(model.parameters()).device
    cache: Any = DynamicCache()
    given: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    prompts = prompts.to(device)
    forget(model)
    method = _Plan(plan=torch.ones(len(blocks(model)), 2, dtype=torch.bool))
    with torch.no_grad(), attach(model, method, count=False, warn=False):
        written = [model(prompts, **given).logits[:, -1].argmax(-1)]
        for _ in range(window):
            written.append(model(written[-1][:, None], **given).logits[:, -1].argmax(-1))
        texts = torch.stack(written, 1)
        cache.crop(-window)

        def score(plan: Tensor) -> float:
            method.plan = plan
            found = model(texts[:, :-1], **given).logits.argmax(-1)
            cache.crop(-window)
            return float((found == texts[:, 1:]).double().mean())

        yield score


@dataclass(frozen=True)
class Search:
    """How sets are tried.

    Attributes:
        target: dense block FLOPs / executed ones; for ``count``, sublayers instead of FLOPs.
        budget: what the target is met in.
        kind: ``climb``: tries change the best set by one sublayer in and one out, every ``every``th
            is a random set; ``random``: all are random sets.
        tries, misses, enough: the search ends after so many, after so many that were no better than
            the best, or with a score above that.
    """

    target: float
    seed: int
    budget: Literal["flops", "count"] = "flops"
    kind: Literal["climb", "random"] = "climb"
    tries: int = 1000
    misses: int = 300
    enough: float = 0.95
    every: int = 25


@dataclass
class Found:
    """What a search came to.

    Attributes:
        removed: places of the sublayers that are left out, ``2 * layer``, and 1 more for the MLP.
        score: its score; ``first`` that of the set that was tried first.
        ended: ``enough``, ``misses`` or ``tries``.
        curve: of each try its ``score``, the ``best`` so far, and the share of the block FLOPs that
            is ``executed``, beside the ``wanted`` one.
    """

    removed: list[int]
    score: float
    first: float
    ended: str = "tries"
    curve: list[dict[str, float]] = field(default_factory=list)


def find(score: Score, shares: Tensor, settings: Search, *, progress: bool = True) -> Found:
    """The set with the highest score of all that are tried; the earlier of two alike.

    ``shares`` ``[layers, 2]`` are the sublayers' shares of the block FLOPs. The first and the last
    block stay. The first set that is tried is of blocks 1, 3, 5, ..., drawn among them where fewer
    have to go, and among the others where more do. Raises UserError for a target out of reach.
    """
    sets = _Sets(shares, settings)
    draw = random.Random(settings.seed)
    best = sets.first(draw)
    found = Found(best[: sets.size(best)], -1.0, 0.0)
    known: dict[frozenset[int], float] = {}
    since = 0
    bar = tqdm(total=settings.tries, desc="sets", unit="set", disable=not progress)
    with bar:
        for number in range(settings.tries):
            order = best if not number else sets.next(best, number, draw)
            removed = order[: sets.size(order)]
            plan = plan_without(len(shares), [(place,) for place in removed])
            value = known.get(frozenset(removed), -1.0)
            if value < 0:
                value = known[frozenset(removed)] = score(plan)
            if not number:
                found.first = value
            since += 1
            if value > found.score:
                best, since = order, 0
                found.removed, found.score = sorted(removed), value
            executed = float(shares[plan].sum() / shares.sum())
            wanted = 1 / settings.target
            row = {"score": value, "best": found.score, "executed": executed, "wanted": wanted}
            found.curve.append(row)
            bar.update()
            bar.set_postfix(best=f"{found.score:.3f}")
            if found.score > settings.enough or not removed:
                found.ended = "enough"
                break
            if since >= settings.misses:
                found.ended = "misses"
                break
    return found


class _Sets:
    """Sets as orders: all that may go, of which the first go, as many as the budget says."""

    def __init__(self, shares: Tensor, settings: Search) -> None:
        layers = len(shares)
        self.inner = list(range(2, 2 * layers - 2))
        self.settings = settings
        self._cost = (shares.double() / shares.sum()).flatten().tolist()
        if settings.budget == "count":
            self._cost = [1 / (2 * layers)] * (2 * layers)
        left = 1 - sum(self._cost[place] for place in self.inner)
        if left > 1 / settings.target + 1e-6:
            raise UserError(
                f"the first and the last block stay, so that {layers} blocks allow a speedup of at "
                f"most {1 / left:.4g}, not {settings.target:g}; ask for less"
            )

    def size(self, order: Sequence[int]) -> int:
        """How many of the first of ``order`` go: what is left is then nearest to the budget."""
        left, count = 1.0, 0
        wanted = 1 / self.settings.target
        for place in order:
            after = left - self._cost[place]
            if abs(after - wanted) >= abs(left - wanted) - 1e-9:
                break
            left, count = after, count + 1
        return count

    def first(self, draw: random.Random) -> list[int]:
        """Blocks 1, 3, 5, ... before the others."""
        inner = list(range(1, len(self.inner) // 2 + 1))
        odd, even = inner[::2], inner[1::2]
        draw.shuffle(odd)
        draw.shuffle(even)
        return [place for block in (*odd, *even) for place in (2 * block, 2 * block + 1)]

    def next(self, best: Sequence[int], number: int, draw: random.Random) -> list[int]:
        """The order of a try: a random one, or the best with one of each side changed."""
        order, goes = list(best), self.size(best)
        alone = self.settings.kind == "random" or number % self.settings.every == 0
        if alone or not 0 < goes < len(order):
            draw.shuffle(order)
            return order
        out, into = draw.randrange(goes), draw.randrange(goes, len(order))
        order[out], order[into] = order[into], order[out]
        return order
