"""Solves the threshold of early exit, so that the measured block speedup meets the target.

One pass at full depth, shared by all targets, says which threshold to expect. It is a prediction
where tokens see others that left (see ``offline``); sparse passes measure what really happens and
correct, each by interpolation between what is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import block_speedup, prompt_phase, solve_threshold
from dyndepth.method import Reading
from dyndepth.models.blocks import blocks

from .offline import kept_table
from .rule import ExitRule

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_WINDOWS, _LENGTH = 4, 256
_ROUNDS = 4


def readings(method: ExitRule, exits: int, passed: int) -> tuple[Reading, ...]:
    """What ``solve`` reads, with so many readouts a token at full depth and at the target."""
    share, rounds = 1 / method.target_speedup, 0.5 * _ROUNDS
    return (
        Reading(windows=_WINDOWS, length=_LENGTH, heads=exits, kept=True),
        Reading(windows=rounds * _WINDOWS, length=_LENGTH, forwards=share, heads=passed),
    )


def solve(method: ExitRule, model: torch.nn.Module, corpus: Corpus | None) -> None:
    """Set ``threshold`` and ``achieved_speedup`` in ``method.facts``.

    Raises UserError if ``corpus`` is None or the target is beyond ``max_speedup``.
    """
    layers = len(blocks(model))
    if corpus is None:
        raise UserError("early_exit solves its threshold on text; give fit a corpus")
    if method.target_speedup > method.max_speedup(layers):
        raise UserError(
            f"early_exit leaves at block {method.exits(layers)[0]} of {layers} at the "
            f"earliest, a speedup of at most {method.max_speedup(layers):g}, not "
            f"{method.target_speedup:g}"
        )
    length = fitting(model, _LENGTH)
    windows = corpus.windows(length, _WINDOWS, method.seed, split="calibration", model=model)
    table = kept_table(method, model, windows)
    if prompt_phase(method) is not None:
        table = table.since(length // 2)
    thresholds = table.best.unique()
    speedups = table.speedup(thresholds)

    def choose(nominal: float) -> None:
        found = min(int((speedups > nominal).sum()), len(thresholds) - 1)
        method.facts["threshold"] = thresholds[found].item()

    def measure(nominal: float) -> float:
        choose(nominal)
        return block_speedup(model, method, windows)

    # Nobody leaves, everybody leaves at once: there is nothing to measure.
    low, high = 1.0, speedups[0].item()
    nominal, achieved = solve_threshold(
        measure,
        method.target_speedup,
        first=method.target_speedup,
        low=low,
        high=high,
        ends=(low, high),
        rounds=_ROUNDS,
    )
    choose(nominal)
    method.facts["achieved_speedup"] = achieved
