"""SkipDecode: the further a text is written, the fewer blocks its tokens run.

Idea: later tokens of an answer are easier; a depth that follows position alone, and never rises, is
the same for a whole column of a batch and leaves no token without keys and values that it needs.
Paper: SkipDecode, arXiv 2307.02628.
Rule: with L blocks and g the number of tokens since the prompt ended, a token runs
    A(g) = round(max - (max - min) min(g, G - 1) / (G - 1))
blocks: the first ``warm_up`` and the last A(g) - ``warm_up``. ``max`` is all blocks unless
``maximum`` says less; ``min`` follows from the target: the mean of A over G = ``positions`` is
L / speedup, up to the rounding of A. Where ``min`` would fall below ``warm_up`` + 1, ``max`` falls
instead. With G = 1, A is the same throughout. ``variant=adaskip`` is the one that AdaSkip's code
compares itself to (arXiv 2501.02336): blocks 1 to k are skipped, with k the smaller of n and
ceil(g / G (n - 1)) + 1, and the n that comes nearest to the target, to half a block.
Granularity: token, by position alone. Phases: generation; the prompt runs in full. A
multiple-choice answer is a few tokens long and saves next to nothing: score it on written and long
texts. A text of fewer than G tokens achieves less than the target, a longer one more.
KV policy: project; a token skips only what all later ones skip, too, so nobody reads what it kept.
``kv=evict`` keeps nothing, with the same result.
Deviations: the paper trains the whole model for its schedule; here that is optional and low-rank
(``--recovery lora``). Its formula is known to us from summaries alone. G, 256 by default, is a
setting, where the reference takes the longest text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.method import (
    DynamicDepthMethod,
    ForwardContext,
    Gate,
    Granularity,
    KVPolicy,
    Phases,
)


@dataclass(kw_only=True)
class SkipDecode(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        variant: ``paper``, or ``adaskip``.
        positions: G, over which the depth falls; it stays from there on.
        warm_up: first blocks, which always run; 1 for ``adaskip``.
        maximum: blocks of the first token; None: as many as the target allows. Of ``paper`` alone.
        kv: what becomes of keys and values of skipped attentions.
    """

    name: ClassVar[str] = "skipdecode"
    granularity: ClassVar[Granularity] = "token"
    paper: ClassVar[str] = "arXiv 2307.02628"
    capturable: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"positions": 16}

    variant: Literal["paper", "adaskip"] = "paper"
    positions: int = 256
    warm_up: int = 1
    maximum: int | None = None
    kv: Literal["project", "evict"] = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positions", "warm_up", "maximum"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.variant == "adaskip" and (self.warm_up != 1 or self.maximum is not None):
            raise ValueError("warm_up and maximum are of variant=paper alone")
        self._held: dict[Any, Tensor] = {}

    @property
    def phases(self) -> Phases:
        """What is the prompt is no matter of position."""
        return "generation"

    @property
    def kv_policy(self) -> KVPolicy:
        """The field ``kv``."""
        return self.kv

    def max_speedup(self, layers: int) -> float:
        """The first blocks and the last one alone; ``adaskip``: the mean of its steepest fall."""
        if self.variant == "paper":
            return layers / min(layers, self.warm_up + 1)
        return layers * self.positions / sum(_adaskip(layers, layers - 2, self.positions))

    def depths(self, layers: int) -> tuple[int, ...]:
        """A(g) for g = 0 .. G - 1, of a model of ``layers`` blocks. Raises UserError for a target
        out of reach, or a ``maximum`` that cannot meet it."""
        most = self.max_speedup(layers)
        if self.target_speedup > most:
            raise UserError(
                f"skipdecode keeps the first blocks and the last one, so {layers} blocks allow a "
                f"speedup of at most {most:.4g}, not {self.target_speedup:g}"
            )
        mean = layers / self.target_speedup
        if self.variant == "adaskip":
            return _nearest(layers, mean, self.positions)
        highest, least = self.maximum or layers, min(layers, self.warm_up + 1)
        if not mean <= highest <= layers:
            raise UserError(
                f"skipdecode: maximum={highest} of {layers} blocks can't make a mean of {mean:.4g}"
                f" for {self.target_speedup:g}x; give one between them, or leave it out"
            )
        lowest = max(2 * mean - highest, least)
        return _linear(2 * mean - lowest, lowest, self.positions)

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan where all tokens have one depth that is known on the host, else none."""
        self.context = context
        depths, prompt = self.depths(context.layers), context.prompt_real
        if context.tokens == 1 and context.past_real is None and isinstance(prompt, int):
            age = max(0, context.past_length - prompt)
            depth = depths[min(age, self.positions - 1)]
            plan = [self._runs(layer, depth) for layer in range(context.layers)]
            return torch.tensor(plan)[:, None].repeat(1, 2)
        table = torch.tensor(depths, device=context.device)
        self._depth = table[context.generated.clamp_max(self.positions - 1)]
        if context.tokens == 1:  # where a recorded step finds it
            key = context.batch, context.device
            with torch.inference_mode(False):
                held = self._held.setdefault(key, self._depth.new_empty(context.batch, 1))
                self._depth = held.copy_(self._depth)
        return None

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """One gate for both sublayers."""
        if layer < self.warm_up:
            return True, True
        runs = self._runs(layer, self._depth.to(hidden.device))
        return runs, runs

    def _runs(self, layer: int, depth: Any) -> Any:
        """Whether a block runs for tokens of this depth."""
        first = self.context.layers + self.warm_up - depth
        return layer < self.warm_up or layer >= first


@lru_cache
def _linear(highest: float, lowest: float, positions: int) -> tuple[int, ...]:
    """Blocks at each position; both ends' mean where there is but one."""
    if positions == 1:
        return (round((highest + lowest) / 2),)
    fall = (highest - lowest) / (positions - 1)
    return tuple(round(highest - fall * age) for age in range(positions))


def _adaskip(layers: int, skipped: int, positions: int) -> tuple[int, ...]:
    """Blocks at each position where at most ``skipped`` are left out."""
    ends = (ceil(age * (skipped - 1) / positions) + 1 for age in range(positions))
    return tuple(layers - max(0, min(skipped, end)) for end in ends)


@lru_cache
def _nearest(layers: int, mean: float, positions: int) -> tuple[int, ...]:
    """The schedule of AdaSkip's code whose mean is nearest to ``mean``."""
    found = (_adaskip(layers, skipped, positions) for skipped in range(max(1, layers - 1)))
    return min(found, key=lambda depths: abs(sum(depths) / positions - mean))
