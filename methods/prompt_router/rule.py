"""The rule of routers that read a prompt: a decision a block and sequence, kept with the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.fitting.router_checks import check_depth, check_numbers, check_width
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity
from dyndepth.methods.skipgpt.router import LinearRouter, flops_per_token

_RUNS = "runs"
"""What is kept in memory: bool ``[sequences, layers]``, True where a block's units run."""


@dataclass(kw_only=True)
class PromptRule(DynamicDepthMethod):
    """Blocks, or their attentions, that a sequence runs by what its prompt says.

    Fields:
        reads: ``prompt``, or a control that is one plan for all: ``constant``, whose routers saw no
            token in training; ``frequent``, what routers that read prompts choose most often.
        least: tokens that a prompt must have to be read.
        initial: ``damage``: everything runs at first, biases follow the damage of removing each
            unit alone, weights are zero; ``random``: Kaiming-uniform weights and zero biases.
        cost, penalty, ramp, estimator, objective, weight_rate, bias_rate: as in
            ``dyndepth.fitting.routers.Tuning``; the ramp is of ``cost=target`` alone.
        steps, batch, length: as in ``dyndepth.fitting.loop.Schedule``; half of each window is its
            prompt.
    """

    granularity: ClassVar[Granularity] = "sequence"
    needs_training: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 8, "batch": 2, "length": 32, "least": 4}
    attention_only: ClassVar[bool] = False

    reads: Literal["prompt", "constant", "frequent"] = "prompt"
    least: int = 8
    initial: Literal["damage", "random"] = "damage"
    cost: Literal["target", "linear"] = "target"
    penalty: float = 8.0
    ramp: float = 0.5
    estimator: Literal["deterministic", "gumbel", "soft"] = "deterministic"
    objective: Literal["ce", "kl"] = "kl"
    weight_rate: float = 4e-4
    bias_rate: float = 2e-2
    steps: int = 120
    batch: int = 4
    length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"steps": 1, "batch": 1, "length": 4, "least": 1}
        check_numbers(self, least, ("penalty", "weight_rate", "bias_rate"))
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must lie between 0 and 1, not {self.ramp}")
        if self.reads != "prompt":
            # What is decided without looking is one plan for all inputs.
            self.granularity = "static"  # type: ignore[misc]
        # Set by who wants to know: (layer, logits of the sequences) of each router that was asked.
        self.seen: list[tuple[int, Tensor]] | None = None

    def routed(self, layers: int) -> range:
        """The blocks that have a router."""
        raise NotImplementedError

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan where the prompt was read, or is not to be read, else None.

        Raises UserError if the routers are missing or of a model of another depth.
        """
        self.context = context
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        found = self.tensors.get("constant")
        check_depth(self, None if found is None else len(found), context.layers)
        if self.reads != "prompt":
            return self._plan(self._unread(context.layers))
        memory = context.memory
        if _RUNS not in memory and context.past_length:  # nobody looked at the prompt
            memory[_RUNS] = self._unread(context.layers).expand(context.batch, -1)
        if _RUNS in memory:
            # Once on the host, the steps that follow need not ask the device.
            memory[_RUNS] = memory[_RUNS].cpu()
            return self._plan(memory[_RUNS])
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        self._router = LinearRouter(self.tensors["weight"], self.tensors["bias"], normalise=True)
        self._choose_tokens(context)
        runs = torch.ones(context.batch, context.layers, dtype=torch.bool, device=context.device)
        memory[_RUNS] = self._runs = runs
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """One decision a sequence at a block's entry."""
        context = self.context
        if layer not in self.routed(context.layers):
            return True, True
        check_width(self.tensors["weight"].shape[-1], hidden.shape[-1])
        context.bill("router", flops_per_token(self.tensors), self._tokens)
        if self._tokens is None:
            means = self._router(layer, hidden)[..., 0].mean(1)
        else:
            index = self._index.to(hidden.device)
            found = self._router(layer, hidden.flatten(0, 1)[index][None])[0, :, 0]
            whole = found.new_zeros(hidden.shape[:2].numel()).index_copy_(0, index, found)
            sums = whole.view(hidden.shape[:2]).sum(1)
            means = sums / self._counts.to(hidden.device).clamp_min(1)
        if self.seen is not None:
            self.seen.append((layer, means))
        constant = self.tensors["constant"][layer].to(hidden.device)
        logits = torch.where(self._long.to(hidden.device), means, constant)
        runs = logits >= self.facts["threshold"]
        self._runs[:, layer] = runs.to(self._runs.device)
        if self.phases == "generation" and context.phase == "prompt":
            return True, True  # what it would be overruled to
        alike = set(runs.tolist())
        gate: Gate = alike.pop() if len(alike) == 1 else runs[:, None].expand(hidden.shape[:2])
        return gate, True if self.attention_only else gate

    def _choose_tokens(self, context: ForwardContext) -> None:
        """The tokens that are read: all of the prompt but padding; None where that is all."""
        shape = (context.batch, context.tokens)
        tokens = context.valid
        if context.generation is not None:
            prompt = ~context.generation
            tokens = prompt if tokens is None else tokens & prompt
        self._tokens = tokens
        if tokens is None:
            self._counts = torch.full(shape[:1], context.tokens, device=context.device)
        else:
            self._index, self._counts = tokens.flatten().nonzero()[:, 0], tokens.sum(1)
        self._long = self._counts >= self.least

    def _unread(self, layers: int) -> Tensor:
        """What runs where no prompt is read: bool ``[layers]``, on the CPU."""
        runs = self.tensors["constant"].cpu()[:, 0] >= self.facts["threshold"]
        routed = torch.zeros(layers, dtype=torch.bool)
        routed[list(self.routed(layers))] = True
        return runs | ~routed

    def _plan(self, runs: Tensor) -> Tensor:
        """``[..., layers]`` to a plan."""
        return torch.stack([runs, torch.ones_like(runs) if self.attention_only else runs], -1)
