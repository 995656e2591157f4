"""Scores of a recovery's modules beside the importance of the blocks or sublayers they are in.

A recovery by ``lora(modules=ila)`` ranks changes of linear maps: what is worth training. A
criterion of importance ranks blocks: what the stream can go without.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.results.statistics.ranks import Agreement, agreement_of

if TYPE_CHECKING:
    from dyndepth.fitting.importance import Ranking


def unit_scores(card: Mapping[str, Any], kind: str) -> dict[tuple[int, str], float]:
    """Mean score of the changed maps of each ``block`` or ``sublayer`` by what an adapter's card
    says: ``(layer, sublayer)`` -> score, the sublayer ``block`` for blocks; where nothing was
    changed there is no entry. Raises UserError if the adapter's modules were not ranked."""
    from dyndepth.fitting.recovery.adapters import CARD, SIGNIFICANCE

    if SIGNIFICANCE not in card:
        raise UserError(
            f"the adapter's {CARD} has no scores; recover with modules=ila, as in "
            "'lora(modules=ila, keep=0.3)'"
        )
    found: dict[tuple[int, str], list[float]] = {}
    for row in card[SIGNIFICANCE]["modules"]:
        if row["changed"]:
            unit = (row["layer"], "block" if kind == "block" else row["sublayer"])
            found.setdefault(unit, []).append(row["score"])
    return {unit: fmean(values) for unit, values in found.items()}


def agreement(card: Mapping[str, Any], ranking: Ranking, seed: int = 0) -> Agreement:
    """Spearman's rank correlation between the mean scores of units by an adapter's card and their
    importance in ``ranking``, with a 95% interval: percentiles over resampled units. Positive: what
    is important for the one is for the other. Raises UserError as ``unit_scores`` does."""
    scores = unit_scores(card, ranking.kind)
    both = [
        (scores[unit], row["score"])
        for row in ranking.rows()
        if (unit := (row["layer"], row["sublayer"])) in scores
    ]
    return agreement_of([each for each, _ in both], [each for _, each in both], seed)
