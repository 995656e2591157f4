"""Layer controllers: a linear map a block decides, token by token, whether the block runs.

Idea: gates that read the hidden state. The paper's finding is negative, that they do hardly better
than gates that read nothing; ``reads=constant`` is that control.
Paper: Glavas et al., arXiv 2410.20022.
Rule: with x the stream that enters block l, n(x) = x / rms(x) and 0 < l < L-1,
    attention and MLP of block l run iff w . n(x) + b >= threshold;
the first and the last block always run. A token that is skipped keeps its stream unchanged. The
threshold, near 0, is solved on calibration text so that the measured speedup meets the target.
Training: the backbone is frozen; straight-through gates under loss + penalty * cost, with cost
|executed - 1/speedup| (``target``), or the executed share itself (``linear``, the paper's: no
target; what is left is made to meet it by the threshold).
Granularity: token; static for ``reads=constant``, whose learned rates, taken without sampling, are
one plan.
KV policy: project; the static control drops, or prompt_only.
Phases: ``both``, or ``generation`` as in the paper (the prompt at full depth): then the second half
of each training window counts.
Costs: one linear map a block that may be skipped, billed.
Deviations: deterministic at inference (the reference samples Gumbel noise at temperature 1 there);
keys and values of a skipped block come from the stream that passes it by (the reference computes
every block and multiplies); the paper's two logits are one, their difference; the normalised
stream, standardised while training, instead of the raw one; plain text instead of instructions and
summaries, and no fine-tuning of the backbone. The defaults are what trains within minutes on a
processor: a bias for each block in the order of the damage of removing it alone, everything on at
first, the divergence from the dense model as loss. Nearer to the paper:
``layer_controller(initial=random, estimator=gumbel, objective=ce, cost=linear)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import meet_target
from dyndepth.fitting.loop import Schedule
from dyndepth.fitting.removal import losses_alone, ranked_biases, units_of
from dyndepth.fitting.router_checks import check_depth, check_numbers
from dyndepth.fitting.routers import Tuning, budget_shares, stream_statistics, tune_router
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Gate,
    Granularity,
    Phases,
    Reading,
)
from dyndepth.methods.skipgpt.router import LinearRouter, flops_per_token, kaiming
from dyndepth.models.blocks import Decoder, blocks

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_ALWAYS = 1e4
"""Logit of the blocks that are never skipped."""
_DAMAGE_WINDOWS, _STATISTICS_WINDOWS = 2, 8
_CALIBRATION_WINDOWS, _CALIBRATION_LENGTH = 8, 256
# For an estimate: of at most twelve.
_CALIBRATION_ROUNDS = 4


class BlockRouter(LinearRouter):
    """One logit a block, from the normalised stream; the first and the last always execute.

    ``weight`` is ``[layers, 1, hidden]``, ``bias`` ``[layers, 1]``.
    """

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits ``[batch, tokens, hidden] -> [batch, tokens, 1]``."""
        if layer in (0, len(self.weight) - 1):
            return hidden.new_full((*hidden.shape[:2], 1), _ALWAYS, dtype=torch.float32)
        return super().forward(layer, hidden)


@dataclass(kw_only=True)
class LayerController(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
        reads: ``stream``, or ``constant``: the control whose controllers see no token.
        initial: ``damage``: everything runs at first, biases follow the damage of removing each
            block alone, weights are zero; ``random``: Kaiming-uniform weights and zero biases, as
            published.
        cost, penalty, ramp, estimator, objective, weight_rate, bias_rate: as in
            ``dyndepth.fitting.routers.Tuning``; the ramp is of ``cost=target`` alone.
        steps, batch, length: as in ``dyndepth.fitting.loop.Schedule``.
    """

    name: ClassVar[str] = "layer_controller"
    granularity: ClassVar[Granularity] = "token"
    capturable: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.20022"
    published_phases: ClassVar[Phases] = "generation"
    needs_training: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 8, "batch": 2, "length": 24, "weight_rate": 0.1}

    phases: Literal["generation", "both"] = "both"
    reads: Literal["stream", "constant"] = "stream"
    initial: Literal["damage", "random"] = "damage"
    cost: Literal["target", "linear"] = "target"
    penalty: float = 8.0
    ramp: float = 0.5
    estimator: Literal["deterministic", "gumbel"] = "deterministic"
    objective: Literal["ce", "kl"] = "kl"
    weight_rate: float = 4e-4
    bias_rate: float = 2e-2
    steps: int = 60
    batch: int = 2
    length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"steps": 1, "batch": 1, "length": 2}
        check_numbers(self, least, ("penalty", "weight_rate", "bias_rate"))
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must lie between 0 and 1, not {self.ramp}")
        if self.reads == "constant":
            # What controllers decide without looking is one plan for all inputs.
            self.granularity = "static"  # type: ignore[misc]

    def max_speedup(self, layers: int) -> float:
        """The first and the last block alone."""
        return layers / min(layers, 2)

    def expenses(
        self, layers: int, model: nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """The training's, and what comes before and after it; for an estimate."""
        if self.target_speedup == 1.0:
            return Expenses()
        dense = self.objective == "kl"
        length = min(2 * self.length, _CALIBRATION_LENGTH)
        damage = Reading(
            windows=_DAMAGE_WINDOWS,
            length=self.length,
            # Plans without one block share the blocks before it.
            forwards=0.5 * layers,
            heads=layers,
            kept=True,
        )
        return Expenses(
            fit=(
                *([damage] if self.initial == "damage" else []),
                Reading(
                    windows=self.steps * self.batch,
                    length=self.length,
                    forwards=1.0 + dense,
                    backwards=1.0,
                    heads=3.0 + dense,
                ),
                Reading(
                    windows=_CALIBRATION_ROUNDS * _CALIBRATION_WINDOWS,
                    length=length,
                    forwards=1 / self.target_speedup,
                ),
            )
        )

    def fit(self, model: nn.Module, corpus: Corpus | None = None) -> Self:
        """Train the controllers and solve their threshold.

        Raises UserError if ``corpus`` is None or the target is beyond reach.
        """
        if self.target_speedup == 1.0:
            return self
        most = self.max_speedup(len(blocks(model)))
        if self.target_speedup > most:
            raise UserError(
                f"layer_controller keeps the first and the last block: a speedup of at most "
                f"{most:g} on this model, not {self.target_speedup:g}"
            )
        corpus = _required(corpus)
        device = next(model.parameters()).device
        router = initial_router(self, model, corpus).to(device)
        linear = self.cost == "linear"
        tuning = Tuning(
            target_speedup=self.target_speedup,
            penalty=self.penalty,
            cost=self.cost,
            ramp=0.0 if linear else self.ramp,
            estimator=self.estimator,
            temperature=(1.0, 1.0),
            objective=self.objective,
            weight_rate=self.weight_rate,
            bias_rate=self.bias_rate,
            phases=self.phases,
        )
        schedule = Schedule.of(self)
        windows = corpus.reader(self.length, schedule.windows, self.seed, model=model)
        self.curve = tune_router(model, router, windows, tuning, schedule, seed=self.seed)
        self.tensors = router.folded()
        self.facts = {"tokens": int(self.curve[-1]["tokens"])}
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold for the model as it is now."""
        if self.target_speedup == 1.0:
            return
        length = fitting(model, min(2 * self.length, _CALIBRATION_LENGTH))
        windows = _required(corpus).windows(
            length, _CALIBRATION_WINDOWS, self.seed, split="calibration", model=model
        )
        steps = None
        if self.reads == "constant":
            steps = self._logits().expand(-1, 2), budget_shares(model, length)
        meet_target(model, self, windows, steps=steps)

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan at target 1.0 and for controllers that read nothing, else none.

        Raises UserError if the controllers are missing or of a model of another depth.
        """
        self.context = context
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        found = self.tensors.get("bias")
        depth = None if found is None else len(found)
        check_depth(self, depth, context.layers, "controllers")
        if self.reads == "constant":
            return (self._logits() >= self.facts["threshold"]).repeat(1, 2)
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        self._router = BlockRouter(self.tensors["weight"], self.tensors["bias"], normalise=True)
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """One decision for both sublayers of a block, at its entry."""
        if layer in (0, self.context.layers - 1):
            return True, True
        self.context.bill("router", flops_per_token(self.tensors), None)
        gate = self._router(layer, hidden)[..., 0] >= self.facts["threshold"]
        return gate, gate

    def _logits(self) -> Tensor:
        """Logits of controllers that read nothing: ``[layers, 1]``, on the CPU."""
        logits = self.tensors["bias"].cpu().clone()
        logits[[0, -1]] = _ALWAYS
        return logits


def initial_router(method: LayerController, model: nn.Module, corpus: Corpus) -> BlockRouter:
    """Controllers before training, as ``method.initial`` says."""
    layers, hidden = Decoder.of(model).shape
    if method.initial == "damage":
        windows = corpus.windows(method.length, _DAMAGE_WINDOWS, method.seed, model=model)
        bias = torch.full((layers,), _ALWAYS)
        device = next(model.parameters()).device
        bias[1:-1] = ranked_biases(block_damage(model, windows.to(device)))
        weight = torch.zeros(layers, 1, hidden)
    else:
        rows = kaiming(layers, 2, hidden, generator=torch.Generator().manual_seed(method.seed))
        weight, bias = rows[:, :1] - rows[:, 1:], torch.zeros(layers)
    if method.reads == "constant":
        router = BlockRouter(torch.zeros_like(weight), bias[:, None], normalise=True)
        router.weight.requires_grad_(False)
        return router
    windows = corpus.windows(method.length, _STATISTICS_WINDOWS, method.seed, model=model)
    mean, deviation = stream_statistics(model, windows, normalise=True)
    return BlockRouter(
        weight * deviation[:, None],
        bias[:, None] + (weight * mean[:, None]).sum(-1),
        normalise=True,
        statistics=(mean, deviation),
    )


def block_damage(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss added by removing each block but the first and the last alone: float32 ``[layers - 2]``.

    In nats a token, over the windows ``ids`` ``[batch, length]``.
    """
    dense, alone = losses_alone(model, ids, units_of(len(blocks(model)), "block")[1:-1])
    return (alone - dense).float()


def _required(corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise UserError(
            "layer_controller finds its controllers and their threshold on text; give fit a corpus"
        )
    return corpus
