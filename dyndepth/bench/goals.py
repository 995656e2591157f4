"""What the parts ``shapes`` and ``lossless`` of ``python -m dyndepth.bench`` are to reach, and
whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isnan

from dyndepth.bench.lines import MORE_WORKS, REFERENCE, WORKS, Line, Lines


@dataclass(frozen=True)
class Goal:
    """A bound on ``quantity`` of all lines whose name, work/phase/dtype, matches ``lines``.

    ``at_most`` makes it an upper bound, else it is a lower one.
    """

    lines: str
    quantity: str
    bound: float
    at_most: bool = False


GOALS = (
    Goal("all_execute/*", "speedup", 0.98),
    Goal("static_*/prefill_*", "efficiency", 0.97),
    Goal("static_*/decode_1/*", "efficiency", 0.97),
    Goal("mask_75/prefill_1x512/float32", "efficiency", 0.93),
    Goal("mask_50/prefill_1x512/float32", "efficiency", 0.89),
    Goal("mask_75/prefill_8x256/float32", "efficiency", 0.94),
    Goal("mask_50/prefill_8x256/float32", "efficiency", 0.90),
    Goal("mask_75/prefill_*/bfloat16", "efficiency", 0.83),
    Goal("mask_50/prefill_*/bfloat16", "efficiency", 0.78),
    Goal("mask_75/decode_1/*", "efficiency", 0.94),
    Goal("mask_50/decode_1/*", "efficiency", 0.92),
    Goal("early_exit_half/prefill_*/float32", "efficiency", 0.88),
    Goal("mask_75/decode_8/*", "speedup", 0.98),
    Goal("mask_50/decode_8/*", "speedup", 0.98),
    *(
        Goal(f"{work}/*", "peak_ratio", 1.05, at_most=True)
        for work in (*WORKS, *MORE_WORKS)
        if work != REFERENCE
    ),
)
"""Where no other is named, in all shapes and dtypes."""
GPU_GOALS = (
    Goal("all_execute/prefill_*2048/*", "speedup", 0.98),
    Goal("all_execute/prefill_1x512/*", "speedup", 0.96),
    Goal("all_execute/decode_*", "speedup", 0.96),
    Goal("static_*", "efficiency", 0.97),
    Goal("mask_50/prefill_8x2048/*", "speedup", 1.62),
    Goal("mask_50/prefill_1x2048/*", "speedup", 1.50),
    Goal("mask_75/prefill_8x2048/*", "speedup", 1.20),
    Goal("mask_75/prefill_1x2048/*", "speedup", 1.12),
    Goal("mask_50/decode_1x512/*/graphs", "speedup", 1.45),
    Goal("mask_*/*/graphs", "speedup", 0.97),
    Goal("early_exit_half/*/graphs", "speedup", 0.97),
    Goal("early_exit_half/prefill_8x2048/*", "speedup", 1.62),
)
"""For the reference shape (``dyndepth.models.shapes.shape_for``) in bfloat16 on an H100 or H200.
Efficiency in decode is of the FLOP ideal."""

LOSSLESS_GOALS = (Goal("overhead/*", "ratio", 1.05, at_most=True),)
"""Of the part ``lossless``."""

MET, UNCERTAIN, MISSED = "met", "missed within noise", "missed"


@dataclass(frozen=True)
class Check:
    """A goal on one line; ``verdict`` is MET, MISSED, or UNCERTAIN where the median misses the
    bound and the end of its 95% interval does not."""

    line: str
    goal: Goal
    value: float
    verdict: str

    def __str__(self) -> str:
        sign = "<=" if self.goal.at_most else ">="
        name = f"{self.line} {self.goal.quantity}"
        return f"{name:58}{self.value:7.3f} {sign} {self.goal.bound:.2f}  {self.verdict}"


def check(lines: Lines, goals: Sequence[Goal] = GOALS) -> Iterator[Check]:
    """Each goal on each measured line that it speaks of, in the order of the lines; not where its
    quantity is NaN, which was not measured."""
    for name, line in lines.items():
        for goal in goals:
            if fnmatchcase(name, goal.lines) and not isnan(value := line[goal.quantity]):
                yield Check(name, goal, value, _verdict(goal, value, line))


def _verdict(goal: Goal, value: float, line: Line) -> str:
    if value <= goal.bound if goal.at_most else value >= goal.bound:
        return MET
    # Peak memory has no noise; an interval that is missing is NaN and compares as False.
    if goal.quantity == "ratio":
        return UNCERTAIN if line["low"] <= goal.bound else MISSED
    scale = {"speedup": 1.0, "efficiency": line.get("flop_ideal")}.get(goal.quantity)
    return UNCERTAIN if scale and line["high"] / scale >= goal.bound else MISSED
