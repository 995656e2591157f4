"""What SkipGPT's training is made of, and the two named sets of settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Initial = Literal["gain", "order", "damage", "random"]
Estimator = Literal["deterministic", "gumbel"]
Objective = Literal["ce", "kl"]
Budget = Literal["flops", "modules"]
Decay = Literal["cosine", "constant"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of the training; the method has a field of the same name for each.

    Attributes:
        router: ``linear``, or ``mlp`` (hidden -> hidden / 4 -> 1, the reference code's variant).
        normalise: the routers see the stream divided by its root mean square, else the raw one.
        standardise: a linear router learns on the stream with each dimension's mean and deviation
            taken off; both are folded into it afterwards.
        initial: ``gain``: linear routers by regression of what executing would gain each token,
            over the sublayers that a greedy joint removal would take first
            (``dyndepth.fitting.regression``); ``order``: biases that execute the target from the
            start, by that removal's order; ``damage``: everything runs at first, biases follow the
            damage of each removal alone; ``random``: Kaiming-uniform weights and zero biases, as
            published. ``order`` and ``damage`` start with zero weights, so that a gate depends on
            no token yet.
        rounds, windows: of ``gain``: rounds of regression, windows that each reads.
        surplus: of ``gain``: removable is this much more of the budget than the target removes.
        budget, penalty, ramp, estimator, objective, weight_rate, bias_rate, adapter_rate: as in
            ``dyndepth.fitting.routers.Tuning``.
        curriculum: the reference code's: the wanted share falls by 0.1 every 500 steps.
        tau_start, tau_end: temperature of ``gumbel`` at the first and the last step.
        steps: of the straight-through training; 0 leaves the routers as they were begun. Adapters
            that are trained along get 60 then.
        batch, length, accumulate, warm_up, decay, weight_decay, precision: as in
            ``dyndepth.fitting.loop.Schedule``.
        threshold: ``solved`` so that the measured speedup meets the target, or ``zero``.
    """

    router: Literal["linear", "mlp"]
    normalise: bool
    standardise: bool
    initial: Initial
    rounds: int
    windows: int
    surplus: float
    budget: Budget
    penalty: float
    ramp: float
    curriculum: bool
    estimator: Estimator
    tau_start: float
    tau_end: float
    objective: Objective
    weight_rate: float
    bias_rate: float
    adapter_rate: float
    steps: int
    batch: int
    length: int
    accumulate: int
    warm_up: float
    decay: Decay
    weight_decay: float
    precision: Precision
    threshold: Literal["solved", "zero"]


PRESETS: dict[str, Recipe] = {
    # What trains stably on the embedded model within minutes of two cores (measured there).
    "embedded": Recipe(
        router="linear",
        normalise=True,
        standardise=True,
        initial="gain",
        rounds=3,
        windows=32,
        surplus=1.67,
        budget="flops",
        penalty=8.0,
        ramp=0.0,
        curriculum=False,
        estimator="deterministic",
        tau_start=1.0,
        tau_end=1.0,
        objective="kl",
        weight_rate=1e-4,
        bias_rate=1e-3,
        adapter_rate=1e-3,
        # Forty straight-through steps at these rates bought 0.01 nats more at 1.25x (4.310 to
        # 4.300 on held-out text) for as much time again.
        steps=0,
        batch=2,
        length=256,
        accumulate=1,
        warm_up=0.05,
        decay="cosine",
        weight_decay=0.0,
        precision="no",
        threshold="solved",
    ),
    # As published (arXiv 2506.04179; what its text leaves open, from the code: EIT-NLP/SkipGPT
    # fb2a203): AdamW at 2e-3 and decay 0.01 on each of two logits. Their difference, our one
    # logit, then moves at twice that rate, whatever its gradient; so the rates are doubled, and
    # the decay, which the rate multiplies, is halved.
    "paper": Recipe(
        router="linear",
        normalise=False,
        standardise=False,
        initial="random",
        rounds=3,
        windows=32,
        surplus=1.67,
        budget="modules",
        penalty=8.0,
        ramp=0.0,
        curriculum=False,
        estimator="gumbel",
        tau_start=5.0,
        tau_end=1.0,
        objective="ce",
        weight_rate=4e-3,
        bias_rate=4e-3,
        adapter_rate=2e-4,
        steps=10_000,
        batch=1,
        length=4096,
        accumulate=16,
        warm_up=0.0,
        decay="constant",
        weight_decay=0.005,
        precision="bf16",
        threshold="solved",
    ),
}
