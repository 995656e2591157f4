"""Stage 2: adapters that make up for the depth that a method does not spend.

``lora``: the method is attached as it will run, its gates frozen and on; what it skips is skipped
in training too, for a constant gate's skipped branch has no gradient. The loss is next-token
cross-entropy over whole windows. For methods of phase ``generation`` the first half of each window
runs at full depth and the second thinned over its keys and values: the two-pass scheme of arXiv
2404.06954 in one forward. With ``modules=ila`` two more trainings follow, see ``significance``:
scores of the adapters, and of those with the highest anew. ``joint``: adapters are put in and the
method's own ``fit`` trains them together with its routers, as in the ablation of arXiv 2506.04179.
Dense recovered under the same recipe is the control: same windows, same tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dyndepth.cells.recipe import RANKED
from dyndepth.common.errors import UserError
from dyndepth.fitting.calibration import prompt_of, prompt_phase
from dyndepth.fitting.loop import Curve, Schedule, optimise
from dyndepth.fitting.readings import Row
from dyndepth.fitting.recovery.adapters import Factors, adaptable, transposed
from dyndepth.fitting.recovery.significance import Scores, learn
from dyndepth.fitting.routers import mark_along
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder, causal_lm
from dyndepth.models.seeding import seeded
from dyndepth.runtime.attach import attach
from dyndepth.runtime.trace import Trace

if TYPE_CHECKING:
    from dyndepth.cells.recipe import Recipe
    from dyndepth.data.corpus import Corpus


_READING = 500_000
"""Added to the seed of the windows, so that stage 2 reads other ones than stage 1."""
_WEIGHING = 750_000
"""Added to the seed of the windows on which the scores of adapters are learned."""
_NAME = "recovery"


@dataclass(frozen=True)
class Recovered:
    """What a recovery found: factors by projection, the curve by step of the training that made
    them, its price with all that went before, and the scores of the modules if it ranks them."""

    factors: Factors
    curve: Curve
    tokens: int
    seconds: float
    scores: Scores | None = None

    @property
    def parameters(self) -> int:
        """Numbers that were trained in the end."""
        return sum(factor.numel() for pair in self.factors.values() for factor in pair)


def recover(
    method: DynamicDepthMethod,
    model: nn.Module,
    corpus: Corpus | None,
    recipe: Recipe,
    seed: int = 0,
    *,
    scores: Scores | None = None,
    progress: bool = True,
) -> Recovered:
    """Train adapters for ``method`` on ``model``; the model is left exactly as it was.

    For ``lora`` the method is fitted; its gates stay as they are. For ``joint`` it is fitted here.
    ``method.calibrate`` is left to the caller, under the merged weights. With ``scores``, which an
    equal recipe found that keeps all modules, what they keep is all that is trained. The curve has
    ``loss`` (nats a token), ``executed`` (share of block FLOPs where the method skips) and
    ``tokens``.

    Raises:
        UserError: no corpus, a projection that can't be adapted, or ``joint`` for a method that
            trains nothing, or whose fit trained no adapter; several processes.
    """
    if corpus is None:
        raise UserError("recovery trains on text; give a corpus")
    if recipe.kind == "joint" and not method.needs_training:
        raise UserError(
            f"recovery 'joint' trains routers and adapters at once, and {method.name} trains "
            "nothing; use lora"
        )
    started = time.monotonic()
    if scores is not None:
        factors, curve = _alone(method, model, corpus, recipe, scores, seed, progress)
        return Recovered(factors, curve, _tokens(curve), time.monotonic() - started, scores)
    with injected(model, recipe, seed) as layers:
        if recipe.kind == "joint":
            method.fit(model, corpus)
            curve = list(getattr(method, "curve", []))
            if not any(bool(layer.lora_B[_NAME].weight.any()) for layer in layers.values()):
                raise UserError(
                    f"fitting {method!r} trained no adapter along, so there is no joint recovery "
                    "of it; use lora"
                )
        else:
            curve = _train(method, model, corpus, recipe, seed, progress)
        if recipe.modules == RANKED:
            scores = _scored(method, model, corpus, recipe, layers, seed, progress)
        factors = _factors_in(layers)
    tokens = _tokens(curve) if curve else int(method.facts.get("tokens", 0))
    if scores is not None:
        tokens += scores.tokens
        if len(scores.kept) < len(factors):
            # Where all are kept, the first training was the last one, number by number.
            factors, curve = _alone(method, model, corpus, recipe, scores, seed, progress)
            tokens += _tokens(curve)
    return Recovered(factors, curve, tokens, time.monotonic() - started, scores)


def _alone(
    method: DynamicDepthMethod,
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    scores: Scores,
    seed: int,
    progress: bool,
) -> tuple[Factors, Curve]:
    """Train adapters on the modules that ``scores`` keep, from the start."""
    with injected(model, recipe, seed, scores.kept) as layers:
        curve = _train(method, model, corpus, recipe, seed, progress, "kept")
        return _factors_in(layers), curve


def _tokens(curve: Curve) -> int:
    return int(curve[-1].get("tokens", 0))


def _factors_in(layers: Mapping[str, Any]) -> Factors:
    """The factors that peft's ``layers`` hold, as they are now."""
    return {
        name: (
            layer.lora_A[_NAME].weight.detach().clone(),
            layer.lora_B[_NAME].weight.detach().clone(),
        )
        for name, layer in layers.items()
    }


def _name(method: DynamicDepthMethod, what: str = "") -> str:
    """Of a training's progress and checkpoint; ``what`` tells those of one recovery apart."""
    return f"{_NAME} {f'{what} ' if what else ''}{method.name} {method.target_speedup:g}x"


def _train(
    method: DynamicDepthMethod,
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    seed: int,
    progress: bool,
    what: str = "",
) -> Curve:
    """Optimise the adapters that are in the model; returns the curve."""
    plan = Schedule.of(recipe)
    windows = corpus.reader(recipe.length, plan.windows, _READING + seed, model=model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with attach(model, method, warn=False) as trace:
        return optimise(
            lambda ids, step: window_loss(model, method, trace, ids),
            [{"params": parameters, "lr": recipe.rate}],
            windows,
            plan,
            name=_name(method, what),
            seed=seed,
            progress=progress,
        )


def _scored(
    method: DynamicDepthMethod,
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    layers: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> Scores:
    """Learn the scores of the trained adapters that are in the model."""
    keep, steps, rate = recipe.keep, recipe.score_steps, recipe.score_rate
    assert keep is not None
    assert steps is not None
    assert rate is not None
    plan = Schedule.of(recipe, steps=steps, weight_decay=0.0)
    windows = corpus.reader(recipe.length, plan.windows, _WEIGHING + seed, model=model)
    with attach(model, method, warn=False) as trace:
        return learn(
            model,
            layers,
            _NAME,
            keep,
            lambda ids: window_loss(model, method, trace, ids),
            windows,
            plan,
            rate=rate,
            name=_name(method, "scores"),
            seed=seed,
            progress=progress,
        )


def window_loss(
    model: nn.Module, method: DynamicDepthMethod, trace: Trace, ids: Tensor
) -> tuple[Tensor, Row]:
    """Loss over the windows ``ids`` ``[batch, length]`` under the attached ``method``, and a row.

    Where the method tells prompts from what follows, the first half of each window is its prompt.
    Where it chooses by that and skips there, too, the rest alone counts: the choice has seen what
    comes next in the prompt.
    """
    phase = prompt_phase(method)
    trace.prompt_length = half = prompt_of(method, ids.shape[1])
    # Each window is a document of its own to methods that choose by document.
    trace.documents = [hashlib.sha256(row.tobytes()).hexdigest() for row in ids.cpu().numpy()]
    nats = _loss_from(model, ids, half if half and phase is None else 0)
    totals = trace.totals(phase)
    trace.reset()
    executed = totals["block_flops"] / max(totals["dense_block_flops"], 1.0)
    return nats, {"loss": nats.detach(), "executed": executed}


def _loss_from(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """``routers.loss`` of what position ``first`` and those after it predict, with the logits of
    one window at a time in memory.

    They are computed once more in the backward pass: beside a small model with a large vocabulary
    the logits of a batch and their gradients outweigh everything else.
    """
    parts = Decoder.of(model)
    read = parts.readout
    # A model that is spread over devices ends on another one than it began on.
    hidden = parts.owner(input_ids=ids, use_cache=False).last_hidden_state.to(ids.device)

    def nats(row: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(read(row).float(), wanted)

    found = [
        checkpoint(
            nats, row[first:-1], wanted[first + 1 :], use_reentrant=False, preserve_rng_state=False
        )
        for row, wanted in zip(hidden, ids, strict=True)
    ]
    return torch.stack(found).mean()


@contextmanager
def injected(
    model: nn.Module, recipe: Recipe, seed: int = 0, only: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """``model`` with fresh adapters that alone require a gradient; yields peft's layers by name.
    ``only`` names the projections that get one; None: all of the recipe.

    On exit, also by an exception, every module, flag and attribute is what it was. Raises UserError
    for a projection that can't be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model

    owner = causal_lm(model)
    targets = adaptable(model, recipe)
    if only is not None:
        targets = {name: module for name, module in targets.items() if name in only}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(map(transposed, targets.values())),
    )
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    known = set(vars(owner))
    try:
        with seeded(seed, next(model.parameters()).device):
            inject_adapter_in_model(config, owner, _NAME)
        layers: dict[str, Any] = {name: owner.get_submodule(name) for name in targets}
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for layer in layers.values():
            # Beside a half-precision model the few numbers that are trained stay exact.
            layer.lora_A[_NAME].float().requires_grad_(True)
            layer.lora_B[_NAME].float().requires_grad_(True)
            layer.lora_dropout.train()
            mark_along([layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight])
        yield layers
    finally:
        for name, target in targets.items():
            parent, _, last = name.rpartition(".")
            setattr(owner.get_submodule(parent), last, target)
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for name in set(vars(owner)) - known:
            delattr(owner, name)
