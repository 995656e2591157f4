"""Which adapters matter: one score a linear map, learned over a trained low-rank change of it.

Idea: most of what a fine-tune changes is not needed; what is, is worth training alone.
Paper: arXiv 2410.17875 (ILA).
Rule: with the change dW of each map trained and frozen, W = W0 + sigmoid(s) dW with one scalar s a
map; all s are learned together by Adam on next-token cross-entropy; the maps with the highest s are
trained alone, anew, from the start. ``lora(modules=ila, keep=0.3)``.
Deviations: how the paper starts the scores, how many steps it makes and how it weighs sparsity is
not known here. Ours start at 0 (half of each change), are learned in 40 steps at a rate of 0.1
under the recipe's batches and schedule, and no term asks for sparsity: the share to keep is given.
Their text is other than that of the adapters. A map that the first training left as it was (its
block is skipped) ranks behind all others. Without a sparsity term Adam lets the scores of all
helpful maps rise at nearly one pace: what tells them apart is how steadily each one helps, not by
how much.

What is ranked is the changes, not the blocks; ``dyndepth.studies.significance`` says how far the
two go together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.fitting.loop import Schedule, optimise
from dyndepth.method import SUBLAYERS
from dyndepth.models.blocks import ROLES, projections

if TYPE_CHECKING:
    from dyndepth.data.corpus import Windows
    from dyndepth.fitting.readings import Row

START = 0.0
"""Of every score."""


@dataclass(frozen=True)
class Scored:
    """One linear map: its name in the causal LM, ``layer`` and ``sublayer`` that it is of, its
    ``score`` s, whether the first training ``changed`` it, and whether it was ``kept``."""

    module: str
    layer: int
    sublayer: str
    score: float
    changed: bool
    kept: bool


@dataclass(frozen=True)
class Scores:
    """All maps in the order of the forward, and the ``tokens`` over which their scores were
    learned, with the loss at the first step and the last."""

    modules: list[Scored]
    tokens: int
    loss_first: float
    loss_last: float

    @classmethod
    def of(cls, facts: Mapping[str, Any], keep: float) -> Scores:
        """Of what ``facts`` gave, with the share ``keep`` of the maps kept."""
        found = [Scored(**row) for row in facts["modules"]]
        first = most_significant([e.score for e in found], [e.changed for e in found], keep)
        kept = [replace(each, kept=index in first) for index, each in enumerate(found)]
        return cls(kept, *(facts[name] for name in ("tokens", "loss_first", "loss_last")))

    @property
    def kept(self) -> list[str]:
        """Names of the maps to be trained in the end."""
        return [each.module for each in self.modules if each.kept]

    def facts(self) -> dict[str, Any]:
        """For the adapter's card: plain values."""
        return {"start": START, **asdict(self)}


def learn(
    model: nn.Module,
    layers: Mapping[str, Any],
    adapter: str,
    keep: float,
    objective: Callable[[Tensor], tuple[Tensor, Row]],
    windows: Tensor | Windows,
    schedule: Schedule,
    *,
    rate: float,
    name: str,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """The scores of the trained adapters called ``adapter`` in ``layers``, peft's by name.

    ``objective`` gives the loss of the windows ``ids`` ``[batch, length]`` and the curve's row. The
    adapters are as before afterwards, but that they require no gradient. The share ``keep`` of the
    maps, at least one, is kept: those of the highest scores.
    """
    scores = nn.Parameter(torch.full((len(layers),), START, device=next(model.parameters()).device))
    scales = {name: layer.scaling[adapter] for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_dropout.eval()
        for factor in (layer.lora_A, layer.lora_B):
            factor[adapter].requires_grad_(False)
    try:

        def weighed(ids: Tensor, step: int) -> tuple[Tensor, Row]:
            weigh(layers, adapter, scales, scores.sigmoid())
            return objective(ids)

        groups = [{"params": [scores], "lr": rate}]
        curve = optimise(
            weighed, groups, windows, schedule, name=name, seed=seed, progress=progress
        )
    finally:
        for each, scale in scales.items():
            layers[each].scaling[adapter] = scale
    changed = [bool(layer.lora_B[adapter].weight.any()) for layer in layers.values()]
    found = scores.detach().tolist()
    first = set(most_significant(found, changed, keep))
    places = _places(model, layers)
    modules = [
        Scored(each, *places[each], found[index], changed[index], index in first)
        for index, each in enumerate(layers)
    ]
    return Scores(modules, int(curve[-1]["tokens"]), curve[0]["loss"], curve[-1]["loss"])


def weigh(
    layers: Mapping[str, Any], adapter: str, scales: Mapping[str, float], weights: Tensor
) -> None:
    """Multiply the change of each of ``layers`` by its entry of ``weights`` ``[layers]``."""
    for (name, layer), weight in zip(layers.items(), weights, strict=True):
        layer.scaling[adapter] = scales[name] * weight.to(layer.lora_B[adapter].weight.device)


def most_significant(scores: Sequence[float], changed: Sequence[bool], keep: float) -> list[int]:
    """Indices of the share ``keep`` of those that were changed, at least one, with the highest
    scores; where all are to be kept, of all."""
    order = sorted(range(len(scores)), key=lambda i: (not changed[i], -scores[i], i))
    return order if keep == 1.0 else order[: max(1, round(keep * sum(changed)))]


def _places(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Layer and sublayer of each of ``layers``."""
    found: dict[str, tuple[int, str]] = {}
    for role, sublayer in ROLES.items():
        try:
            names = list(projections(model, [role]))
        except UserError:  # a family without it
            continue
        found |= {name: (layer, SUBLAYERS[sublayer]) for layer, name in enumerate(names)}
    return {name: found[name] for name in layers}
