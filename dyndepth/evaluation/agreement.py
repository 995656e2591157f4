"""The gate before a task: a few documents are scored as all will be, and each alone.

Alone is ``scoring.score_alone``: no batch, no cache, nothing shared; a document's longest
continuation is compared. Rounding is tolerated. A
difference beyond it stops the run, except where it can be the flip of a gate that lay at its
threshold: a token method may differ on a document, so that more are looked at, and the run stops if
at least two and more than half of them differ. Static and sequence plans have no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dyndepth.evaluation.scoring import Group, Scored
from dyndepth.method import DynamicDepthMethod

FIRST, MOST = 2, 6
"""Documents that are scored both ways: at first, and where a token method differs on one."""
_TOLERANCE = {"float32": (1e-3, 2e-5)}
_COARSE_TOLERANCE = (0.25, 0.05)
"""How far rounding may move a log-likelihood: in nats, and as a fraction of it."""


@dataclass(frozen=True)
class Gap:
    """How far the log-likelihood of a document's longest continuation differs, in nats."""

    document: str
    nats: float
    tolerated: bool


def agree(
    task: str,
    method: DynamicDepthMethod,
    dtype: str,
    groups: Sequence[Group],
    together: Callable[[list[int]], Sequence[Scored]],
    alone: Callable[[list[Group]], Sequence[Scored]],
) -> None:
    """Compare the two ways on some of ``groups``.

    ``together`` scores groups by their indices, ``alone`` those that it is given. ``dtype`` is the
    weights', as ``float32``. Raises RuntimeError if the two differ by more than the module's rule
    allows.
    """
    chosen = spread(groups)
    first = chosen[:FIRST]
    gaps = _gaps([groups[index] for index in first], together(first), alone, dtype)
    if method.granularity == "token" and not all(gap.tolerated for gap in gaps):
        more = chosen[FIRST:]
        gaps += _gaps([groups[index] for index in more], together(more), alone, dtype)
    apart = [gap for gap in gaps if not gap.tolerated]
    flips = method.granularity == "token" and not 2 <= len(apart) > len(gaps) / 2
    if apart and not flips:
        named = ", ".join(gap.document for gap in apart)
        cause = (
            "a static method has one plan, so it is the model whose results depend on its batch"
            if method.granularity == "static"
            else "a method that pools decisions over a batch declares pooled, one that decides by "
            "document declares by_document"
        )
        raise RuntimeError(
            f"task {task}: {method!r} gives other log-likelihoods to documents in batches than "
            f"alone: {len(apart)} of {len(gaps)} that were compared ({named}) differ, by up to "
            f"{max(gap.nats for gap in apart):.3g} nats; {cause}"
        )


def spread(groups: Sequence[Group]) -> list[int]:
    """Indices of at most ``MOST`` groups, from the shorter half, the median one first."""
    order = sorted(range(len(groups)), key=lambda index: groups[index].size)
    half = order[: (len(order) + 1) // 2]
    if len(half) < FIRST:
        half = order[:FIRST]
    step = max(1, len(half) // MOST)
    return half[::-1][::step][:MOST]


def _gaps(
    groups: list[Group],
    together: Sequence[Scored],
    alone: Callable[[list[Group]], Sequence[Scored]],
    dtype: str,
) -> list[Gap]:
    places = [_longest(group) for group in groups]
    single = [
        replace(group, continuations=[group.continuations[place]])
        for group, place in zip(groups, places, strict=True)
    ]
    nats, fraction = _TOLERANCE.get(dtype, _COARSE_TOLERANCE)
    found = []
    for group, place, ours, theirs in zip(groups, places, together, alone(single), strict=True):
        one, other = ours[place][0], theirs[0][0]
        # Equal infinities differ by nothing. What is not a number is for the scoring to report.
        gap = 0.0 if one == other or math.isnan(one + other) else abs(one - other)
        bound = nats + fraction * abs(other) if math.isfinite(other) else nats
        found.append(Gap(group.document, gap, gap <= bound))
    return found


def _longest(group: Group) -> int:
    lengths = [len(tokens) for tokens in group.continuations]
    return lengths.index(max(lengths))
