"""SkipGPT: a tiny router a sublayer decides token by token whether it runs.

Idea: attention and MLP of each block are skipped separately, for each token, where a linear map of
the residual stream says so; only these maps are trained (stage 1). Stage 2, LoRA with the routers
frozen, is the harness's ``recovery``, the same for every method.
Paper: SkipGPT, arXiv 2506.04179 (ICML 2025).
Rule: with x the stream that enters block l and n(x) = x, or x / rms(x) if ``normalise``,
    attention runs iff w_a . n(x) + b_a >= threshold,
    MLP runs iff w_m . n(x) + b_m >= threshold;
both decisions are taken at the block's entry, as in the reference code. A token that is skipped
keeps its stream unchanged. Trained with loss + penalty * |executed - 1/speedup|; the threshold,
near 0, is then solved on calibration text so that the measured speedup meets the target: the
trained rate drifts from the measured one.
Granularity: token and sublayer; no block and no token is protected. ``reads=constant``: static.
KV policy: project. Every token's keys and values are computed in every block, as in the reference.
Phases: both, as in the paper; ``generation`` keeps the prompt at full depth.
Presets: ``paper`` has the published settings; ``embedded``, the default, what trains stably on a
thin, deep model within minutes: see presets.py.
Deviations: decisions are deterministic at inference (the reference samples Gumbel noise there too).
Under ``embedded`` also in training; the budget counts FLOPs where the reference counts modules;
biases start from a greedy removal order; the objective is the divergence from the dense model; the
routers see the RMS-normalised stream. In both presets no gradient passes through a router's input
into the stream, and the paper's two logits are one, their difference.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.errors import UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity

from .presets import PRESETS, Budget, Decay, Estimator, Initial, Objective, Precision, Recipe
from .router import build, flops_per_token

if TYPE_CHECKING:
    from dyndepth.corpus import Corpus


@dataclass(kw_only=True)
class SkipGPT(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` for full depth on the prompt.
        preset: named settings of the training, ``embedded`` or ``paper``.
        reads: ``stream``, or ``constant``: the control whose routers see no token, so that a
            trained set of sublayers remains.
        routers: a folder with routers to use instead of training any, as ``dyndepth.fit`` or the
            import of a published checkpoint writes it.
        The others: ``presets.Recipe`` describes them; None takes the preset's value.
    """

    name: ClassVar[str] = "skipgpt"
    granularity: ClassVar[Granularity] = "token"
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

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"steps": 0, "batch": 1, "length": 2, "accumulate": 1, "rounds": 1, "windows": 1}
        for name, bound in least.items():
            if getattr(self.recipe, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
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
    def recipe(self) -> Recipe:
        """The preset with what this method's fields override."""
        named = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        chosen = {name: value for name, value in named.items() if value is not None}
        return replace(PRESETS[self.preset], **chosen)

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Take the routers named, or those shipped for this model, target and corpus, else train.

        Raises UserError if text is needed and ``corpus`` is None, or if routers do not fit.
        """
        from .shipped import load_named, load_shipped
        from .tuning import train

        if self.target_speedup == 1.0:
            return self
        if self.routers is not None:
            self.tensors, self.facts = load_named(self, model)
            self.calibrate(model, corpus)
            return self
        shipped = load_shipped(self, model)
        other_text = corpus is not None and shipped and shipped[1]["corpus"] != corpus.fingerprint
        along = any(parameter.requires_grad for parameter in model.parameters())
        if shipped is None or other_text or along:
            train(self, model, corpus)
            return self
        self.tensors, self.facts = shipped
        if self.phases != "both":
            self.calibrate(model, corpus)
        return self

    def calibrate(self, model: torch.nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold for the model as it is now."""
        from .tuning import calibrate

        if self.target_speedup > 1.0:
            calibrate(self, model, corpus)

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan at target 1.0 and for routers that read nothing, else none.

        Raises UserError if the routers are missing or of a model of another depth.
        """
        self.context = context
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        if "weight" not in self.tensors:
            raise UserError("skipgpt has no routers yet; call fit(model, corpus) before attaching")
        if len(self.tensors["weight"]) != context.layers:
            raise UserError(
                f"these routers are for a model of {len(self.tensors['weight'])} blocks, not "
                f"{context.layers}; fit the method on this model"
            )
        if self.reads == "constant":
            return (self.tensors["bias"] >= self.facts["threshold"]).cpu()
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        self._router = build(
            self.tensors, normalise=self.facts.get("normalise", self.recipe.normalise)
        )
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

    A digest that is given must be that of the file. Raises ValueError where there is no fit.
    """
    folder, _, given = path.partition("@")
    file = Path(folder).expanduser() / "tensors.safetensors"
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        raise ValueError(
            f"routers={folder!r} is no folder with fitted routers (no {file.name} in it)"
        ) from None
    if given and given != found:
        raise ValueError(f"the routers in {folder!r} have changed: {found} now, {given} asked for")
    return f"{folder}@{found}"
