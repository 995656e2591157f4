"""What a task cost, summed from traces, and rows: accuracy, compute, routing, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.task import Task

from dyndepth.method import SUBLAYERS
from dyndepth.runtime.acceptance import Speculation
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
        drafts: what ``drafts_of`` gives, if there were drafts.
    """

    totals: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, dict[str, float]] = field(default_factory=dict)
    drafts: dict[str, int] = field(default_factory=dict)

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
        if trace.speculation.rounds:
            self.drafts = _added(self.drafts, drafts_of(trace.speculation))


def drafts_of(speculation: Speculation) -> dict[str, int]:
    """Of all rounds: tokens that were ``drafted``, those of them that were ``accepted``,
    ``verifications``, and tokens that these have ``written``."""
    return {
        "drafted": speculation.drafted,
        "accepted": speculation.accepted,
        "verifications": len(speculation.rounds),
        "written": sum(len(each.tokens) for each in speculation.rounds),
    }


def compute_rows(task: str, cost: Cost) -> Iterator[Row]:
    """Rows of one task for the table of FLOPs; see ``dyndepth.evaluation.evaluate.Evaluation``."""
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
            **(cost.drafts if phase == "generation" else {}),
        }


def _ratio(dense: float, executed: float) -> float | None:
    """A speedup; None where nothing at all was executed."""
    return dense / executed if executed else None


def routing_rows(costs: Iterable[Cost]) -> Iterator[Row]:
    """Rows of the routing table, over all tasks; see
    ``dyndepth.evaluation.evaluate.Evaluation``."""
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


def joined_routing(parts: Iterable[tuple[Sequence[Row], Sequence[Row]]]) -> list[Row]:
    """Routing rows of several evaluations as one, averaged by the tokens that the compute rows
    beside each tell of its phase."""
    executed: dict[tuple[Any, ...], list[float]] = {}
    for routing, compute in parts:
        tokens: dict[str, float] = {}
        for row in compute:
            tokens[row["phase"]] = tokens.get(row["phase"], 0.0) + row["tokens"]
        for row in routing:
            place = (row["task"], row["phase"], row["layer"], row["sublayer"])
            sums = executed.setdefault(place, [0.0, 0.0])
            sums[0] += row["executed"] * tokens[row["phase"]]
            sums[1] += tokens[row["phase"]]
    keys = ("task", "phase", "layer", "sublayer")
    return [
        dict(zip(keys, place, strict=True)) | {"executed": part / whole}
        for place, (part, whole) in executed.items()
    ]


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two dictionaries of numbers, one level of nesting allowed, summed by key."""
    return {
        key: _added(one.get(key, {}), value) if isinstance(value, dict) else one.get(key, 0) + value
        for key, value in other.items()
    }


def accuracy_rows(results: Any, tasks: dict[str, Task]) -> Iterator[Row]:
    for name, task in tasks.items():
        scores = results["results"][name]
        samples = results["samples"][name]
        for key, value in scores.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            items = [s[metric] for s in samples if s["filter"] == filter_name and metric in s]
            higher = results["higher_is_better"][name].get(metric)
            yield {
                "task": name,
                "metric": metric,
                "filter": filter_name,
                "value": float(value),
                "stderr": standard_error(task.aggregation().get(metric), items),
                "n": len(items),
                "higher_is_better": None if higher is None else bool(higher),
                "task_version": str(results["versions"][name]),
            }


def sample_rows(name: str, task: Task, logged: Sequence[Row], cost: Cost) -> Iterator[Row]:
    documents: dict[int, list[Row]] = {}
    for record in logged:
        documents.setdefault(record["doc_id"], []).append(record)
    for index in sorted(documents):
        first = documents[index][0]
        outcomes, weights = {}, {}
        for record in documents[index]:
            # lm-eval logs metrics in an order of its own.
            for metric in in_order(task, record["metrics"]):
                key = f"{metric},{record['filter']}"
                aggregation = task.aggregation().get(metric)
                outcomes[key], weights[key] = outcome(aggregation, record[metric])
        main = next(iter(outcomes))
        responses = [response for request in first["resps"] for response in request]
        generated = isinstance(responses[0], str)
        whole_text = isinstance(responses[0], float)
        yield {
            "task": name,
            "doc_id": int(index),
            "doc_hash": first["doc_hash"],
            "metric": main,
            "outcome": outcomes[main],
            "outcomes": json.dumps(outcomes),
            "loglikelihoods": None if generated else json.dumps([_log(r) for r in responses]),
            "response": responses[0] if generated else None,
            "target": None if whole_text else str(first["target"]),
            "weight": weights[main],
            **cost.documents.get(f"{name}/{index}", NOTHING),
        }


def _log(response: Any) -> float:
    """The log-likelihood in a response: a number, or a pair with whether it is greedy."""
    return float(response if isinstance(response, float) else response[0])


def in_order(task: Task, metrics: Iterable[str]) -> list[str]:
    """Metrics of a document in the order of the task's file, which names the main one first."""
    metrics = list(metrics)
    listed = [metric for metric in task.aggregation() if metric in metrics]
    return list(dict.fromkeys([*listed, *metrics]))


_MEAN, _PERPLEXITY = lm_eval_metrics.mean, lm_eval_metrics.perplexity
_WEIGHTED, _BITS = lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte


def outcome(aggregation: Callable[..., Any] | None, item: Any) -> tuple[float | None, float]:
    """A metric's value on one document alone, and the document's weight in the mean.

    ``item`` is what lm-eval logged. The value is None where a metric has no meaning on a single
    document (F1 over all documents, BLEU) or its number is too large.
    """
    if aggregation is not None and aggregation in (_WEIGHTED, _BITS, _PERPLEXITY):
        weight = 1.0 if aggregation is _PERPLEXITY else float(item[1])
        try:
            return float(aggregation([item])), weight
        except (OverflowError, ZeroDivisionError):  # beyond 1e308; of a text without a byte
            return None, weight
    number = isinstance(item, bool | int | float | np.number)
    return (float(item) if number else None), 1.0


def standard_error(aggregation: Callable[..., Any] | None, items: Sequence[Any]) -> float | None:
    """Standard error of an aggregated metric over documents; None where no formula is known.

    A mean: sample standard deviation over the root of n. A perplexity, exp(-mean): the error of
    the mean times the perplexity (delta method). Weighted by bytes or words: the linearised error
    of a ratio of sums (Cochran 1977, eq. 6.4), then the delta method again.
    """
    if len(items) < 2:
        return None
    if aggregation in (_WEIGHTED, _BITS):
        logs, sizes = np.array(items, dtype=np.float64).T
        ratio = logs.sum() / sizes.sum()
        residuals = logs - ratio * sizes
        error = float(residuals.std(ddof=1) * math.sqrt(len(items)) / sizes.sum())
        return error / math.log(2) if aggregation is _BITS else error * math.exp(-ratio)
    if aggregation not in (_MEAN, _PERPLEXITY):
        return None
    values = np.array(items, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return error * math.exp(-values.mean()) if aggregation is _PERPLEXITY else error
