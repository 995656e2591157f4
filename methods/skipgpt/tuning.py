"""Finds SkipGPT's routers: training by the shared loop, then the threshold on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyndepth.blocks import blocks, decoder
from dyndepth.calibration import block_speedup, solve_threshold
from dyndepth.errors import UserError
from dyndepth.gain import Regression, regress_gains
from dyndepth.loop import Curve, Schedule
from dyndepth.removal import (
    Removal,
    cached_order,
    ordered_biases,
    ranked_biases,
    removal_damage,
)
from dyndepth.training import (
    Tuning,
    budget_shares,
    inverse_scale,
    trained_along,
    tune_router,
)

from . import SkipGPT
from .presets import Recipe
from .router import LinearRouter, MLPRouter, kaiming

if TYPE_CHECKING:
    from dyndepth.corpus import Corpus

_CALIBRATION_WINDOWS = 16
_CALIBRATION_LENGTH = 256
# Removals are measured on 1,024 tokens; the order reaches a little beyond the target.
_REMOVAL_WINDOWS, _REMOVAL_LENGTH = 8, 128
_STATISTICS_WINDOWS = 8
_LEAST_EXECUTED = 1 / 3
# Adapters that are trained along need some even where the routers need none.
_STEPS_ALONG = 60
# A set of whole sublayers cannot meet every budget; short of this the routers do not reach it.
_LEAST_ACHIEVED = 0.85


def train(
    method: SkipGPT, model: torch.nn.Module, corpus: Corpus | None, *, progress: bool = True
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
    )
    steps = recipe.steps or (_STEPS_ALONG if trained_along(model) else 0)
    if steps:
        schedule = Schedule.of(recipe, steps=steps)
        # New text first: what the regression has read comes again only when the corpus is used up.
        used = recipe.rounds * recipe.windows if recipe.initial == "gain" else 0
        windows = corpus.reader(recipe.length, used + schedule.windows, method.seed).after(used)
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


def initial_router(
    method: SkipGPT, model: torch.nn.Module, corpus: Corpus, *, progress: bool = True
) -> tuple[LinearRouter | MLPRouter, Curve]:
    """Routers before training, as the recipe's ``initial`` says, and the curve of finding them."""
    recipe = method.recipe
    layers, hidden = len(blocks(model)), int(decoder(model).config.hidden_size)
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
    mean, deviation = stream_statistics(model, corpus, recipe, method.seed)
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
    method: SkipGPT, model: torch.nn.Module, corpus: Corpus, progress: bool
) -> Tensor:
    recipe = method.recipe
    if recipe.initial == "damage":
        windows = _removal_windows(method, model, corpus)
        return ranked_biases(removal_damage(model, windows, progress=progress))
    shares = budget_shares(model, recipe.length, recipe.budget)
    target = 1 / method.target_speedup
    order = _order(method, model, corpus, 0.9 * target, progress)
    return ordered_biases(order, shares, target)


def _removal_windows(method: SkipGPT, model: torch.nn.Module, corpus: Corpus) -> Tensor:
    length = min(_REMOVAL_LENGTH, method.recipe.length)
    windows = corpus.windows(length, _REMOVAL_WINDOWS, method.seed)
    return windows.to(next(model.parameters()).device)


def _order(
    method: SkipGPT, model: torch.nn.Module, corpus: Corpus, until: float, progress: bool
) -> list[Removal]:
    """The greedy removal order down to ``until``; to a third if more, to serve other targets."""
    shares = budget_shares(model, method.recipe.length, method.recipe.budget)
    windows = _removal_windows(method, model, corpus)
    return cached_order(model, windows, shares, min(_LEAST_EXECUTED, until), progress=progress)


def _gains(
    method: SkipGPT, model: torch.nn.Module, corpus: Corpus, progress: bool
) -> tuple[Tensor, Tensor, Curve]:
    """Weights and biases by regression over the sublayers that removal would take first."""
    recipe = method.recipe
    shares = budget_shares(model, recipe.length, recipe.budget)
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
    windows = corpus.windows(recipe.length, recipe.windows * recipe.rounds, method.seed)
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


@torch.no_grad()
def stream_statistics(
    model: torch.nn.Module, corpus: Corpus, recipe: Recipe, seed: int
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension of what a router reads: two ``[layers, hidden]``.

    Of the dense model's streams; a deviation is kept from falling below a thousandth.
    """
    found: list[list[Tensor]] = [[] for _ in blocks(model)]

    def watch(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            stream = (args[0] if args else kwargs["hidden_states"]).float().flatten(0, 1)
            found[index].append(stream * inverse_scale(stream) if recipe.normalise else stream)

        return hook

    hooks = [
        block.layer.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, block in enumerate(blocks(model))
    ]
    try:
        windows = corpus.windows(recipe.length, _STATISTICS_WINDOWS, seed)
        for ids in windows.to(next(model.parameters()).device).split(2):
            decoder(model)(input_ids=ids, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    streams = [torch.cat(parts) for parts in found]
    mean = torch.stack([stream.mean(0) for stream in streams])
    deviation = torch.stack([stream.std(0) for stream in streams]) + 1e-3
    return mean, deviation


def calibrate(method: SkipGPT, model: torch.nn.Module, corpus: Corpus | None) -> None:
    """Solve ``threshold`` so that the measured speedup meets the target; both go into the facts.

    Where the recipe fixes the threshold at zero, the speedup is measured only.
    """
    length = min(2 * method.recipe.length, _CALIBRATION_LENGTH)
    windows = _required(corpus).windows(
        length, _CALIBRATION_WINDOWS, method.seed, split="calibration"
    )

    def measure(threshold: float) -> float:
        method.facts["threshold"] = threshold
        return block_speedup(model, method, windows)

    if method.recipe.threshold == "zero":
        method.facts |= {"threshold": 0.0, "achieved_speedup": measure(0.0)}
        return
    if method.reads == "constant":
        threshold = _plan_threshold(method, model)
        achieved = measure(threshold)
    else:
        logits = 5.0 if method.recipe.normalise else 50.0
        threshold, achieved = solve_threshold(
            measure, method.target_speedup, 0.0, 0.05, low=-logits, high=logits, tolerance=0.005
        )
    method.facts |= {"threshold": threshold, "achieved_speedup": achieved}
    if achieved < _LEAST_ACHIEVED * method.target_speedup:
        raise UserError(
            f"skipgpt reaches {achieved:.3g}x with these routers, not {method.target_speedup:g}x; "
            "ask for less, or train others"
        )


def _plan_threshold(method: SkipGPT, model: torch.nn.Module) -> float:
    """The bias at which routers that read nothing come nearest to the target; no forward is run.

    Their speedup is a step function of the threshold, with a step at each bias.
    """
    bias = method.tensors["bias"].cpu()
    shares = budget_shares(model, method.recipe.length)
    steps = {step: float(shares[bias >= step].sum()) for step in bias.unique().tolist()}
    return min(steps, key=lambda step: abs(1 / steps[step] - method.target_speedup))


def _required(corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise UserError("skipgpt finds its routers and their threshold on text; give fit a corpus")
    return corpus
