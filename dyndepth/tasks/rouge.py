"""ROUGE-L of a generated title."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def rouge_l(reference: str, candidate: str) -> float:
    """F-measure of the longest common subsequence of words, Porter-stemmed, between 0 and 1.

    Lin 2004 (https://aclanthology.org/W04-1013), as the package rouge-score computes it.
    """
    return float(_scorer().score(reference, candidate)["rougeL"].fmeasure)


def title_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Metrics of one document of the task ``title_generation``, for lm-eval."""
    return {"rougeL": rouge_l(doc["title"], results[0])}


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
