"""Finds SkipGPT's routers: training by the shared loop, then the threshold on calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import block_speedup, meet_target
from dyndepth.fitting.loop import Curve, Schedule
from dyndepth.fitting.regression import Regression, regress_gains
from dyndepth.fitting.removal import (
    Removal,
    cached_order,
    ordered_biases,
    ranked_biases,
    removal_damage,
)
from dyndepth.fitting.routers import (
    Tuning,
    budget_shares,
    stream_statistics,
    trained_along,
    tune_router,
)
from dyndepth.method import Reading
from dyndepth.models.blocks import Decoder

from .presets import Recipe
from .router import LinearRouter, MLPRouter, kaiming
from .rule import RouterRule

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_CALIBRATION_WINDOWS = 16
_CALIBRATION_LENGTH = 256
# For an estimate: of at most twelve.
_CALIBRATION_ROUNDS = 4
# Removals are measured on 1,024 tokens; the order reaches a little beyond the target.
_REMOVAL_WINDOWS, _REMOVAL_LENGTH = 8, 128
_STATISTICS_WINDOWS = 8
_LEAST_EXECUTED = 1 / 3
# Adapters that are trained along need some even where the routers need none.
_STEPS_ALONG = 60


def train(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus | None, *, progress: bool = True
) -> Curve:
    """Train and calibrate ``method`` in place; returns the training curve.

    Raises UserError if ``corpus`` is None.
    """
    corpus = _required(corpus)
    recipe = method.recipe
    device = next(model.parameters()).device
    router, curve = initial_router(method, model, corpus, progress=progress)
    router.to(device)
    if method.reads == "constant":
        router.get_parameter("weight").requires_grad_(False)
    tuning = Tuning(
        target_speedup=method.target_speedup,
        budget=recipe.budget,
        penalty=recipe.penalty,
        ramp=recipe.ramp,
        curriculum=(0.1, 500) if recipe.curriculum else None,
        estimator=recipe.estimator,
        temperature=(recipe.tau_start, recipe.tau_end),
        objective=recipe.objective,
        weight_rate=recipe.weight_rate,
        bias_rate=recipe.bias_rate,
        adapter_rate=recipe.adapter_rate,
        phases=method.phases,
        kv_policy=method.kv_policy,
    )
    steps = recipe.steps or (_STEPS_ALONG if trained_along(model) else 0)
    if steps:
        schedule = Schedule.of(recipe, steps=steps, length=window_length(method, model))
        # New text first: what the regression has read comes again only when the corpus is used up.
        used = recipe.rounds * recipe.windows if recipe.initial == "gain" else 0
        windows = corpus.reader(
            schedule.length, used + schedule.windows, method.seed, model=model
        ).after(used)
        read = curve[-1]["tokens"] if curve else 0.0
        tuned = tune_router(
            model, router, windows, tuning, schedule, seed=method.seed, progress=progress
        )
        curve = curve + [row | {"tokens": read + row["tokens"]} for row in tuned]
    method.tensors = router.folded()
    method.facts = {
        "tokens": int(curve[-1]["tokens"]) if curve else 0,
        "normalise": recipe.normalise,
    }
    method.curve = curve
    calibrate(method, model, corpus)
    return curve


def readings(method: RouterRule, layers: int) -> tuple[Reading, ...]:
    """What training on a model of ``layers`` blocks reads, for an estimate.

    The removal's order is found once for all targets: each sublayer alone, then some again after
    each of those that go, on plans that share beginnings. Regression and steps read each window
    gated and for its gradients, and at full depth where the loss is the divergence from that.
    """
    recipe, share = method.recipe, 1 / method.target_speedup
    length = recipe.length
    found = []
    if recipe.initial in ("gain", "order", "damage"):
        units = 2 * layers
        asked = units + (0.0 if recipe.initial == "damage" else 3 * units * (1 - _LEAST_EXECUTED))
        found.append(
            Reading(
                windows=_REMOVAL_WINDOWS,
                length=min(_REMOVAL_LENGTH, length),
                forwards=0.5 * asked,
                heads=asked,
                kept=True,
            )
        )
    if recipe.initial == "gain":
        windows = recipe.rounds * recipe.windows
        found.append(
            Reading(windows=windows, length=length, forwards=2.0, backwards=1.0, heads=3.0)
        )
    if recipe.steps:
        found.append(_reading_of(recipe, recipe.steps))
    rounds = 1 if recipe.threshold == "zero" else _CALIBRATION_ROUNDS
    length = min(2 * length, _CALIBRATION_LENGTH)
    found.append(Reading(windows=rounds * _CALIBRATION_WINDOWS, length=length, forwards=share))
    return tuple(found)


def readings_along(method: RouterRule) -> tuple[Reading, ...]:
    """What is read beside those where adapters are trained along: steps that they alone need."""
    return () if method.recipe.steps else (_reading_of(method.recipe, _STEPS_ALONG),)


def _reading_of(recipe: Recipe, steps: int) -> Reading:
    dense = recipe.objective == "kl"
    return Reading(
        windows=steps * recipe.batch * recipe.accumulate,
        length=recipe.length,
        # A gate that is trained is computed whether or not it is open.
        forwards=1.0 + dense,
        backwards=1.0,
        heads=3.0 + dense,
    )


def initial_router(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus, *, progress: bool = True
) -> tuple[LinearRouter | MLPRouter, Curve]:
    """Routers before training, as the recipe's ``initial`` says, and the curve of finding them."""
    recipe = method.recipe
    layers, hidden = Decoder.of(model).shape
    random = torch.Generator().manual_seed(method.seed)
    weight = torch.zeros(layers, 2, hidden)
    curve: Curve = []
    if recipe.initial == "random":
        bias = torch.zeros(layers, 2)
    elif recipe.initial == "gain":
        weight, bias, curve = _gains(method, model, corpus, progress)
    else:
        bias = _initial_biases(method, model, corpus, progress)
    if recipe.router == "mlp":
        # A hidden layer of zeros would have no gradient: only the outer weights can be zero.
        width = max(1, hidden // 4)
        inner = kaiming(layers, 2, width, hidden, generator=random)
        outer = torch.zeros(layers, 2, width)
        if recipe.initial == "random":
            outer = _difference(layers, width, random)
        inner_bias = torch.zeros(layers, 2, width)
        return MLPRouter(inner, inner_bias, outer, bias, normalise=recipe.normalise), curve
    if recipe.initial == "random":
        weight = _difference(layers, hidden, random)
    if not (recipe.standardise and recipe.steps and method.reads == "stream"):
        return LinearRouter(weight, bias, normalise=recipe.normalise), curve
    statistics_windows = corpus.windows(
        window_length(method, model), _STATISTICS_WINDOWS, method.seed, model=model
    )
    mean, deviation = stream_statistics(model, statistics_windows, normalise=recipe.normalise)
    router = LinearRouter(
        weight * deviation[:, None],
        bias + (weight * mean[:, None]).sum(-1),
        normalise=recipe.normalise,
        statistics=(mean, deviation),
    )
    return router, curve


def _difference(layers: int, size: int, random: torch.Generator) -> Tensor:
    """The difference of two random rows of each router: what the two logits' difference sees."""
    rows = kaiming(layers, 2, 2, size, generator=random)
    return rows[:, :, 0] - rows[:, :, 1]


def _initial_biases(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus, progress: bool
) -> Tensor:
    recipe = method.recipe
    if recipe.initial == "damage":
        windows = _removal_windows(method, model, corpus)
        return ranked_biases(removal_damage(model, windows, progress=progress))
    shares = budget_shares(model, window_length(method, model), recipe.budget)
    target = 1 / method.target_speedup
    order = _order(method, model, corpus, 0.9 * target, progress)
    return ordered_biases(order, shares, target)


def _removal_windows(method: RouterRule, model: torch.nn.Module, corpus: Corpus) -> Tensor:
    length = min(_REMOVAL_LENGTH, window_length(method, model))
    windows = corpus.windows(length, _REMOVAL_WINDOWS, method.seed, model=model)
    return windows.to(next(model.parameters()).device)


def _order(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus, until: float, progress: bool
) -> list[Removal]:
    """The greedy removal order down to ``until``; to a third if more, to serve other targets."""
    shares = budget_shares(model, window_length(method, model), method.recipe.budget)
    windows = _removal_windows(method, model, corpus)
    return cached_order(model, windows, shares, min(_LEAST_EXECUTED, until), progress=progress)


def _gains(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus, progress: bool
) -> tuple[Tensor, Tensor, Curve]:
    """Weights and biases by regression over the sublayers that removal would take first."""
    recipe = method.recipe
    shares = budget_shares(model, window_length(method, model), recipe.budget)
    executed = 1 / method.target_speedup
    # Beyond the usual targets, a tenth more than is asked.
    least = min(_LEAST_EXECUTED, 0.9 * executed)
    left = max(least, 1 - recipe.surplus * (1 - executed))
    removable = torch.zeros(shares.shape, dtype=torch.bool)
    for row in _order(method, model, corpus, left, progress):
        removable[row.layer, row.sublayer] = True
        if row.executed <= left:
            break
    settings = Regression(
        windows=(recipe.windows,) * recipe.rounds,
        normalise=recipe.normalise,
        constant=method.reads == "constant",
        phases=method.phases,
    )
    windows = corpus.windows(
        window_length(method, model), recipe.windows * recipe.rounds, method.seed, model=model
    )
    return regress_gains(
        model,
        windows,
        removable,
        shares,
        executed,
        settings,
        seed=method.seed,
        batch=recipe.batch,
        progress=progress,
    )


def calibrate(method: RouterRule, model: torch.nn.Module, corpus: Corpus | None) -> None:
    """Solve ``threshold`` so that the measured speedup meets the target; both go into the facts.

    Where the recipe fixes the threshold at zero, the speedup is measured only.
    """
    own = window_length(method, model)
    length = fitting(model, min(2 * own, _CALIBRATION_LENGTH))
    windows = _required(corpus).windows(
        length, _CALIBRATION_WINDOWS, method.seed, split="calibration", model=model
    )
    if method.recipe.threshold == "zero":
        method.facts["threshold"] = 0.0
        method.facts["achieved_speedup"] = block_speedup(model, method, windows)
        return
    steps = None
    if method.reads == "constant":
        steps = method.tensors["bias"].cpu(), budget_shares(model, own)
    meet_target(model, method, windows, span=5.0 if method.recipe.normalise else 50.0, steps=steps)


def window_length(method: RouterRule, model: torch.nn.Module) -> int:
    """Tokens of a window: those asked for, else the preset's or as many as fit."""
    return method.length or fitting(model, method.recipe.length)


def _required(corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise UserError("skipgpt finds its routers and their threshold on text; give fit a corpus")
    return corpus
