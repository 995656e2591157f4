"""What each plan of a set answers to the requests of a task, and what it executes for that.

Answers are log-likelihoods, for which plans are scored side by side
(``plan_scoring``), or texts, for which they are rows of a batch (``completions``). The
FLOPs are the ledger's, in closed form.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dyndepth.evaluation import generation
from dyndepth.evaluation.generation import Prompt
from dyndepth.evaluation.scoring import Group
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts
from dyndepth.runtime.trace import Trace

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel

    from dyndepth.evaluation.language_model import DyndepthLM


@dataclass(frozen=True)
class Asked:
    """The requests of a task as token ids.

    ``groups`` or ``prompts`` hold what the model is given, the other is empty; ``owners[g][c]`` is
    the request that continuation c of group g belongs to; ``stops`` are each prompt's.
    """

    requests: list[Instance]
    groups: list[Group]
    owners: list[list[int]]
    prompts: list[Prompt]
    stops: list[list[str]]

    @classmethod
    def of(cls, reader: DyndepthLM, task: Task) -> Asked:
        """Reads the requests that ``task`` has built."""
        requests = task.instances
        if task.OUTPUT_TYPE == "generate_until":
            return cls(requests, [], [], *reader.prompts(requests))
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            owners, pairs = reader.windows(requests)
        else:
            owners = list(range(len(requests)))
            pairs = [reader.pair(request) for request in requests]
        documents = [reader.document(requests[owner]) for owner in owners]
        groups, members = reader.groups(documents, pairs)
        return cls(requests, groups, [[owners[m] for m in part] for part in members], [], [])

    def tokens(self) -> Iterator[Any]:
        """Everything that is given to the model, in order."""
        for group in self.groups:
            yield group.document, list(group.context), [list(one) for one in group.continuations]
        for prompt, stop in zip(self.prompts, self.stops, strict=True):
            yield prompt.document, list(prompt.tokens), prompt.limit, stop


def responses_of(
    reader: DyndepthLM, task: Task, plans: Tensor, asked: Asked
) -> tuple[list[list[Any]], dict[str, np.ndarray]]:
    """Each request's response under each plan, and each document's FLOPs, float64 ``[plans]``.

    A response is what lm-eval takes for one: (log-likelihood, whether greedy), the former alone
    for whole texts, or the text that was written. See ``dyndepth.evaluation.outcomes.outcomes_of``
    for what the FLOPs are. Raises FloatingPointError for a log-likelihood that is not a number.
    """
    return _written(reader, plans, asked) if asked.prompts else _scored(reader, task, plans, asked)


def _scored(
    reader: DyndepthLM, task: Task, plans: Tensor, asked: Asked
) -> tuple[list[list[Any]], dict[str, np.ndarray]]:
    """Log-likelihoods; see ``responses_of``."""
    from dyndepth.evaluation import plan_scoring

    phases = reader.method.phases
    logs = np.zeros((len(asked.requests), len(plans)))
    greedy = np.ones(logs.shape, dtype=bool)
    with reader.progress_bar(len(asked.groups), f"outcomes of {task.task_name}") as bar:
        for index, results in plan_scoring.score(reader.model, plans, asked.groups, phases=phases):
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
    reader: DyndepthLM, plans: Tensor, asked: Asked
) -> tuple[list[list[str]], dict[str, np.ndarray]]:
    """Greedy completions; see ``responses_of``."""
    phases = reader.method.phases
    texts = [[""] * len(plans) for _ in asked.prompts]
    lengths = np.zeros((len(asked.prompts), len(plans)), dtype=np.int64)
    written = completions(
        reader.model, plans, asked.prompts, phases=phases, batch_size=reader.batch_size
    )
    name = asked.requests[0].task_name
    with closing(written), reader.progress_bar(lengths.size, f"outcomes of {name}") as bar:
        for place, plan, tokens in written:
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


def _passes(group: Group, phases: Phases) -> tuple[int, int]:
    """Tokens that the passes of a group read, and the keys of all of them together.

    See dyndepth.evaluation.scoring: the context pass reads the context, the continuation pass each
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


Phases = Literal["generation", "both"]
Completion = tuple[int, int, list[int]]
"""Places of the prompt and of the plan, and the tokens generated."""


def completions(
    model: PreTrainedModel,
    plans: Tensor,
    prompts: Sequence[generation.Prompt],
    *,
    phases: Phases,
    batch_size: int,
) -> Generator[Completion, None, None]:
    """What ``generation.generate`` gives with each plan attached alone, as it is done.

    ``plans`` is bool ``[plans, layers, 2]`` on the CPU; at most ``batch_size`` rows are written at
    a time. The plans stay attached to ``model`` until the last completion is taken or this is
    closed.
    """
    with attach(model, _Numbered(plans, phases), warn=False) as trace:
        write = _branches if phases == "generation" else _rows
        yield from write(model, trace, prompts, len(plans), batch_size)


def _rows(
    model: PreTrainedModel,
    trace: Trace,
    prompts: Sequence[generation.Prompt],
    count: int,
    batch_size: int,
) -> Iterator[Completion]:
    """Each prompt completed under each of ``count`` plans, a row of a batch each."""
    rows = [row for prompt in prompts for row in _numbered(prompt, count)]
    for index, tokens in generation.generate(model, trace, rows, batch_size):
        yield *divmod(index, count), tokens


def _branches(
    model: PreTrainedModel,
    trace: Trace,
    prompts: Sequence[generation.Prompt],
    count: int,
    batch_size: int,
) -> Iterator[Completion]:
    """As ``_rows`` where prompts run at full depth: each is read once for all plans."""
    for place, prompt in enumerate(prompts):
        rows = _numbered(prompt, count)
        begun = generation.begin(model, trace, rows[:1])
        for plans in torch.arange(count).split(batch_size):
            numbers = plans.tolist()
            part = begun.rows(torch.zeros_like(plans))
            texts = generation.finish(model, trace, [rows[plan] for plan in numbers], part)
            yield from ((place, plan, tokens) for plan, tokens in zip(numbers, texts, strict=True))


def _numbered(prompt: generation.Prompt, count: int) -> list[generation.Prompt]:
    """A prompt for each of ``count`` plans, with the plan's number behind the document's id."""
    return [replace(prompt, document=f"{prompt.document} {plan}") for plan in range(count)]


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
