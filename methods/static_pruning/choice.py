"""Which units go, so that the executed share of the block FLOPs comes nearest to what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.fitting.importance import CRITERIA, Settings, calibration_text, rank
from dyndepth.fitting.removal import Unit, plan_without
from dyndepth.fitting.routers import budget_shares
from dyndepth.fitting.unit_scores import streams
from dyndepth.method import SUBLAYERS, Reading
from dyndepth.models.blocks import blocks

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


# A share counts as met if it is missed by less; shares are sums of float32 values.
_CLOSE = 1e-5


def choose(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    executed: float,
    *,
    progress: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plan without the removed units, bool ``[layers, 2]``, and the facts about it.

    Facts: ``criterion``, ``unit``, ``order`` (what was removed, in order: block, counted from 0,
    and ``block`` or the sublayer), ``achieved_speedup``. Raises UserError as ``removed_units``.
    """
    shares = budget_shares(model, settings.text_for(model)[1])
    removed = removed_units(model, corpus, settings, shares, executed, progress=progress)
    plan = plan_without(len(shares), removed)
    blockwise = settings.kind == "block"
    facts = {
        "criterion": settings.criterion,
        "unit": settings.kind,
        "order": [
            [unit[0] // 2, "block" if blockwise else SUBLAYERS[unit[0] % 2]] for unit in removed
        ],
        "achieved_speedup": float(shares.sum() / shares[plan].sum()),
    }
    return {"plan": plan}, facts


def readings(settings: Settings, layers: int, executed: float) -> tuple[Reading, ...]:
    """What ranking reads until a share ``executed`` is left, for an estimate.

    Plans without a unit share the blocks before it, so that each costs half a pass.
    """
    text = CRITERIA[settings.criterion].text
    if executed >= 1.0 or text is None:
        return ()
    windows, length = settings.windows or text[0], settings.length or text[1]
    units = len(settings.candidates(layers))
    forwards, backwards, heads = 1.0, 0.0, 0.0
    if settings.criterion == "taylor":
        backwards, heads = 2.0, 3.0
    elif settings.criterion in ("perplexity", "greedy"):
        heads = float(units)
        if settings.criterion == "greedy":
            gone = units * (1 - executed)
            # Every unit that is left, after each removal; lazily, the first time and some more.
            heads = gone * units - gone**2 / 2 if settings.search == "full" else units + 3 * gone
        forwards = 0.5 * heads
    return (
        Reading(
            windows=windows,
            length=length,
            forwards=forwards,
            backwards=backwards,
            heads=heads,
            kept=True,
        ),
    )


def removed_units(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    shares: Tensor,
    executed: float,
    *,
    progress: bool = True,
) -> list[Unit]:
    """The units to remove so that the share ``executed`` is met as nearly as can be, in order.

    They go as ``rank`` says, as many as come nearest (the fewer, if two counts are equally near);
    ``angular`` takes the run of that many blocks. At least one unit that may go remains, unless
    others like it are protected. ``shares`` ``[layers, 2]`` is each sublayer's part. Raises
    UserError as ``rank`` does, and if ``executed`` can't be reached.
    """
    if executed >= 1.0:
        return []
    layers = len(blocks(model))
    units = settings.candidates(layers)
    prices = {unit: sum(shares.view(-1)[list(unit)].tolist()) for unit in units}
    unprotected = replace(settings, keep_first=0, keep_last=0).candidates(layers)
    most = len(units) - (len(units) == len(unprotected))
    # Said before anything is measured: even if the cheapest were the ones to stay.
    protected = len(units) < len(unprotected)
    _check_reach(1 - sum(sorted(prices.values(), reverse=True)[:most]), executed, protected)
    if settings.criterion == "angular":
        return _run(model, corpus, settings, prices, most, executed, progress)
    # Where that much is left, no removal comes nearer.
    until = executed + min(prices.values()) / 2
    order = rank(model, corpus, settings, until=until, progress=progress).order[:most]
    left = [1 - sum(prices[unit] for unit in order[:count]) for count in range(len(order) + 1)]
    if len(order) == most:
        _check_reach(left[-1], executed, protected)
    return order[: _nearest(left, executed)]


def _check_reach(least: float, executed: float, protected: bool) -> None:
    spare = ", or protect fewer blocks" if protected else ""
    if executed < least - _CLOSE:
        raise UserError(
            f"at most {1 - least:.1%} of the block FLOPs can be removed this way, a speedup of "
            f"{1 / least:.3g}x, not {1 / executed:.3g}x; ask for less{spare}"
        )


def _nearest(left: Sequence[float], executed: float) -> int:
    """By how many units went: which executed share is nearest, the first of equals."""
    return min(range(len(left)), key=lambda count: (round(abs(left[count] - executed), 6), count))


def _run(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    prices: dict[Unit, float],
    most: int,
    executed: float,
    progress: bool,
) -> list[Unit]:
    """The run of blocks, of the right length, with the least angle."""
    units = list(prices)
    text = calibration_text(model, corpus, settings)
    angles = streams(model, text, progress=progress).angles
    runs: list[list[Unit]] = [[]]
    for length in range(1, most + 1):
        starts = range(len(units) - length + 1)
        best = min(starts, key=lambda at: angles[length - 1][units[at][0] // 2])
        runs.append(units[best : best + length])
    left = [1 - sum(prices[unit] for unit in each) for each in runs]
    return runs[_nearest(left, executed)]
