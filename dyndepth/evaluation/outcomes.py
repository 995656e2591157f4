"""What each plan of a set does on each document of a task: what bounds choose by.

Requests, tokens, answers and metrics are those of a scored cell: the task makes the requests, the
model class reads them, each plan responds (dyndepth.evaluation.responses), and the task judges each
document's answers. Outcomes do not depend on a budget, so they are kept: one set answers all of
them.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api import metrics as lm_eval_metrics
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.common.files import build_once, cache_root, writing_to
from dyndepth.evaluation.responses import Asked, responses_of
from dyndepth.evaluation.rows import in_order, outcome
from dyndepth.method import Outcomes

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from dyndepth.evaluation.language_model import DyndepthLM


_LAYOUT = 1
_TENSORS, _FACTS = "outcomes.safetensors", "outcomes.json"
_PARTS = ("quality", "weights", "flops", "dense_flops")

_MEAN, _BITS = lm_eval_metrics.mean, lm_eval_metrics.bits_per_byte
_PERPLEXITY, _WEIGHTED = lm_eval_metrics.perplexity, lm_eval_metrics.weighted_perplexity


def outcomes_of(reader: DyndepthLM, task: Task, plans: Tensor) -> Outcomes:
    """The outcomes of ``plans`` on the documents that ``reader`` is to score of ``task``.

    ``plans`` is bool ``[plans, layers, 2]`` on the CPU, the first one full; they skip in the phases
    of ``reader.method``. Quality is the task's first metric on the document alone. A perplexity
    counts by its logarithm, negated, in nats: the mean of those is what the task's value follows.

    With phases ``generation`` the FLOPs are those of the generation phase. Where text is written,
    plans write texts of unequal length; there a plan's FLOPs are the part that it executed of its
    own text, of the FLOPs of the dense model's text, so that nothing is gained by stopping early.

    Computed once for the same model, plans, documents and code, then read from the cache. Raises
    UserError for a task whose first metric is no mean over documents, or a cache that can't be
    written; FloatingPointError for a log-likelihood that is not a number.
    """
    _check(task)
    name = task.task_name
    drawn = reader.document_index.get(name)
    samples = None if drawn is None else list(drawn)
    task.build_all_requests(samples=samples, **reader.chat.building(reader))
    asked = Asked.of(reader, task)
    folder = cache_root() / "outcomes" / _key(reader, task, plans, asked)

    def build(work: Path) -> None:
        _write(work, _computed(reader, task, plans, asked))

    build_once(folder, build, lambda: _read(folder) is not None)
    found = _read(folder)
    if found is None:
        raise UserError(f"the outcomes in {folder} were garbled as they were written; run it again")
    return found


def _check(task: Task) -> None:
    """Refuse, before anything is computed, a task whose value is no mean over documents."""
    main = next(iter(task.aggregation()), None)
    if task.aggregation().get(main) not in (_MEAN, _BITS, _PERPLEXITY, _WEIGHTED):
        raise _no_outcomes(task, main)


def _no_outcomes(task: Task, metric: str | None) -> UserError:
    return UserError(
        f"a bound was asked for task {task.task_name}, whose first metric ({metric}) has no value "
        "on a single document to choose by; leave the task or the bound out"
    )


# --- what comes of it -----------------------------------------------------------------------------


def _computed(reader: DyndepthLM, task: Task, plans: Tensor, asked: Asked) -> Outcomes:
    """Runs the model."""
    places: dict[int, list[int]] = {}
    for place, request in enumerate(asked.requests):
        places.setdefault(request.doc_id or 0, []).append(place)
    documents = {
        reader.document(asked.requests[members[0]]): members for members in places.values()
    }
    responses, work = responses_of(reader, task, plans, asked)
    none = np.zeros(len(plans))  # of a text without a token
    flops = np.stack([work.get(document, none) for document in documents])
    metric, quality, weights = _judged(task, asked.requests, list(documents.values()), responses)
    return Outcomes(
        task=task.task_name,
        metric=metric,
        documents=tuple(documents),
        quality=torch.from_numpy(quality),
        weights=torch.from_numpy(weights),
        flops=torch.from_numpy(flops),
        dense_flops=torch.from_numpy(flops[:, 0].copy()),
    )


def _judged(
    task: Task, requests: list[Instance], documents: list[list[int]], responses: list[list[Any]]
) -> tuple[str, np.ndarray, np.ndarray]:
    """The main metric, its quality ``[documents, plans]`` and the weights ``[documents]``.

    ``documents`` has the places of each document's requests. As lm-eval does it: filters over the
    whole task, then the task's own judgement of each document.
    """
    count = len(responses[0])
    quality, weights = np.zeros((len(documents), count)), np.ones(len(documents))
    key = ""
    for plan in range(count):
        for request, row in zip(requests, responses, strict=True):
            request.resps = [row[plan]] * (request.repeats or 1)
            request.filtered_resps = {}
        task.apply_filters()
        filter_name = next(iter(requests[0].filtered_resps))
        for index, places in enumerate(documents):
            members = sorted((requests[place] for place in places), key=lambda one: one.idx)
            answers = [one.filtered_resps[filter_name] for one in members]
            items = task.process_results(members[0].doc, answers)
            main = in_order(task, items)[0]
            key = f"{main},{filter_name}"
            quality[index, plan], weights[index] = _quality(task, main, items[main])
    return key, quality, weights


def _quality(task: Task, metric: str, item: Any) -> tuple[float, float]:
    """A document's quality, higher is better, and its weight; ``item`` is what lm-eval logs.

    Raises UserError where the metric has no value on one document.
    """
    aggregation = task.aggregation().get(metric)
    if aggregation is _PERPLEXITY:
        return float(item), 1.0
    if aggregation is _WEIGHTED:
        return float(item[0]) / float(item[1]), float(item[1])
    value, weight = outcome(aggregation, item)
    if value is None or not math.isfinite(value):
        raise _no_outcomes(task, metric)
    return (-value if task.higher_is_better().get(metric) is False else value), weight


# --- what is kept ---------------------------------------------------------------------------------


def _key(reader: DyndepthLM, task: Task, plans: Tensor, asked: Asked) -> str:
    """24 hex digits over everything that decides outcomes."""
    from dyndepth.common.digests import harness_code
    from dyndepth.common.provenance import versions
    from dyndepth.data.tokenizers import tokenizer_fingerprint
    from dyndepth.models.fingerprints import fingerprint

    parameter = next(reader.model.parameters())
    facts = {
        "layout": _LAYOUT,
        "code": harness_code(),
        "versions": versions(),
        "model": fingerprint(reader.model),
        "tokenizer": tokenizer_fingerprint(reader.tokenizer),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "attention": reader.model.config._attn_implementation,
        "plans": [list(plans.shape), hashlib.sha256(plans.numpy().tobytes()).hexdigest()],
        "phases": reader.method.phases,
        "task": [task.task_name, str(task.VERSION), task.dump_config()],
        "requests": [(reader.document(r), r.idx, r.args, r.doc) for r in asked.requests],
        "tokens": list(asked.tokens()),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(folder: Path, outcomes: Outcomes) -> None:
    from safetensors.torch import save

    content = save({name: getattr(outcomes, name).contiguous() for name in _PARTS})
    facts = {
        "layout": _LAYOUT,
        "task": outcomes.task,
        "metric": outcomes.metric,
        "documents": outcomes.documents,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with writing_to(folder):
        (folder / _TENSORS).write_bytes(content)
        (folder / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> Outcomes | None:
    """What is kept in ``folder``; None if it is not there, or not as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        content = (folder / _TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return None
        return Outcomes(
            task=facts["task"],
            metric=facts["metric"],
            documents=tuple(facts["documents"]),
            **load(content),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
