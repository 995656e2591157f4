"""Budgeted router tuning by straight-through gates, for every method with routers.

The backbone is frozen. A router module says, at each block's entry, one logit a token and sublayer;
a sublayer runs where its logit is not negative. Training executes everything and multiplies by
straight-through gates, under

    loss + penalty * | executed share - wanted share |        (arXiv 2506.04179)

with both shares counted in block FLOPs or in modules, or with no share wanted (arXiv 2410.20022).
Two estimators of the gates' gradient: ``gumbel``, as published, samples hard gates from a logistic
distribution (the difference of the Gumbel noises of two logits) at a temperature that falls during
training; ``deterministic`` takes the gates that inference will take and a sigmoid's slope. Nothing
is sampled at inference.

Adapters that a caller put in and marked (``mark_along``) are trained along; the loss is then
cross-entropy, since a dense model that moves is no yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyndepth.fitting.loop import Curve, Schedule, optimise
from dyndepth.fitting.losses import divergence_of_states, final_states, next_token_nats
from dyndepth.fitting.readings import Row
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, KVPolicy
from dyndepth.models.blocks import Decoder, blocks
from dyndepth.models.rotary import forget
from dyndepth.models.seeding import seeded
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts

if TYPE_CHECKING:
    from dyndepth.data.corpus import Windows


class Router(nn.Module):
    """What is trained: logits of both sublayers, from the stream at a block's entry.

    ``bias`` is float32 ``[layers, 2]``, added to the logits; ``forward(layer, hidden)`` maps
    ``[batch, tokens, hidden]`` to float32 ``[batch, tokens, 2]``, execute where not negative.
    A router whose one logit decides for both sublayers has 1 in place of the 2.
    """

    bias: nn.Parameter

    def weights(self, layer: int, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As ``DynamicDepthMethod.weights``, from the logits that ``forward`` gave for the block,
        before any noise."""
        return None, None

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """As ``DynamicDepthMethod.instead``."""
        return None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is asked of the routers.

    Attributes:
        target_speedup: the executed share is to become 1 / target_speedup.
        budget: what a share counts: ``flops`` of the blocks, or ``modules`` (attention and MLP
            weigh the same, as in the paper).
        penalty: weight of the budget against the loss, nats a token.
        cost: ``target``, or ``linear``: whatever is executed costs, as if the wanted share were 0.
        ramp: share of the steps over which the wanted share falls linearly from what the routers
            execute at first; 0: it is the target from the first step.
        curriculum: ``(fall, steps)``: instead of the ramp, from 1 by ``fall`` every ``steps``.
        estimator: ``deterministic``, ``gumbel``, or ``soft``: gates are the sigmoids themselves.
        temperature: of ``gumbel``, at the first and the last step.
        objective: ``ce``, next-token cross-entropy; ``kl``, divergence from the dense model's
            predictions, which says more about each token at a third more arithmetic.
        weight_rate, bias_rate: learning rates.
        adapter_rate: of adapters that are trained along.
        phases: ``generation`` keeps the first half of each window at full depth.
        prompt: the first half of each window is its prompt, also where ``phases`` is ``both``, and
            the loss is that of the rest.
        each_token: each token's own share is held to the wanted one (the mean of the distances),
            not their mean alone (the distance of the mean).
        rise: share of the steps over which the penalty rises, as the first quarter of a sine, from
            none; 0: it is all there from the first step.
        keep_first: tokens at the beginning of each sequence that execute everything; no budget
            counts them.
        kv_policy: of the method that the routers are for.
    """

    target_speedup: float
    budget: Literal["flops", "modules"] = "flops"
    penalty: float = 8.0
    cost: Literal["target", "linear"] = "target"
    ramp: float = 0.0
    curriculum: tuple[float, int] | None = None
    estimator: Literal["deterministic", "gumbel", "soft"] = "deterministic"
    temperature: tuple[float, float] = (5.0, 1.0)
    objective: Literal["ce", "kl"] = "kl"
    weight_rate: float = 3e-3
    bias_rate: float = 2e-2
    adapter_rate: float = 2e-4
    phases: Literal["generation", "both"] = "both"
    prompt: bool = False
    each_token: bool = False
    rise: float = 0.0
    keep_first: int = 0
    kv_policy: KVPolicy = "project"

    def pressed(self, step: int, steps: int) -> float:
        """Weight of the budget against the loss at ``step``."""
        done = min(1.0, (step + 1) / (self.rise * steps)) if self.rise else 1.0
        return self.penalty * math.sin(done * math.pi / 2)

    def wanted(self, step: int, steps: int, first: float) -> float:
        """The share asked for at ``step``; ``first`` is what was executed at the first one."""
        if self.cost == "linear":
            return 0.0
        target = 1 / self.target_speedup
        if self.curriculum is not None:
            fall, every = self.curriculum
            return max(target, 1 - fall * (step // every))
        done = min(1.0, (step + 1) / (self.ramp * steps)) if self.ramp else 1.0
        return first + (target - first) * done


class Routed(DynamicDepthMethod):
    """The gates of a router in training: 0 or 1 forward, a slope back."""

    name: ClassVar[str] = "routed"
    granularity: ClassVar[Any] = "token"
    paper: ClassVar[str] = "internal"

    def __init__(self, router: Router, tuning: Tuning) -> None:
        super().__init__()
        self.router, self.tuning = router, tuning
        self.full_depth = False
        self.temperature = tuning.temperature[0]
        self._gates: list[Tensor] = []
        self._logits: Tensor | None = None

    @property
    def kv_policy(self) -> KVPolicy:
        """That of the method that the routers are for."""
        return self.tuning.kv_policy

    @property
    def weighs(self) -> bool:
        """Whether the router has weights."""
        return type(self.router).weights is not Router.weights

    @property
    def substitutes(self) -> bool:
        """Whether the router has something instead."""
        return type(self.router).instead is not Router.instead

    @property
    def phases(self) -> Literal["generation", "both"]:
        """Those of the method that the routers are for."""
        return self.tuning.phases

    def start(self, context: ForwardContext) -> Tensor | None:
        """A full plan while ``full_depth`` is set."""
        self._gates = []
        self._logits = None
        self.context = context
        return torch.ones(context.layers, 2, dtype=torch.bool) if self.full_depth else None

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """Straight-through gates; the stream itself gets no gradient through the routers."""
        logits = self._logits = self.router(layer, hidden.detach())
        if self.tuning.estimator == "gumbel":
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (logits + uniform.logit()) / self.temperature
        soft = torch.sigmoid(logits)
        hard = soft if self.tuning.estimator == "soft" else (logits >= 0).float()
        gates = hard.detach() + soft - soft.detach()
        if self.tuning.keep_first:
            first = (self.context.positions < self.tuning.keep_first).to(gates.device)
            gates = torch.where(first[..., None], torch.ones_like(gates), gates)
        self._gates.append(gates)
        return gates[..., 0], gates[..., -1]

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The router's, of the block whose gates were asked last; none at full depth."""
        if self._logits is None:
            return None, None
        return self.router.weights(layer, self._logits)

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """The router's."""
        return self.router.instead(layer, sublayer, rows)

    def executed(self, shares: Tensor) -> Tensor:
        """Executed share of the last forward, a scalar with a gradient into every router."""
        part = self._counted
        means = [
            (gates.mean((0, 1)) if part is None else _mean_of(gates, part)).to(shares.device)
            for gates in self._gates
        ]
        return (torch.stack(means) * shares).sum()

    def distance(self, shares: Tensor, wanted: float) -> Tensor:
        """How far the last forward was from the ``wanted`` share, as the tuning measures it."""
        if not self.tuning.each_token:
            return (self.executed(shares) - wanted).abs()
        gates = torch.stack([each.to(shares.device) for each in self._gates], 2)
        away = ((gates * shares).sum((2, 3)) - wanted).abs()
        part = self._counted
        return away.mean() if part is None else _mean_of(away[..., None], part)[0]

    @property
    def _counted(self) -> Tensor | None:
        """The tokens that the budget counts; None: all."""
        part = self.context.generation
        if not self.tuning.keep_first:
            return part
        free = self.context.positions >= self.tuning.keep_first
        return free if part is None else part & free


def _mean_of(gates: Tensor, part: Tensor) -> Tensor:
    """Mean over the tokens of ``part``, which nobody counts on the host: ``[gates]``."""
    chosen = part.to(gates.device)[..., None].to(gates.dtype)
    return (gates * chosen).sum((0, 1)) / chosen.sum()


def mark_along(parameters: Iterable[nn.Parameter]) -> None:
    """Have ``parameters`` of a model trained along with whatever routers are trained on it."""
    for parameter in parameters:
        parameter.dyndepth_along = True  # type: ignore[attr-defined]


def trained_along(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that were marked."""
    return [p for p in model.parameters() if getattr(p, "dyndepth_along", False)]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """All parameters but the marked ones without a gradient; as they were on exit."""
    along = {id(parameter) for parameter in trained_along(model)}
    open_ones = [p for p in model.parameters() if p.requires_grad and id(p) not in along]
    for parameter in open_ones:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in open_ones:
            parameter.requires_grad_(True)


def next_token_loss(logits: Tensor, ids: Tensor, first: int = 0) -> Tensor:
    """Mean cross-entropy in nats of predicting each next token of ``ids`` ``[batch, length]``.

    ``logits`` is ``[batch, length, vocabulary]``; predictions made before position ``first`` do
    not count.
    """
    return cross_entropy(logits[:, first:-1].flatten(0, 1).float(), ids[:, first + 1 :].flatten())


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over the windows ``[batch, length]``."""
    return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)


class CanRunInFull(Protocol):
    """A method whose forwards run at full depth while ``full_depth`` is set."""

    full_depth: bool


def divergence(model: nn.Module, method: CanRunInFull, ids: Tensor, first: int = 0) -> Tensor:
    """Kullback-Leibler divergence of the attached ``method``'s predictions from the dense model's.

    In nats, for each position of ``ids`` from ``first`` on: ``[batch, length - first]``, with a
    gradient into the gates. ``method`` must be the one that is attached to ``model``.
    """
    parts = Decoder.of(model)
    method.full_depth = True
    with torch.no_grad():
        dense = final_states(parts, ids)[:, first:]
    method.full_depth = False
    return divergence_of_states(parts, dense, final_states(parts, ids)[:, first:])


def inverse_scale(hidden: Tensor) -> Tensor:
    """1 / root mean square of each token: ``[..., hidden] -> [..., 1]``."""
    return torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def see_streams(model: nn.Module, windows: Tensor, see: Callable[[int, Tensor], None]) -> None:
    """Show ``see(layer, stream)`` what enters each block of the dense model over ``windows``.

    ``windows`` is int64 ``[count, length]``, read two at a time; a stream ``[2, length, hidden]``.
    """
    parts = Decoder.of(model)

    def watch(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            see(index, args[0] if args else kwargs["hidden_states"])

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(parts.layers)
    ]
    forget(model)
    try:
        for ids in windows.to(next(model.parameters()).device).split(2):
            parts.owner(input_ids=ids, use_cache=False)
    finally:
        for each in hooks:
            each.remove()


def stream_statistics(
    model: nn.Module, windows: Tensor, *, normalise: bool, pooled: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension of what a router reads: two ``[layers, hidden]``, CPU.

    Of the dense model's streams over ``windows`` ``[count, length]``, each token divided by its
    root mean square if ``normalise``; of the means over each window's tokens if ``pooled``. A
    deviation is kept from falling below a thousandth.
    """
    found: list[list[Tensor]] = [[] for _ in Decoder.of(model).layers]

    def see(layer: int, stream: Tensor) -> None:
        stream = stream.float()
        stream = stream * inverse_scale(stream) if normalise else stream
        found[layer].append(stream.mean(1) if pooled else stream.flatten(0, 1))

    see_streams(model, windows, see)
    streams = [torch.cat(seen) for seen in found]
    # On the CPU, where routers begin, whichever device each block lies on.
    mean = torch.stack([stream.mean(0).cpu() for stream in streams])
    deviation = torch.stack([stream.std(0).cpu() for stream in streams]) + 1e-3
    return mean, deviation


def budget_shares(model: nn.Module, length: int, budget: str = "flops") -> Tensor:
    """Each sublayer's share of the budget: float32 ``[layers, 2]``, their sum is 1.

    ``flops``: of the block FLOPs with ``length`` keys; ``modules``: all the same.
    """
    layers = len(blocks(model))
    if budget == "modules":
        return torch.full((layers, 2), 0.5 / layers)
    costs = BlockCosts.of(model)
    flops = np.stack([costs.attention(length), costs.mlp], axis=1)
    return torch.from_numpy(flops / flops.sum()).float()


def tune_router(
    model: nn.Module,
    router: Router,
    windows: Tensor | Windows,
    tuning: Tuning,
    schedule: Schedule,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Curve:
    """Train ``router`` in place, on ``windows`` ``[at least schedule.windows, length]``.

    Returns the curve: per step ``loss`` (nats a token, of the objective), ``executed`` and
    ``wanted`` (shares of the budget) and ``tokens`` read.
    """
    device = next(model.parameters()).device
    shares = budget_shares(model, schedule.length, tuning.budget).to(device)
    half = schedule.length // 2 if tuning.prompt or tuning.phases == "generation" else 0
    method = Routed(router, tuning)
    along = trained_along(model)
    first = 1.0
    if tuning.ramp:
        with (
            torch.no_grad(),
            seeded(seed, device),
            attach(model, method, backend="masked", prompt_length=half or None, count=False),
        ):
            final_states(Decoder.of(model), windows[: schedule.batch].to(device))
            first = method.executed(shares).item()

    def objective(ids: Tensor, step: int) -> tuple[Tensor, Row]:
        start, end = tuning.temperature
        method.temperature = start - (start - end) * step / schedule.steps
        if tuning.objective == "kl" and not along:
            nats = divergence(model, method, ids, half).mean()
        else:
            nats = next_token_nats(model, ids, half)
        executed = method.executed(shares)
        wanted = tuning.wanted(step, schedule.steps, first)
        row: Row = {"loss": nats.detach(), "executed": executed.detach(), "wanted": wanted}
        away = method.distance(shares, wanted)
        return nats + tuning.pressed(step, schedule.steps) * away, row

    bias = [router.bias]
    weights = [p for name, p in router.named_parameters() if name != "bias"]
    groups = [
        {"params": bias, "lr": tuning.bias_rate},
        {"params": weights, "lr": tuning.weight_rate},
        {"params": along, "lr": tuning.adapter_rate},
    ]
    with (
        _frozen(model),
        attach(model, method, backend="masked", prompt_length=half or None, count=False),
    ):
        return optimise(
            objective,
            [group for group in groups if group["params"]],
            windows,
            schedule,
            name=f"routers {tuning.target_speedup:g}x",
            seed=seed,
            progress=progress,
        )
