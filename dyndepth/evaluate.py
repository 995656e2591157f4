"""Evaluates a method on lm-eval tasks: accuracy, what it cost, where it skipped, and each document.

``evaluate`` is the whole interface. Nothing here is written to disk; everything returned is plain
data. The model class is in dyndepth.language_model, the batches in dyndepth.scoring; importing this
module makes lm-eval know the name ``dyndepth``.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api import task as lm_eval_task
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as run_lm_eval

from dyndepth import lm_eval_plugin
from dyndepth.common.errors import UserError
from dyndepth.costs import NOTHING, Cost, Row, compute_rows, routing_rows
from dyndepth.language_model import ROWS, DyndepthLM
from dyndepth.method import DynamicDepthMethod
from dyndepth.metrics import outcome, standard_error
from dyndepth.outcomes import in_order, outcomes_of
from dyndepth.runtime.trace import Backend
from dyndepth.tasks import resolve, task_manager

FEWSHOT_SEED = 1234
"""lm-eval's own default, for tasks that draw their examples at random."""

lm_eval_plugin.register()


@dataclass(frozen=True)
class Evaluation:
    """The rows of four tables, without the cell's identity; plain JSON values throughout.

    Attributes:
        accuracy: one row a task and metric: ``task``, ``metric``, ``filter``, ``value``,
            ``stderr`` (None where none is known), ``n`` documents, ``higher_is_better``,
            ``task_version``.
        compute: one row a task and phase (``all``, ``prompt``, ``generation``): ``tokens``,
            ``block_flops_per_token``, ``total_flops_per_token``, the achieved ``block_speedup``
            and ``total_speedup``, and the FLOPs a token by cause. ``padding`` (computed for nobody)
            and ``reused`` (billed to several documents, computed once: negative) are known over all
            phases only. A phase without tokens has no row.
        routing: one row a phase, layer and sublayer over all tasks: ``task`` (``all``), ``phase``,
            ``layer`` (from 0), ``sublayer``, ``executed`` (fraction of tokens).
        samples: one row a task and document: ``task``, ``doc_id`` (index in the task's file),
            ``doc_hash``, the task's first ``metric`` (as ``name,filter``) and its ``outcome`` on
            this document alone, ``outcomes`` (JSON, all metrics), ``loglikelihoods`` (JSON, one a
            choice; None for generation), ``response`` (generation only), ``target`` (None where it
            is the whole text), ``weight`` (bytes or words if the metric weights documents, else 1),
            ``tokens``, ``block_flops``, ``total_flops``, ``dense_block_flops``,
            ``dense_total_flops``.
    """

    accuracy: list[Row]
    compute: list[Row]
    routing: list[Row]
    samples: list[Row]


def evaluate(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    tasks: str | Iterable[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    num_fewshot: int | None = None,
    batch_size: int = ROWS,
    backend: Backend = "sparse",
    progress: bool = True,
    include_path: str | Path | None = None,
) -> Evaluation:
    """Score a fitted method on tasks.

    A method with ``candidates`` first chooses by their outcomes, task by task.

    Args:
        model, tokenizer: as ``dyndepth.models.loading`` loads them.
        method: fitted, or one that needs no fit.
        tasks: lm-eval tasks, groups, tags and suites, as ``dyndepth.tasks.resolve`` takes them.
            Groups and tags are scored task by task.
        limit: documents a task, a random sample that depends on ``seed`` and the task alone: every
            method is scored on the same ones. None: all.
        seed: of that sample.
        num_fewshot: examples before each question; None: what each task's file says. Tasks that
            fix it at 0 keep 0.
        batch_size: most contexts in a forward; fewer where they are long.
        backend: ``sparse`` or ``masked``.
        progress: show progress bars.
        include_path: a folder with further task files.

    Raises:
        UserError: an unknown task, a limit below 1, more examples than a task holds, or a bound on
            a task whose metric has no value on single documents.
        FloatingPointError: a log-likelihood that is not a number.
        RuntimeError: batches give other log-likelihoods than documents alone; see
            ``dyndepth.agreement``.
    """
    with quiet_lm_eval():
        loaded, drawn = drawn_tasks(tasks, limit, seed, num_fewshot, include_path)
        language_model = DyndepthLM(
            model, method, tokenizer, batch_size, backend=backend, progress=progress
        )
        language_model.document_index = drawn
        _let_choose(language_model, loaded)
        # Not simple_evaluate: it seeds the process's generators and runs several subprocesses to
        # describe the machine, for every cell anew.
        results = run_lm_eval(
            language_model,
            {"tasks": loaded},
            samples=drawn or None,
            bootstrap_iters=0,
            log_samples=True,
        )
    missing = [name for name in loaded if name not in language_model.costs]
    if results is None or missing:
        raise RuntimeError(f"lm-eval sent no request of {', '.join(missing)} to the model")
    costs = language_model.costs
    return Evaluation(
        accuracy=list(_accuracy(results, loaded)),
        compute=[row for name in loaded for row in compute_rows(name, costs[name])],
        routing=list(routing_rows(costs.values())),
        samples=[
            row
            for name, task in loaded.items()
            for row in _samples(name, task, results["samples"][name], costs[name])
        ],
    )


def let_choose(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    tasks: str | Iterable[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    num_fewshot: int | None = None,
    batch_size: int = ROWS,
    progress: bool = True,
    include_path: str | Path | None = None,
) -> None:
    """Have a method with ``candidates`` choose as ``evaluate`` does, without scoring it; others are
    left alone. Arguments and errors are those of ``evaluate``."""
    if method.candidates() is None:
        return
    with quiet_lm_eval():
        loaded, drawn = drawn_tasks(tasks, limit, seed, num_fewshot, include_path)
        reader = DyndepthLM(model, method, tokenizer, batch_size, progress=progress)
        reader.document_index = drawn
        _let_choose(reader, loaded)


def drawn_tasks(
    tasks: str | Iterable[str],
    limit: int | None,
    seed: int,
    num_fewshot: int | None,
    include_path: str | Path | None,
) -> tuple[dict[str, Task], dict[str, list[int]]]:
    """Tasks by name, and the documents drawn of each that is not scored whole: lm-eval looks
    indices up one by one."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 document a task, not {limit}")
    names = resolve(tasks, include_path)
    loaded = task_manager(names, include_path).load(names)["tasks"]
    for task in loaded.values():
        set_shots(task, num_fewshot)
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    return loaded, {
        name: sample(name, size, limit, seed)
        for name, size in sizes.items()
        if limit is not None and limit < size
    }


def _let_choose(reader: DyndepthLM, tasks: dict[str, Task]) -> None:
    plans = reader.method.candidates()
    if plans is None:
        return
    if not reader.method.uses_labels:
        raise TypeError(f"{reader.method.name} has candidates but does not say that it uses labels")
    for task in tasks.values():
        reader.method.choose(outcomes_of(reader, task, plans))
        # Examples drawn at random must be drawn again as they were: the same prompts are scored.
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def sample(task: str, documents: int, limit: int, seed: int) -> list[int]:
    """Sorted indices of ``limit`` documents of a task's ``documents``, drawn at random.

    The draw depends on the arguments alone, and a larger limit keeps the documents of a smaller
    one.
    """
    order = list(range(documents))
    random.Random(f"{seed}/{task}").shuffle(order)
    return sorted(order[:limit])


def set_shots(task: Task, num_fewshot: int | None) -> None:
    """The number of examples of a task, by the rules of ``lm_eval --num_fewshot``."""
    own = task.get_config("num_fewshot")
    shots = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
    pool = len(task.sampler.df) if shots else 0
    if shots > pool:
        raise UserError(f"task {task.task_name} holds {pool} few-shot examples, not {shots}")
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Without lm-eval's advice on settings that are deliberate here, and its bar for prompts."""
    log = logging.getLogger("lm_eval")
    level, bar = log.level, lm_eval_task.tqdm
    log.setLevel(logging.ERROR)
    lm_eval_task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        log.setLevel(level)
        lm_eval_task.tqdm = bar


def _accuracy(results: Any, tasks: dict[str, Task]) -> Iterator[Row]:
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


def _samples(name: str, task: Task, logged: Sequence[Row], cost: Cost) -> Iterator[Row]:
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
