"""Solves the threshold of early exit, so that the measured block speedup meets the target.

One pass at full depth records the confidence of every calibration token at every candidate exit; it
serves all targets. It says which threshold to expect, were the keys and values of tokens that left
exact; a few sparse passes then measure what really happens and correct.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyndepth.blocks import blocks
from dyndepth.calibration import block_speedup, solve_threshold
from dyndepth.errors import UserError
from dyndepth.method import ForwardContext, Gate
from dyndepth.models import fingerprint

from . import EarlyExit

if TYPE_CHECKING:
    from dyndepth.corpus import Corpus

_WINDOWS, _LENGTH = 4, 256
_ROUNDS = 4
_recorded: dict[tuple[str, ...], Tensor] = {}


def solve(method: EarlyExit, model: torch.nn.Module, corpus: Corpus | None) -> None:
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
    windows = corpus.windows(_LENGTH, _WINDOWS, method.seed, split="calibration")
    best = _confidences(method, model, corpus, windows).cummax(0).values
    thresholds = best.flatten().unique().tolist()

    def choose(nominal: float) -> None:
        found = bisect_left(
            thresholds, -nominal, key=lambda x: -_nominal_speedup(method, x, best, layers)
        )
        method.facts["threshold"] = thresholds[min(found, len(thresholds) - 1)]

    def measure(nominal: float) -> float:
        choose(nominal)
        return block_speedup(model, method, windows)

    nominal, achieved = solve_threshold(
        measure,
        method.target_speedup,
        first=method.target_speedup,
        step=0.05 * method.target_speedup,
        low=1.0,
        high=method.max_speedup(layers),
        rounds=_ROUNDS,
    )
    choose(nominal)
    method.facts["achieved_speedup"] = achieved


class _Probe(EarlyExit):
    """Records confidences and lets nobody go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.records: list[Tensor] = []

    def start(self, context: ForwardContext) -> Tensor | None:
        self.facts["threshold"] = math.inf
        return super().start(context)

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        if layer in self._exits:
            self.records.append(self.token_confidence(hidden).cpu())
        self._previous = hidden
        return True, True


def _confidences(
    method: EarlyExit, model: torch.nn.Module, corpus: Corpus, windows: Tensor
) -> Tensor:
    """Confidence of each calibration token at each candidate: float32 ``[candidates, tokens]``."""
    identity = repr(replace(method, target_speedup=1.0))
    dtype = str(next(model.parameters()).dtype)
    key = (identity, fingerprint(model), dtype, corpus.fingerprint)
    if key not in _recorded:
        probe = _Probe(**{f.name: getattr(method, f.name) for f in fields(method)})
        block_speedup(model, probe, windows)
        exits = len(method.exits(len(blocks(model))))
        by_exit = [torch.cat(probe.records[first::exits]) for first in range(exits)]
        _recorded[key] = torch.stack(by_exit)
    return _recorded[key]


def _nominal_speedup(method: EarlyExit, threshold: float, best: Tensor, layers: int) -> float:
    """Speedup in blocks at ``threshold``, by the running maxima ``[candidates, tokens]``."""
    ends = torch.tensor([*method.exits(layers), layers], dtype=torch.float64)
    left = (best >= threshold).double().mean(1)
    return layers / (layers - float(ends.diff() @ left))
