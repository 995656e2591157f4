"""What a task cost, summed from traces, and the rows of the compute and routing tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyndepth.method import SUBLAYERS
from dyndepth.runtime.flops import CAUSES
from dyndepth.runtime.trace import Trace

Row = dict[str, Any]

PHASES = ("all", "prompt", "generation")

NOTHING: dict[str, float] = {
    "tokens": 0,
    **dict.fromkeys(("block_flops", "total_flops", "dense_block_flops", "dense_total_flops"), 0.0),
}
"""What a document costs of which no token is read, such as an empty text."""


@dataclass
class Cost:
    """What the requests of one task executed.

    Attributes:
        totals: by phase (``all``, ``prompt``, ``generation``), as ``Trace.totals`` gives them.
        executed: by phase, tokens that each sublayer executed, float64 ``[layers, 2]``.
        documents: by document id ``task/index``, as ``Trace.by_document`` gives them.
    """

    totals: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, trace: Trace) -> None:
        """Add everything that ``trace`` recorded."""
        for phase in PHASES:
            part = None if phase == "all" else phase
            totals = trace.totals(part)
            self.totals[phase] = _added(self.totals.get(phase, {}), totals)
            if totals["tokens"]:
                executed = trace.executed(part).numpy() * totals["tokens"]
                self.executed[phase] = self.executed.get(phase, 0.0) + executed
        for document, totals in trace.by_document().items():
            self.documents[document] = _added(self.documents.get(document, {}), totals)


def compute_rows(task: str, cost: Cost) -> Iterator[Row]:
    """Rows of one task for the table of FLOPs; see ``dyndepth.evaluate.Evaluation``."""
    for phase in PHASES:
        totals = cost.totals[phase]
        tokens = totals["tokens"]
        if not tokens:
            continue
        yield {
            "task": task,
            "phase": phase,
            "tokens": int(tokens),
            "block_flops_per_token": totals["block_flops"] / tokens,
            "total_flops_per_token": totals["total_flops"] / tokens,
            "block_speedup": _ratio(totals["dense_block_flops"], totals["block_flops"]),
            "total_speedup": _ratio(totals["dense_total_flops"], totals["total_flops"]),
            **{cause: totals["by_cause"][cause] / tokens for cause in CAUSES},
            **{
                cause: float(totals["by_cause"][cause]) / tokens if phase == "all" else None
                for cause in ("padding", "reused")
            },
        }


def _ratio(dense: float, executed: float) -> float | None:
    """A speedup; None where nothing at all was executed."""
    return dense / executed if executed else None


def routing_rows(costs: Iterable[Cost]) -> Iterator[Row]:
    """Rows of the routing table, over all tasks; see ``dyndepth.evaluate.Evaluation``."""
    costs = list(costs)
    for phase in PHASES:
        tokens = sum(cost.totals[phase]["tokens"] for cost in costs)
        if not tokens:
            continue
        executed = sum(cost.executed[phase] for cost in costs if phase in cost.executed) / tokens
        for layer, fractions in enumerate(executed.tolist()):
            for sublayer, fraction in zip(SUBLAYERS, fractions, strict=True):
                yield {
                    "task": "all",
                    "phase": phase,
                    "layer": layer,
                    "sublayer": sublayer,
                    "executed": fraction,
                }


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two dictionaries of numbers, one level of nesting allowed, summed by key."""
    return {
        key: _added(one.get(key, {}), value) if isinstance(value, dict) else one.get(key, 0) + value
        for key, value in other.items()
    }
