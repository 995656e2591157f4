"""Scored documents as token ids, so that a timed run can show that it scores them alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dyndepth.costs import Row

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
    from dyndepth.evaluate import quiet_lm_eval, set_shots
    from dyndepth.tasks import task_manager

    with quiet_lm_eval():
        task = task_manager([name], folder).load([name])["tasks"][name]
        if task.OUTPUT_TYPE not in LIKELIHOOD:
            return []
        set_shots(task, num_fewshot)
        # One at a time: how lm-eval numbers the requests of a sample is its own affair.
        requests = []
        for row in rows:
            task.build_all_requests(samples=[row["doc_id"]])
            requests.append(task.instances[0])
    found = []
    for row, request in zip(rows, requests, strict=True):
        context, continuation = language_model.pair(request)
        if len(context) + len(continuation) <= language_model.max_length:
            log = float(json.loads(row["loglikelihoods"])[0])
            found.append((context, continuation, log, f"{name}/{row['doc_id']}"))
    return found
