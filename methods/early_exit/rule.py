"""The rule of early exit: who leaves before a block, given a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity, Phases


@dataclass(kw_only=True)
class ExitRule(DynamicDepthMethod):
    """Early exit, without the search for its threshold.

    Fields:
        confidence: ``margin``, ``max_prob``, ``saturation``, or ``fixed``.
        layer: block before which every token leaves, instead of any confidence.
        first_exit: first block before which a token may leave; None: a third of the depth.
        every: blocks from one candidate exit to the next.
        phases: ``both``, or ``generation`` (full depth on the prompt).
    """

    name: ClassVar[str] = "early_exit"
    granularity: ClassVar[Granularity] = "token"
    paper: ClassVar[str] = "arXiv 2207.07061"
    published_phases: ClassVar[Phases] = "generation"

    phases: Literal["generation", "both"] = "both"
    confidence: Literal["margin", "max_prob", "saturation", "fixed"] = "margin"
    layer: int | None = None
    first_exit: int | None = None
    every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer", "first_exit", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.layer is not None or self.confidence == "fixed":
            self.granularity = "static"  # type: ignore[misc]

    @property
    def fitted(self) -> bool:
        """A fixed depth needs no threshold, and neither does the full one."""
        fixed = self.granularity == "static" or self.target_speedup == 1.0
        return fixed or "threshold" in self.facts

    def exits(self, layers: int) -> range:
        """Blocks at whose entry a token may leave; UserError if the model has none of them."""
        found = range(self.first_exit or max(1, layers // 3), layers, self.every)
        if not found:
            raise UserError(
                f"early_exit: first_exit={self.first_exit} is beyond the {layers} blocks of this "
                f"model; give at most {layers - 1}"
            )
        return found

    @property
    def budgeted(self) -> bool:
        """A ``layer`` is the whole setting, whatever the target."""
        return self.layer is None

    def _layer(self, layers: int) -> int | None:
        """``layer``; UserError if nothing is left to skip there."""
        if self.layer is not None and self.layer >= layers:
            raise UserError(
                f"early_exit: layer={self.layer} is beyond the {layers} blocks of this model; give "
                f"at most {layers - 1}"
            )
        return self.layer

    def fixed_depth(self, layers: int) -> int | None:
        """Blocks that every token executes, where that needs no confidence; else None."""
        if (layer := self._layer(layers)) is not None:
            return layer
        if self.confidence == "fixed":
            return max(1, int(layers / self.target_speedup + 1e-9))
        return layers if self.target_speedup == 1.0 else None

    def max_speedup(self, layers: int) -> float:
        """Every token leaves at the first chance."""
        if self.granularity == "static":
            return layers / (self._layer(layers) or 1)
        return layers / self.exits(layers)[0]

    def start(self, context: ForwardContext) -> Tensor | None:
        """A plan where the depth is fixed, else None. Raises UserError before ``fit``."""
        depth = self.fixed_depth(context.layers)
        if depth is not None:
            return (torch.arange(context.layers) < depth)[:, None].repeat(1, 2)
        if "threshold" not in self.facts:
            raise UserError("early_exit has no threshold yet; call fit(model, corpus) first")
        running = torch.ones(context.batch, context.tokens, dtype=torch.bool, device=context.device)
        for limit in (context.valid, context.generation if self.phases == "generation" else None):
            running = running if limit is None else running & limit
        self.context = context
        self._exits = self.exits(context.layers)
        self._running = running
        self._gate: Gate = True
        self._previous = running  # replaced by the stream before it is used
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """At a candidate, let the confident tokens go; open for those still running."""
        if layer in self._exits:
            # Blocks of a model that is spread over devices lie on different ones.
            self._running = self._running.to(hidden.device)
            stay = self._running.clone()
            stay[self._running] = self.token_confidence(hidden) < self.facts["threshold"]
            self._running = self._gate = stay
        self._previous = hidden
        return self._gate, self._gate

    def token_confidence(self, hidden: Tensor) -> Tensor:
        """Confidence of the tokens still running: float32 ``[running]``."""
        if self.confidence == "saturation":
            running = self._running.to(hidden.device)
            before, now = self._previous.to(hidden.device)[running], hidden[running]
            return cosine_similarity(before.float(), now.float(), dim=-1)
        logits = self.context.readout(hidden, self._running).float()
        best = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        return best[:, 0] - best[:, 1] if self.confidence == "margin" else best[:, 0]
