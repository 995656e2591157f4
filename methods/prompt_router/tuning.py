"""Finds the routers of a prompt: training by the shared loop, then the threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import block_speedup, meet_target
from dyndepth.fitting.loop import Schedule
from dyndepth.fitting.removal import losses_alone, ranked_biases, units_of
from dyndepth.fitting.routers import Tuning, budget_shares, stream_statistics, tune_router
from dyndepth.method import Reading
from dyndepth.methods.skipgpt.router import LinearRouter, kaiming
from dyndepth.models.blocks import Decoder, blocks

from .rule import PromptRule

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_ALWAYS = 1e4
"""Logit of what is never skipped."""
_DAMAGE_WINDOWS, _STATISTICS_WINDOWS = 2, 32
_CALIBRATION_WINDOWS, _CALIBRATION_LENGTH = 16, 256
# For an estimate: of at most twelve.
_CALIBRATION_ROUNDS = 6


class PooledRouter(LinearRouter):
    """One logit a window and routed block, the mean over its first half, for all of its tokens.

    ``weight`` is ``[layers, 1, hidden]``, ``bias`` ``[layers, 1]``; gives float32
    ``[batch, tokens, 1]`` for whole blocks, and ``[batch, tokens, 2]`` where attentions alone have
    one.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor] | None,
        routed: range,
        attention_only: bool,
    ) -> None:
        super().__init__(weight, bias, normalise=True, statistics=statistics)
        self.routed, self.attention_only = routed, attention_only

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits, from the stream ``[batch, tokens, hidden]`` of windows without padding."""
        tokens = hidden.shape[1]
        always = hidden.new_full((len(hidden), tokens, 1), _ALWAYS, dtype=torch.float32)
        logits = always
        if layer in self.routed:
            found = super().forward(layer, hidden[:, : tokens // 2]).mean(1, keepdim=True)
            logits = found.expand(-1, tokens, -1)
        return torch.cat([logits, always], -1) if self.attention_only else logits

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """``weight`` and ``bias``, and ``constant``: the logits at the mean of what it read."""
        return super().folded() | {"constant": self.bias.detach().cpu().clone()}


def train(method: PromptRule, model: nn.Module, corpus: Corpus | None) -> None:
    """Train and calibrate ``method`` in place. Raises UserError as its ``fit`` does."""
    text = _required(method, corpus)
    schedule = Schedule.of(method)
    windows = text.reader(method.length, schedule.windows, method.seed, model=model)
    _check_reach(method, model)
    device = next(model.parameters()).device
    router = initial_router(method, model, text).to(device)
    linear = method.cost == "linear"
    tuning = Tuning(
        target_speedup=method.target_speedup,
        penalty=method.penalty,
        cost=method.cost,
        ramp=0.0 if linear else method.ramp,
        estimator=method.estimator,
        temperature=(1.0, 1.0),
        objective=method.objective,
        weight_rate=method.weight_rate,
        bias_rate=method.bias_rate,
        phases=method.phases,
        prompt=True,
    )
    method.curve = tune_router(model, router, windows, tuning, schedule, seed=method.seed)
    method.tensors = router.folded()
    method.facts = {"tokens": int(method.curve[-1]["tokens"])}
    calibrate(method, model, text)


def calibrate(method: PromptRule, model: nn.Module, corpus: Corpus | None) -> None:
    """Solve the threshold for the model as it is now. Raises UserError without a corpus."""
    length = fitting(model, min(2 * method.length, _CALIBRATION_LENGTH))
    windows = _required(method, corpus).windows(
        length, _CALIBRATION_WINDOWS, method.seed, split="calibration", model=model
    )
    steps = None
    if method.reads == "frequent":
        _see_frequent(method, model, windows)
    if method.reads != "prompt":
        logits = torch.full((len(blocks(model)), 2), _ALWAYS)
        routed = list(method.routed(len(logits)))
        constant = method.tensors["constant"].cpu()[routed]
        logits[routed, : 1 if method.attention_only else 2] = constant
        steps = logits, budget_shares(model, length)
    meet_target(model, method, windows, steps=steps)
    if method.reads == "prompt":
        _see_constant(method, model, windows)


def _see_constant(method: PromptRule, model: nn.Module, windows: Tensor) -> None:
    """What decides where nothing is read: the mean logits of these ``windows``."""
    constant = method.tensors["constant"].cpu().clone()
    for layer, logits in _seen(method, model, windows).items():
        constant[layer] = logits.mean()
    method.tensors["constant"] = constant


def _see_frequent(method: PromptRule, model: nn.Module, windows: Tensor) -> None:
    """In place of logits: in how many of these ``windows`` each unit runs under routers that read
    them, at the same target; among equals the mean logit decides."""
    reader = replace(method, reads="prompt")
    reader.tensors = dict(method.tensors)
    meet_target(model, reader, windows)
    constant = method.tensors["constant"].cpu().clone()
    for layer, logits in _seen(reader, model, windows).items():
        runs = logits >= reader.facts["threshold"]
        constant[layer] = runs.sum() + logits.mean().sigmoid()
    method.tensors["constant"] = constant


def _seen(method: PromptRule, model: nn.Module, windows: Tensor) -> dict[int, Tensor]:
    """The logits of each router that is asked over these ``windows``, by block."""
    found: dict[int, list[Tensor]] = {}
    method.seen = []
    try:
        block_speedup(model, method, windows)
        for layer, logits in method.seen:
            found.setdefault(layer, []).append(logits.cpu())
    finally:
        method.seen = None
    return {layer: torch.cat(each) for layer, each in found.items()}


def readings(method: PromptRule, layers: int) -> tuple[Reading, ...]:
    """What a fit on a model of ``layers`` blocks reads, for an estimate."""
    dense, routed = method.objective == "kl", len(method.routed(layers))
    damage = Reading(
        windows=_DAMAGE_WINDOWS,
        length=method.length,
        # Plans without one unit share the blocks before it.
        forwards=0.5 * routed,
        heads=routed,
        kept=True,
    )
    return (
        *([damage] if method.initial == "damage" else []),
        Reading(windows=_STATISTICS_WINDOWS, length=method.length // 2),
        Reading(
            windows=method.steps * method.batch,
            length=method.length,
            forwards=1.0 + dense,
            backwards=1.0,
            # Of the second half alone.
            heads=0.5 * (3.0 + dense),
        ),
        Reading(
            windows=_CALIBRATION_ROUNDS * _CALIBRATION_WINDOWS,
            length=min(2 * method.length, _CALIBRATION_LENGTH),
            forwards=1 / method.target_speedup,
        ),
    )


def initial_router(method: PromptRule, model: nn.Module, corpus: Corpus) -> PooledRouter:
    """Routers before training, as ``method.initial`` says."""
    layers, hidden = Decoder.of(model).shape
    routed = method.routed(layers)
    device = next(model.parameters()).device
    weight, bias = torch.zeros(layers, 1, hidden), torch.zeros(layers, 1)
    if method.initial == "damage":
        windows = corpus.windows(method.length, _DAMAGE_WINDOWS, method.seed, model=model)
        units = units_of(layers, "sublayer" if method.attention_only else "block")
        units = units[::2] if method.attention_only else units
        _, alone = losses_alone(model, windows.to(device), [units[layer] for layer in routed])
        bias[list(routed), 0] = ranked_biases(alone.float())
    else:
        rows = kaiming(layers, 2, hidden, generator=torch.Generator().manual_seed(method.seed))
        weight = rows[:, :1] - rows[:, 1:]
    if method.reads == "constant":
        router = PooledRouter(torch.zeros_like(weight), bias, None, routed, method.attention_only)
        router.weight.requires_grad_(False)
        return router
    windows = corpus.windows(method.length // 2, _STATISTICS_WINDOWS, method.seed, model=model)
    mean, deviation = stream_statistics(model, windows, normalise=True, pooled=True)
    if method.initial == "random":
        bias = bias + (weight * mean[:, None]).sum(-1)
    return PooledRouter(
        weight * deviation[:, None], bias, (mean, deviation), routed, method.attention_only
    )


def _check_reach(method: PromptRule, model: nn.Module) -> None:
    """Raises UserError for a target that skipping everything with a router does not meet."""
    shares = budget_shares(model, fitting(model, min(2 * method.length, _CALIBRATION_LENGTH)))
    routed = shares[list(method.routed(len(shares)))]
    most = 1 / (1 - float(routed[:, : 1 if method.attention_only else 2].sum()))
    if method.target_speedup > most * 1.005:
        what = "attentions" if method.attention_only else "blocks"
        raise UserError(
            f"{method.name} can leave out {len(routed)} {what} of this model: a speedup of at most "
            f"{most:.4g}, not {method.target_speedup:g}; ask for less"
        )


def _required(method: PromptRule, corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise UserError(
            f"{method.name} finds its routers and their threshold on text; give fit a corpus"
        )
    return corpus
