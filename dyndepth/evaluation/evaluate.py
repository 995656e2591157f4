"""Evaluates a method on lm-eval tasks: accuracy, what it cost, where it skipped, and each document.

``evaluate`` is the whole interface. Nothing here is written to disk; everything returned is plain
data. The model class is in dyndepth.evaluation.language_model, the batches in
dyndepth.evaluation.scoring.
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

from dyndepth.common.errors import UserError
from dyndepth.evaluation.chat import Chat
from dyndepth.evaluation.language_model import ROWS, DyndepthLM
from dyndepth.evaluation.outcomes import outcomes_of
from dyndepth.evaluation.rows import (
    Row,
    accuracy_rows,
    compute_rows,
    joined_routing,
    routing_rows,
    sample_rows,
)
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.seeding import seeded
from dyndepth.runtime.trace import Backend
from dyndepth.tasks import resolve, task_manager

FEWSHOT_SEED = 1234
"""lm-eval's own default, for tasks that draw their examples at random."""


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
            phases only. A phase without tokens has no row. Where drafts were verified, the row of
            the generation has ``drafted``, ``accepted``, ``verifications`` and ``written``.
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

    @classmethod
    def joined(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Evaluations of different tasks as one; routing is averaged by tokens."""
        each = list(parts)
        return cls(
            accuracy=[row for one in each for row in one.accuracy],
            compute=[row for one in each for row in one.compute],
            routing=joined_routing((one.routing, one.compute) for one in each),
            samples=[row for one in each for row in one.samples],
        )


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
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
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
        apply_chat_template: put prompts in the tokenizer's chat template (True), or in that of
            its templates which is named.
        fewshot_as_multiturn: few-shot examples are turns of the conversation, not one text; None:
            wherever a template is applied.
        system_instruction: put before each task's own description.

    Raises:
        UserError: an unknown task, a limit below 1, more examples than a task holds, a bound on
            a task whose metric has no value on single documents, or a chat template that the
            tokenizer lacks or that can't write what is asked of it.
        FloatingPointError: a log-likelihood that is not a number.
        RuntimeError: batches give other log-likelihoods than documents alone; see
            ``dyndepth.evaluation.agreement``.
    """
    chat = Chat(apply_chat_template, fewshot_as_multiturn, system_instruction)
    # Whatever ran before: a rule that draws begins where it always does.
    with quiet_lm_eval(), seeded(method.seed, next(model.parameters()).device):
        loaded, drawn = drawn_tasks(tasks, limit, seed, num_fewshot, include_path)
        language_model = DyndepthLM(
            model, method, tokenizer, batch_size, backend=backend, progress=progress
        )
        language_model.document_index = drawn
        language_model.converse(chat)
        _let_choose(language_model, loaded)
        # Not simple_evaluate: it seeds the process's generators and runs several subprocesses to
        # describe the machine, for every cell anew.
        results = run_lm_eval(
            language_model,
            {"tasks": loaded},
            samples=drawn or None,
            bootstrap_iters=0,
            log_samples=True,
            **chat.settings(),
        )
    missing = [name for name in loaded if name not in language_model.costs]
    if results is None or missing:
        raise RuntimeError(f"lm-eval sent no request of {', '.join(missing)} to the model")
    costs = language_model.costs
    return Evaluation(
        accuracy=list(accuracy_rows(results, loaded)),
        compute=[row for name in loaded for row in compute_rows(name, costs[name])],
        routing=list(routing_rows(costs.values())),
        samples=[
            row
            for name, task in loaded.items()
            for row in sample_rows(name, task, results["samples"][name], costs[name])
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
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
) -> None:
    """Have a method with ``candidates`` choose as ``evaluate`` does, without scoring it; others are
    left alone. Arguments and errors are those of ``evaluate``."""
    if method.candidates() is None:
        return
    chat = Chat(apply_chat_template, fewshot_as_multiturn, system_instruction)
    with quiet_lm_eval():
        loaded, drawn = drawn_tasks(tasks, limit, seed, num_fewshot, include_path)
        reader = DyndepthLM(model, method, tokenizer, batch_size, progress=progress)
        reader.document_index = drawn
        reader.converse(chat)
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
    if reader.method.substitutes or reader.method.weighs:
        raise TypeError(
            f"{reader.method.name} has candidates, which are tried as plans alone, beside "
            "`instead` or `weights`, which would be missing there"
        )
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


PER_TASK = 1
"""Documents of each task that are scored again."""
LIKELIHOOD = ("multiple_choice", "loglikelihood")
"""lm-eval's output types whose requests are one context and one continuation."""

Document = tuple[list[int], list[int], float, str]
"""Context ids, continuation ids, scored log-likelihood, document id ``task/index``."""


def scored_documents(
    samples: Sequence[Row],
    language_model: Any,
    num_fewshot: int | None,
    include_path: str | None,
) -> list[Document]:
    """The first ``PER_TASK`` documents of each task scored by likelihood, first choice each.

    ``samples`` are rows of samples.parquet, ``language_model`` the ``DyndepthLM`` whose tokens the
    requests become. Documents that do not fit into the model whole are left out.
    """
    found: list[Document] = []
    chosen: dict[str, list[Row]] = {}
    for row in samples:
        if row["loglikelihoods"] is not None:
            chosen.setdefault(row["task"], []).append(row)
    for task, rows in chosen.items():
        found += _of_task(task, rows[:PER_TASK], language_model, num_fewshot, include_path)
    return found


def _of_task(
    name: str, rows: list[Row], language_model: Any, num_fewshot: int | None, folder: str | None
) -> list[Document]:
    from dyndepth.tasks import task_manager

    with quiet_lm_eval():
        task = task_manager([name], folder).load([name])["tasks"][name]
        if task.OUTPUT_TYPE not in LIKELIHOOD:
            return []
        set_shots(task, num_fewshot)
        # One at a time: how lm-eval numbers the requests of a sample is its own affair.
        requests = []
        for row in rows:
            task.build_all_requests(
                samples=[row["doc_id"]], **language_model.chat.building(language_model)
            )
            requests.append(task.instances[0])
    found = []
    for row, request in zip(rows, requests, strict=True):
        context, continuation = language_model.pair(request)
        if len(context) + len(continuation) <= language_model.max_length:
            log = float(json.loads(row["loglikelihoods"])[0])
            found.append((context, continuation, log, f"{name}/{row['doc_id']}"))
    return found
