"""The rule of SkipGPT: which tokens run which sublayer, given routers and a threshold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.common.paths import path_of
from dyndepth.fitting.router_checks import check_depth, check_numbers
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity, KVPolicy

from .presets import PRESETS, Budget, Decay, Estimator, Initial, Objective, Precision, Recipe
from .router import build, flops_per_token


@dataclass(kw_only=True)
class RouterRule(DynamicDepthMethod):
    """SkipGPT, without the ways to its routers.

    Fields:
        phases: ``both``, or ``generation`` for full depth on the prompt.
        preset: named settings of the training, ``embedded`` or ``paper``.
        reads: ``stream``, or ``constant``: the control whose routers see no token, so that a
            trained set of sublayers remains.
        kv: ``evict`` for that policy in place of ``project``.
        routers: a folder with routers to use instead of training any: the output of
            ``dyndepth.fit``, or of the import of a published checkpoint.
        The others: ``presets.Recipe`` describes them; None takes the preset's value.
    """

    name: ClassVar[str] = "skipgpt"
    remarks: ClassVar[dict[str, dict[Any, str]]] = {
        "preset": {"embedded": "dyndepth's training", "paper": "the paper's training"}
    }
    granularity: ClassVar[Granularity] = "token"
    capturable: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2506.04179"
    needs_training: ClassVar[bool] = True
    shipped_adapters: ClassVar[Path | None] = Path(__file__).parent / "adapters"
    quick: ClassVar[dict[str, Any]] = {
        "rounds": 2,
        "windows": 8,
        "steps": 4,
        "batch": 2,
        "length": 24,
    }

    phases: Literal["generation", "both"] = "both"
    preset: Literal["embedded", "paper"] = "embedded"
    reads: Literal["stream", "constant"] = "stream"
    routers: str | None = None
    router: Literal["linear", "mlp"] | None = None
    normalise: bool | None = None
    standardise: bool | None = None
    initial: Initial | None = None
    rounds: int | None = None
    windows: int | None = None
    surplus: float | None = None
    budget: Budget | None = None
    penalty: float | None = None
    ramp: float | None = None
    curriculum: bool | None = None
    estimator: Estimator | None = None
    tau_start: float | None = None
    tau_end: float | None = None
    objective: Objective | None = None
    weight_rate: float | None = None
    bias_rate: float | None = None
    adapter_rate: float | None = None
    steps: int | None = None
    batch: int | None = None
    length: int | None = None
    accumulate: int | None = None
    warm_up: float | None = None
    decay: Decay | None = None
    weight_decay: float | None = None
    precision: Precision | None = None
    threshold: Literal["solved", "zero"] | None = None
    kv: Literal["project", "evict"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"steps": 0, "batch": 1, "length": 2, "accumulate": 1, "rounds": 1, "windows": 1}
        positive = ("penalty", "weight_rate", "bias_rate", "adapter_rate", "tau_start", "tau_end")
        check_numbers(self.recipe, least, positive)
        for name in ("ramp", "warm_up", "weight_decay"):
            if not 0 <= getattr(self.recipe, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not self.recipe.surplus >= 1:
            raise ValueError(f"surplus must be at least 1, not {self.surplus}")
        if self.recipe.router == "mlp" and self.recipe.initial == "gain":
            raise ValueError("initial=gain finds linear routers; give router=mlp another initial")
        if self.reads == "constant":
            # What routers decide without looking is one plan for all inputs.
            self.granularity = "static"  # type: ignore[misc]
            if self.recipe.router != "linear":
                raise ValueError(
                    "reads=constant leaves a router its bias alone; take router=linear"
                )
        if self.routers is not None:
            self.routers = with_digest(self.routers)

    @property
    def kv_policy(self) -> KVPolicy:
        """As the field says; by default projects, or drops where it reads nothing."""
        return self.kv or super().kv_policy

    @property
    def recipe(self) -> Recipe:
        """The preset with what this method's fields override."""
        named = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        chosen = {name: value for name, value in named.items() if value is not None}
        return replace(PRESETS[self.preset], **chosen)

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan at target 1.0 and for routers that read nothing, else none.

        Raises UserError if the routers are missing or of a model of another depth.
        """
        self.context = context
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        found = self.tensors.get("weight")
        check_depth(self, None if found is None else len(found), context.layers)
        if self.reads == "constant":
            return (self.tensors["bias"] >= self.facts["threshold"]).cpu()
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        normalise = self.facts.get("normalise")
        normalise = self.recipe.normalise if normalise is None else normalise
        self._router = build(self.tensors, normalise=normalise)
        self._flops = flops_per_token(self.tensors)
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """Both decisions of a block, at its entry."""
        logits = self._router(layer, hidden)
        self.context.bill("router", self._flops, None)
        execute = logits >= self.facts["threshold"]
        return execute[..., 0], execute[..., 1]


def with_digest(path: str) -> str:
    """``folder@digest``: the routers' place and content, so that equal names are equal routers.

    A digest that is given must be that of the files, or as earlier versions wrote it: of the
    tensors alone. Raises ValueError where there is no fit.
    """
    folder, mark, given = path.rpartition("@")
    if not mark or "/" in given:
        folder, given = path, ""
    place = path_of(folder)
    place = place / "fit" if (place / "fit").is_dir() else place
    digest, found = hashlib.sha256(), []
    for name in ("tensors.safetensors", "facts.json"):  # how they read the stream is a fact
        try:
            digest.update((place / name).read_bytes())
        except OSError:
            raise ValueError(
                f"routers={folder!r} is no folder with fitted routers (no {name} in it)"
            ) from None
        found.append(digest.hexdigest()[:12])
    if given and given not in found:
        raise ValueError(
            f"the routers in {folder!r} have changed: {found[-1]} now, {given} asked for"
        )
    return f"{place}@{found[-1]}"
