"""What each plan of a set does on each document of a task: what bounds choose by.

Requests, tokens, answers and metrics are those of a scored cell: the task makes the requests, the
model class reads them, the plans are scored side by side (dyndepth.trie) or, where text is written,
as rows of a batch, and the task judges each document's answers. The FLOPs are the ledger's, in
closed form. Outcomes do not depend on a budget, so they are kept: one set answers all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from lm_eval.api import metrics as lm_eval_metrics
from torch import Tensor

from dyndepth import scoring
from dyndepth.assets import build_once, cache_root, writing_to
from dyndepth.errors import UserError
from dyndepth.flops import BlockCosts
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity, Outcomes
from dyndepth.metrics import outcome
from dyndepth.runtime import Trace, attach

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from dyndepth.language_model import DyndepthLM

_LAYOUT = 1
_TENSORS, _FACTS = "outcomes.safetensors", "outcomes.json"
_PARTS = ("quality", "weights", "flops", "dense_flops")

_MEAN, _BITS = lm_eval_metrics.mean, lm_eval_metrics.bits_per_byte
_PERPLEXITY, _WEIGHTED = lm_eval_metrics.perplexity, lm_eval_metrics.weighted_perplexity

Phases = Literal["generation", "both"]


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
    task.build_all_requests(samples=None if drawn is None else list(drawn))
    asked = _Asked.of(reader, task)
    folder = cache_root() / "outcomes" / _key(reader, task, plans, asked)

    def build(work: Path) -> None:
        _write(work, _computed(reader, task, plans, asked))

    build_once(folder, build, lambda: _read(folder) is not None)
    found = _read(folder)
    if found is None:
        raise UserError(f"the outcomes in {folder} were garbled as they were written; run it again")
    return found


def in_order(task: Task, metrics: Iterable[str]) -> list[str]:
    """Metrics of a document in the order of the task's file, which names the main one first."""
    metrics = list(metrics)
    listed = [metric for metric in task.aggregation() if metric in metrics]
    return list(dict.fromkeys([*listed, *metrics]))


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The requests of a task as token ids.

    ``groups`` or ``prompts`` hold what the model is given, the other is empty; ``owners[g][c]`` is
    the request that continuation c of group g belongs to; ``stops`` are each prompt's.
    """

    requests: list[Instance]
    groups: list[scoring.Group]
    owners: list[list[int]]
    prompts: list[scoring.Prompt]
    stops: list[list[str]]

    @classmethod
    def of(cls, reader: DyndepthLM, task: Task) -> _Asked:
        """Reads the requests that ``task`` has built."""
        requests = task.instances
        if task.OUTPUT_TYPE == "generate_until":
            return cls(requests, [], [], *reader.prompts(requests))
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            owners, pairs = reader.windows(requests)
        else:
            owners = list(range(len(requests)))
            pairs = [reader.pair(*request.args) for request in requests]
        documents = [reader.document(requests[owner]) for owner in owners]
        groups, members = reader.groups(documents, pairs)
        return cls(requests, groups, [[owners[m] for m in part] for part in members], [], [])

    def tokens(self) -> Iterator[Any]:
        """Everything that is given to the model, in order."""
        for group in self.groups:
            yield group.document, list(group.context), [list(one) for one in group.continuations]
        for prompt, stop in zip(self.prompts, self.stops, strict=True):
            yield prompt.document, list(prompt.tokens), prompt.limit, stop


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


def _computed(reader: DyndepthLM, task: Task, plans: Tensor, asked: _Asked) -> Outcomes:
    """Runs the model."""
    places: dict[int, list[int]] = {}
    for place, request in enumerate(asked.requests):
        places.setdefault(request.doc_id or 0, []).append(place)
    documents = {
        reader.document(asked.requests[members[0]]): members for members in places.values()
    }
    if asked.prompts:
        responses, work = _written(reader, plans, asked)
    else:
        responses, work = _scored(reader, task, plans, asked)
    flops = np.stack([work[document] for document in documents])
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


def _scored(
    reader: DyndepthLM, task: Task, plans: Tensor, asked: _Asked
) -> tuple[list[list[Any]], dict[str, np.ndarray]]:
    """Log-likelihoods: each request's response under each plan, each document's FLOPs ``[plans]``.

    A response is (log-likelihood, whether greedy), or the former alone for whole texts.
    """
    from dyndepth import trie

    phases = reader.method.phases
    logs = np.zeros((len(asked.requests), len(plans)))
    greedy = np.ones(logs.shape, dtype=bool)
    with reader.progress_bar(len(asked.groups), f"outcomes of {task.task_name}") as bar:
        for index, results in trie.score(reader.model, plans, asked.groups, phases=phases):
            for owner, (log, likeliest) in zip(asked.owners[index], results, strict=True):
                logs[owner] += log.sum(1).cpu().numpy()
                greedy[owner] &= likeliest.all(1).cpu().numpy()
            bar.update()
    for request, row in zip(asked.requests, logs, strict=True):
        if np.isnan(row).any():
            raise FloatingPointError(
                f"plan {int(np.isnan(row).argmax())} of {reader.method!r}: the log-likelihood of "
                f"document {reader.document(request)} is not a number"
            )
    work: dict[str, np.ndarray] = {}
    costs = BlockCosts.of(reader.model)
    for group in asked.groups:
        tokens, keys = _passes(group, phases)
        work[group.document] = work.get(group.document, 0.0) + _flops(costs, plans, tokens, keys)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [row.tolist() for row in logs], work
    pairs = (zip(*rows, strict=True) for rows in zip(logs.tolist(), greedy.tolist(), strict=True))
    return [list(row) for row in pairs], work


def _written(
    reader: DyndepthLM, plans: Tensor, asked: _Asked
) -> tuple[list[list[str]], dict[str, np.ndarray]]:
    """Greedy completions: as ``_scored``, with a response that is a text."""
    count, phases = len(plans), reader.method.phases
    write = _branches if phases == "generation" else _rows
    texts = [[""] * count for _ in asked.prompts]
    lengths = np.zeros((len(asked.prompts), count), dtype=np.int64)
    with (
        reader.progress_bar(lengths.size, f"outcomes of {asked.requests[0].task_name}") as bar,
        attach(reader.model, _Numbered(plans, phases)) as trace,
    ):
        for place, plan, tokens in write(reader, trace, asked.prompts, count):
            texts[place][plan] = reader.completion(tokens, asked.stops[place])
            lengths[place, plan] = len(tokens)
            bar.update()
    work: dict[str, np.ndarray] = {}
    costs = BlockCosts.of(reader.model)
    for prompt, generated in zip(asked.prompts, lengths, strict=True):
        read = len(prompt.tokens) if phases == "both" else 0
        # The last token is never read again; the n-th is read over the prompt and n tokens.
        later = generated - 1
        keys = read * len(prompt.tokens) + later * len(prompt.tokens) + later * (later + 1) // 2
        executed = _flops(costs, plans, read + later, keys)
        dense = _flops(costs, torch.ones_like(plans), read + later, keys)
        share = np.divide(executed, dense, out=np.zeros_like(dense), where=dense > 0)
        work[prompt.document] = work.get(prompt.document, 0.0) + share * dense[0]
    return texts, work


Completion = tuple[int, int, list[int]]
"""Places of the prompt and of the plan, and the tokens generated."""


def _rows(
    reader: DyndepthLM, trace: Trace, prompts: list[scoring.Prompt], count: int
) -> Iterator[Completion]:
    """Each prompt completed under each of ``count`` plans, a row of a batch each."""
    rows = [
        replace(prompt, document=f"{prompt.document} {plan}")
        for prompt in prompts
        for plan in range(count)
    ]
    for index, tokens in scoring.generate(reader.model, trace, rows, reader.batch_size):
        yield *divmod(index, count), tokens


@torch.no_grad()
def _branches(
    reader: DyndepthLM, trace: Trace, prompts: list[scoring.Prompt], count: int
) -> Iterator[Completion]:
    """As ``_rows`` where prompts run at full depth: each is read once for all plans."""
    model = reader.model
    device = next(model.parameters()).device
    for place, prompt in enumerate(prompts):
        inputs, mask = scoring._padded([prompt.tokens], "left", device)
        trace.documents = [f"{prompt.document} 0"]
        hidden, cache = scoring._forward(model, inputs, mask)
        row = torch.zeros(1, dtype=torch.long, device=device)
        first = trace.readout(hidden[:, -1], row).argmax(-1)
        start = first.tolist()
        ended = prompt.limit == 1 or prompt.stop(start)
        for plans in torch.arange(count).split(reader.batch_size):
            done = {plan: list(start) for plan in plans.tolist()}
            if not ended:
                past = scoring._rows_of(cache, row.expand(len(plans)))
                _go_on(model, trace, prompt, first, mask, past, done)
            yield from ((place, plan, tokens) for plan, tokens in done.items())


def _go_on(
    model: Any,
    trace: Trace,
    prompt: scoring.Prompt,
    first: Tensor,
    mask: Tensor,
    cache: Any,
    done: dict[int, list[int]],
) -> None:
    """Extends the completions in ``done``, by plan, from their common first token to their ends.

    ``mask`` is the prompt's, ``[1, tokens]``; ``cache`` holds the prompt in a row a plan.
    """
    alive = list(done)
    inputs, mask = first.expand(len(alive))[:, None], mask.expand(len(alive), -1)
    while alive:
        mask = torch.cat((mask, mask.new_ones(len(alive), 1)), 1)
        trace.documents = [f"{prompt.document} {plan}" for plan in alive]
        hidden, cache = scoring._forward(model, inputs, mask, cache)
        logits = trace.readout(hidden[:, -1], torch.arange(len(alive), device=mask.device))
        best = logits.argmax(-1)
        going = []
        for row, (plan, token) in enumerate(zip(alive, best.tolist(), strict=True)):
            done[plan].append(token)
            if len(done[plan]) < prompt.limit and not prompt.stop(done[plan]):
                going.append(row)
        keep = torch.tensor(going, dtype=torch.long, device=mask.device)
        if going and len(going) < len(alive):
            cache = scoring._rows_of(cache, keep)
        alive = [alive[row] for row in going]
        inputs, mask = best[keep, None], mask[keep]


class _Numbered(DynamicDepthMethod):
    """Each sequence follows the plan whose number stands behind its document's id."""

    name: ClassVar[str] = "numbered"
    granularity: ClassVar[Granularity] = "sequence"
    paper: ClassVar[str] = "internal"

    def __init__(self, plans: Tensor, phases: Phases) -> None:
        super().__init__()
        self.plans = plans
        self._phases = phases

    @property
    def phases(self) -> Phases:
        return self._phases

    def start(self, context: ForwardContext) -> Tensor:
        documents = context.documents or []
        return self.plans[[int(document.rpartition(" ")[2]) for document in documents]]


def _passes(group: scoring.Group, phases: Phases) -> tuple[int, int]:
    """Tokens that the passes of a group read, and the keys of all of them together.

    See dyndepth.scoring: the context pass reads the context, the continuation pass each
    continuation but for its last token; a token's keys are all of its sequence so far, those
    behind it in the same pass included.
    """
    context = len(group.context)
    read = [len(continuation) - 1 for continuation in group.continuations]
    tokens, keys = sum(read), sum(count * (context + count) for count in read)
    if phases == "both":
        tokens, keys = tokens + context, keys + context * context
    return tokens, keys


def _flops(costs: BlockCosts, plans: Tensor, tokens: Any, keys: Any) -> np.ndarray:
    """Block FLOPs of tokens with that many keys under each plan: float64 ``[plans]``, whole."""
    attention, mlp = plans.numpy().astype(np.int64).transpose(2, 0, 1)
    each = attention @ costs.projections + mlp @ costs.mlp
    return (tokens * each + keys * (attention @ costs.score)).astype(np.float64)


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


def _key(reader: DyndepthLM, task: Task, plans: Tensor, asked: _Asked) -> str:
    """24 hex digits over everything that decides outcomes."""
    from dyndepth.models import fingerprint
    from dyndepth.provenance import harness_code, versions

    parameter = next(reader.model.parameters())
    facts = {
        "layout": _LAYOUT,
        "code": harness_code(),
        "versions": versions(),
        "model": fingerprint(reader.model),
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
