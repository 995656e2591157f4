"""Methods for the tests: one that counts how often it is fitted, and some that each use one word
of the contract and nothing else."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Toy(DynamicDepthMethod):
    """Keeps the mean of a window and the layer it was asked for."""

    name = "toy"
    granularity = "static"
    paper = "test"
    fits: ClassVar[int] = 0

    mode: Literal["mean", "maximum"] = "mean"
    layer: int | None = None
    threshold: float = 0.5
    strict: bool = False
    label: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must not be negative, not {self.layer}")

    def fit(self, model, corpus=None) -> Self:
        type(self).fits += 1
        window = corpus.windows(8, 1, self.seed).float() if corpus else torch.ones(1, 8)
        self.tensors = {"mean": window.mean(1), "mask": window.mean() < window.T}
        self.facts = {"layer": self.layer, "rates": [0.25, 1.0], "nested": {"met": True}}
        return self


@dataclass(kw_only=True)
class Remembering(DynamicDepthMethod):
    """A sequence's blocks are those that its prompt's stream says at their entry; in memory."""

    name = "remembering"
    granularity = "sequence"
    paper = "test"
    reads_prompt = True

    phases: str = "both"

    def start(self, context):
        known = context.memory.get("runs")
        if known is not None:
            return known.cpu()[..., None].repeat(1, 1, 2)
        shape = (context.batch, context.tokens)
        self.reads = torch.ones(shape, dtype=torch.bool, device=context.device)
        if context.valid is not None:
            self.reads &= context.valid
        if context.generation is not None:
            self.reads &= ~context.generation
        if context.past_length:
            self.reads[:] = False
        runs = torch.ones(context.batch, context.layers, dtype=torch.bool, device=context.device)
        context.memory["runs"] = self.runs = runs
        return None

    def gates(self, layer, hidden):
        part = hidden[..., 3 * layer : 3 * layer + 3].sum(-1)
        runs = (part * self.reads).sum(1) >= 0
        self.runs[:, layer] = runs
        gate = runs[:, None].expand(hidden.shape[:2])
        return gate, gate


@dataclass(kw_only=True)
class Counting(DynamicDepthMethod):
    """Gates by how many forwards there were over the cache, which only the memory knows."""

    name = "counting"
    granularity = "token"
    paper = "test"

    def start(self, context):
        before = context.memory.get("forwards")
        if before is None:
            before = torch.zeros(context.batch, dtype=torch.long, device=context.device)
        context.memory["forwards"] = self.forwards = before + 1
        return None

    def gates(self, layer, hidden):
        gate = ((self.forwards + layer) % 3 > 0)[:, None].expand(hidden.shape[:2])
        return gate, ~gate


@dataclass(kw_only=True)
class ByAge(DynamicDepthMethod):
    """Gates by how long ago the prompt of its sequence ended."""

    name = "by_age"
    granularity = "token"
    paper = "test"

    phases: str = "generation"

    def start(self, context):
        self.context = context
        return None

    def gates(self, layer, hidden):
        gate = (self.context.generated + layer) % 3 > 0
        return gate, gate


@dataclass(kw_only=True)
class Drafting(DynamicDepthMethod):
    """Drafts ``length`` tokens without block ``without``; None: with the whole model."""

    name = "drafting"
    granularity = "static"
    paper = "test"
    speculates = True

    length: int = 4
    without: int | None = 1
    phases: str = "generation"

    def start(self, context):
        plan = torch.ones(context.layers, 2, dtype=torch.bool)
        if self.without is not None:
            plan[self.without] = False
        return plan

    def more(self, draft):
        return draft.length < self.length
