"""Finds SkipGPT's routers: training by the shared loop, then the threshold on calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dyndepth.calibration import block_speedup, solve_threshold
from dyndepth.errors import UserError
from dyndepth.training import Schedule, ranked_biases, removal_damage, tune_router

from . import SkipGPT
from .router import LinearRouter

if TYPE_CHECKING:
    from dyndepth.corpus import Corpus

_CALIBRATION_WINDOWS = 8
_DAMAGE_WINDOWS, _DAMAGE_LENGTH = 4, 128


def train(
    method: SkipGPT,
    model: torch.nn.Module,
    corpus: Corpus | None,
    start: SkipGPT | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train and calibrate ``method`` in place; returns the training curve.

    ``start`` is a fitted method of another target, whose routers are tuned on; None: biases in the
    order of each sublayer's removal damage, weights zero. ``model`` is left without gradients.
    Raises UserError if ``corpus`` is None.
    """
    corpus = _required(corpus)
    model.requires_grad_(False)
    parameter = next(model.parameters())
    if start is None:
        length = min(_DAMAGE_LENGTH, method.length)
        windows = corpus.windows(length, _DAMAGE_WINDOWS, method.seed).to(parameter.device)
        bias = ranked_biases(removal_damage(model, windows, progress=progress))
        hidden = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        weight = torch.zeros(*bias.shape, hidden)
    else:
        weight, bias = start.tensors["weight"], start.tensors["bias"]
    router = LinearRouter(weight.clone(), bias.clone(), normalise=method.normalise)
    router.to(parameter.device)
    schedule = Schedule(
        steps=method.steps,
        batch=method.batch,
        length=method.length,
        bias_rate=method.bias_rate,
        penalty=method.penalty,
    )
    # Another target reads other windows, so that going on from a milder one sees new text.
    reading = 1000 * method.seed + round(100 * method.target_speedup)
    windows = corpus.windows(method.length, method.steps * method.batch, reading)
    curve = tune_router(model, router, windows, method.target_speedup, schedule, progress=progress)
    method.tensors = {name: tensor.detach().cpu() for name, tensor in router.named_parameters()}
    method.facts = {"tokens": windows.numel()}
    if start is not None:
        method.facts["started_from"] = start.target_speedup
    calibrate(method, model, corpus)
    return curve


def calibrate(method: SkipGPT, model: torch.nn.Module, corpus: Corpus | None) -> None:
    """Solve ``threshold`` so that the measured speedup meets the target; both go into the facts."""
    windows = _required(corpus).windows(
        2 * method.length, _CALIBRATION_WINDOWS, method.seed, split="calibration"
    )

    def measure(threshold: float) -> float:
        method.facts["threshold"] = threshold
        return block_speedup(model, method, windows)

    threshold, achieved = solve_threshold(
        measure, method.target_speedup, 0.0, 0.05, low=-5.0, high=5.0, tolerance=0.005
    )
    method.facts |= {"threshold": threshold, "achieved_speedup": achieved}


def _required(corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise UserError("skipgpt finds its routers and their threshold on text; give fit a corpus")
    return corpus
