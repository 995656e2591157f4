"""Texts that many plans write to the same prompts, greedily, as rows of a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from dyndepth import generation
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity
from dyndepth.runtime.attach import attach
from dyndepth.runtime.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    with attach(model, _Numbered(plans, phases)) as trace:
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
