"""A method's text beside dense's, and which of the two came sooner: roughly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyndepth.runtime.attach import attach
from dyndepth.timing.pairing import interleave
from dyndepth.writing.generate import tokens_after
from dyndepth.writing.settings import Settings

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.writing.result import Generated

PAIRS = 3
"""Few enough to wait for, and too few for an interval: ``python -m dyndepth.timing`` has one."""


@dataclass(frozen=True)
class Comparison:
    """Two texts after one prompt.

    Attributes:
        text: dense's.
        same: how many tokens are the same, from the first.
        equal: whether all are.
        dense_s, method_s: medians of the seconds that each took.
        ratios: dense's seconds / the method's, a pair each.
    """

    text: str
    same: int
    equal: bool
    dense_s: float
    method_s: float
    ratios: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Their median: above 1 the method was faster."""
        return sorted(self.ratios)[len(self.ratios) // 2]

    def statistics(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            "dense_text": self.text,
            "equal": self.equal,
            "same_tokens": self.same,
            "rough": {
                "pairs": len(self.ratios),
                "dense_s": self.dense_s,
                "method_s": self.method_s,
                "speedup": self.speedup,
                "lowest": min(self.ratios),
                "highest": max(self.ratios),
            },
        }


def compared(
    model: Any,
    method: DynamicDepthMethod,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: Settings,
    text: Generated,
    dense: Generated,
    *,
    pairs: int = PAIRS,
) -> Comparison:
    """``text``, the method's after ``prompt``, beside ``dense``, the stock model's, and both
    written again in turns, ``pairs`` times each, without counting FLOPs."""

    def again() -> None:
        tokens_after(model, tokenizer, prompt, settings)

    def under() -> AbstractContextManager[Any]:
        return attach(model, method, count=False, warn=False)

    device = next(model.parameters()).device
    both = {"dense": again, "method": again}
    times = interleave(both, around={"method": under}, repeats=pairs, warmup=1, device=device)
    same = next(
        (i for i, (a, b) in enumerate(zip(text.tokens, dense.tokens, strict=False)) if a != b),
        min(len(text.tokens), len(dense.tokens)),
    )
    pairs_of = zip(times["dense"], times["method"], strict=True)
    return Comparison(
        text=dense.text,
        same=same,
        equal=text.tokens == dense.tokens,
        dense_s=_middle(times["dense"]),
        method_s=_middle(times["method"]),
        ratios=tuple(one / other for one, other in pairs_of),
    )


def _middle(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]
