"""From which skipped fraction on does token routing pay?

Random token masks, given and not computed, skip a growing fraction of the token-sublayers. Each
fraction takes turns with the stock model in one process, so a wall speedup is a median over rounds,
and the break-even is the fraction where the curve of speedups crosses 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import isotonic_regression

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import check_length, embeddings
from dyndepth.timing.pairing import LEAST_PAIRS, Median, Times, interleave, ratio

if TYPE_CHECKING:
    from torch import Tensor

    from dyndepth.timing.jobs import Decode, Job, Prefill


SKIPPING = ("both", "attention", "mlp")
NOTHING_SKIPPED = 0.0
"""The stock model, among times by skipped fraction."""
_LEVEL = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True)
class BreakEven:
    """Where a curve of speedups by skipped fraction crosses 1.

    Attributes:
        fractions: that were measured, ascending.
        crossing: the fraction from which on the speedup lies above 1; ``low`` to ``high`` is its
            95% interval. In all three, 0 stands for "below the smallest fraction measured" and 1
            for "beyond the largest".
        pays_from: the smallest fraction measured at which, as at every larger one, the whole 95%
            interval of the speedup lies above 1; None if there is none. Where a runtime computes
            everything because skipping would not pay, speedups lie at 1 and the crossing may be
            anywhere in that stretch, as its interval then says; this does not depend on it.
    """

    fractions: tuple[float, ...]
    crossing: float
    low: float
    high: float
    pays_from: float | None

    def __str__(self) -> str:
        smallest, largest = self.fractions[0], self.fractions[-1]
        if self.pays_from == smallest:
            return f"pays from the smallest fraction measured on, {smallest:g}"
        where = f"{self._said(self.crossing)}, 95% interval {self._said(self.low)}"
        crossing = f"the break-even is {where} to {self._said(self.high)}"
        if self.pays_from is None:
            told = f"does not pay within the measured range, {smallest:g} to {largest:g}"
            return told if self.crossing == self.low == 1 else f"{told}, beyond noise; {crossing}"
        return f"pays from {self.pays_from:g} on, beyond noise; {crossing}"

    def _said(self, fraction: float) -> str:
        ends = {0.0: f"below {self.fractions[0]:g}", 1.0: f"above {self.fractions[-1]:g}"}
        return ends.get(fraction, f"{fraction:.2f}")


def break_even(
    dense: Sequence[float], thinned: Mapping[float, Sequence[float]], *, seed: int = 0
) -> BreakEven:
    """The break-even of times that were measured in the same rounds.

    ``dense`` and the lists in ``thinned``, by skipped fraction, are seconds, one a round. The curve
    is the isotonic regression (speedups never fall as more is skipped) of the median speedups,
    linear in between. The interval is that of a percentile bootstrap over the rounds, each resample
    of which takes whole rounds.

    Raises:
        ValueError: no fraction, one outside of 0 to 1 (both excluded), or fewer than 6 rounds.
    """
    fractions = tuple(sorted(thinned))
    if not fractions or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"skipped fractions lie between 0 and 1, and these are {fractions}")
    if len(dense) < LEAST_PAIRS:
        raise ValueError(f"{len(dense)} rounds have no interval; take {LEAST_PAIRS} or more")
    ratios = np.array([np.divide(dense, thinned[fraction]) for fraction in fractions])
    rounds = ratios.shape[1]
    drawn = np.random.default_rng(seed).integers(rounds, size=(_RESAMPLES, rounds))
    medians = np.median(ratios[:, drawn], axis=2)  # [fractions, resamples]
    crossings = [_crossing(fractions, column) for column in medians.T]
    # Ends that were observed: nothing lies between "beyond the largest" and a fraction.
    low, high = np.quantile(
        crossings, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], method="inverted_cdf"
    ).tolist()
    crossing = _crossing(fractions, np.median(ratios, axis=1))
    pays_from = None
    for fraction in reversed(fractions):
        if not ratio(dense, thinned[fraction]).low > 1:
            break
        pays_from = fraction
    return BreakEven(fractions, crossing, low, high, pays_from)


def _crossing(fractions: Sequence[float], speedups: Any) -> float:
    """Where the isotonic curve leaves 1 upwards; 0 and 1 as in ``BreakEven``."""
    curve = isotonic_regression(speedups).x
    above = int((curve <= 1).sum())
    if above == 0 or above == len(curve):
        return float(above > 0)
    share = (1 - curve[above - 1]) / (curve[above] - curve[above - 1])
    start, end = fractions[above - 1], fractions[above]
    return float(start + share * (end - start))


@dataclass(frozen=True)
class Regime:
    """What is measured.

    Attributes:
        phase: ``prefill``, one forward over ``length`` tokens; or ``decode``, steps of one token a
            sequence over a cache of ``length`` tokens, all of them computed at full depth.
        batch, length: sequences, and tokens of each.
        sublayers: where masks skip: ``both`` (drawn apart), ``attention`` or ``mlp``.
        router: hidden size of a two-layer router that runs at each block's entry and is billed,
            its answer ignored; 0 for none.
    """

    phase: str
    batch: int = 1
    length: int = 512
    sublayers: str = "both"
    router: int = 0


@dataclass(frozen=True)
class Curve:
    """Speedups by skipped fraction in one regime.

    Attributes:
        times: seconds by skipped fraction, one a round, of one forward; the stock model's by
            ``NOTHING_SKIPPED``.
        speedups: of each fraction over the stock model, with 95% intervals.
        total_speedups: dense FLOPs / executed FLOPs of the same forwards, the router included.
    """

    regime: Regime
    times: dict[float, list[float]]
    speedups: dict[float, Median]
    total_speedups: dict[float, float]
    break_even: BreakEven

    def rows(self) -> list[dict[str, Any]]:
        """One row a fraction; the command's help says what the columns are."""
        found = self.break_even
        return [
            {
                **vars(self.regime),
                "skipped_fraction": fraction,
                "dense_median_s": statistics.median(self.times[NOTHING_SKIPPED]),
                "routed_median_s": statistics.median(self.times[fraction]),
                "wall_speedup": speedup.median,
                "wall_speedup_low": speedup.low,
                "wall_speedup_high": speedup.high,
                "repeats": speedup.n,
                "total_speedup": self.total_speedups[fraction],
                "wall_efficiency": speedup.median / self.total_speedups[fraction],
                "break_even": found.crossing,
                "break_even_low": found.low,
                "break_even_high": found.high,
                "pays_from": found.pays_from,
            }
            for fraction, speedup in self.speedups.items()
        ]


def measure(
    model: Any,
    regime: Regime,
    fractions: Sequence[float],
    *,
    repeats: int = 15,
    seed: int = 0,
    progress: bool = True,
) -> Curve:
    """Time the skipped ``fractions`` in ``repeats`` rounds, each with the stock model.

    The tokens are random: with given gates, what they say changes no time. Masks of one fraction
    hold those of the smaller ones.

    Raises:
        UserError: a fraction that skips nothing, or more tokens than the model takes.
        ValueError: as ``break_even``.
    """
    import torch
    from tqdm import tqdm

    from dyndepth.timing.jobs import STEPS

    jobs = _jobs(model, regime, sorted(set(fractions)), seed)
    label = f"{regime.phase} {regime.batch}x{regime.length}"
    with tqdm(total=repeats, desc=label, unit=" rounds", disable=not progress, leave=False) as bar:

        def enough(times: Times) -> bool:
            bar.update(len(times[str(NOTHING_SKIPPED)]) - bar.n)
            return False

        with torch.inference_mode():
            found = interleave(
                {str(fraction): job.run for fraction, job in jobs.items()},
                around={str(fraction): job.prepared for fraction, job in jobs.items()},
                repeats=1,
                seed=seed,
                device=model.device,
                enough=enough,
                most=repeats,
            )
    steps = STEPS if regime.phase == "decode" else 1
    times = {fraction: [each / steps for each in found[str(fraction)]] for fraction in jobs}
    thinned = {fraction: own for fraction, own in times.items() if fraction != NOTHING_SKIPPED}
    return Curve(
        regime,
        times,
        {fraction: ratio(times[NOTHING_SKIPPED], own) for fraction, own in thinned.items()},
        {fraction: jobs[fraction].flop_ideal for fraction in thinned},
        break_even(times[NOTHING_SKIPPED], thinned, seed=seed),
    )


def _jobs(model: Any, regime: Regime, fractions: Sequence[float], seed: int) -> dict[float, Job]:
    """The stock model, and the model under masks of each fraction."""
    import torch

    from dyndepth.models.blocks import blocks
    from dyndepth.timing.jobs import STEPS, Decode, Job, Prefill, given

    decoding = regime.phase == "decode"
    needed = regime.length + STEPS * decoding
    check_length(model, needed, f"{regime.phase} {regime.batch} x {regime.length}", "take fewer")
    generator = torch.Generator().manual_seed(seed)
    size = (regime.batch, needed)
    tokens = torch.randint(embeddings(model), size, generator=generator).to(model.device)
    shape: Prefill | Decode = Decode(tokens, regime.length) if decoding else Prefill(tokens)
    width = STEPS if decoding else regime.length
    drawn = torch.rand(2, len(blocks(model)), regime.batch, width, generator=generator)
    routers = _routers(model, regime.router) if regime.router else None
    with torch.inference_mode():
        jobs = {NOTHING_SKIPPED: Job(model, None, shape)}
        for fraction in fractions:
            masks = _masks(drawn, fraction, regime.sublayers).to(model.device)
            method = given(masks, "generation" if decoding else "both", routers)
            jobs[fraction] = Job(model, method, shape)
    return jobs


def _masks(drawn: Tensor, fraction: float, sublayers: str) -> Tensor:
    """Masks ``[layers, 2, batch, width]``: ``fraction`` of each kind of sublayer's tokens skip,
    over all blocks, those with the smallest numbers in ``drawn``, ``[2, layers, batch, width]``."""
    ranks = drawn.flatten(1).argsort().argsort()
    skipped = round(fraction * ranks.shape[1])
    if not skipped:
        raise UserError(
            f"a skipped fraction of {fraction:g} skips none of {ranks.shape[1]} tokens, counted "
            "over all blocks; take a larger one"
        )
    masks = (ranks >= skipped).view_as(drawn).transpose(0, 1).contiguous()
    if sublayers != "both":
        masks[:, 2 - SKIPPING.index(sublayers)] = True
    return masks


def _routers(model: Any, hidden: int) -> list[Any]:
    """A two-layer router with an output for each sublayer, for each block."""
    from torch import nn

    from dyndepth.models.blocks import blocks

    size = model.config.hidden_size
    made = [
        nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, 2))
        for _ in blocks(model)
    ]
    return [each.to(model.device, model.dtype).requires_grad_(False) for each in made]
