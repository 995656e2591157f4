"""Exit bound: each token leaves after the first block that predicts what the whole model does.

Idea: how much depth would early exit need if it knew, token by token, when the prediction is made?
What confidences and controllers reach is to be read against this.
Paper: the oracle of CALM, arXiv 2207.07061.
Rule: with p_d the likeliest next token after d blocks (final norm and LM head on the stream there)
and L blocks in all, a token leaves after block number
    ``first``: min {d >= 1 : p_d = p_L},
    ``stays``: min {d >= 1 : p_e = p_L for all e >= d}.
Granularity: token; every token executes block 0.
KV policy: project. A token that left keeps its stream; the blocks above compute keys and values
from it (CALM's state propagation).
Phases: ``both``, prompt tokens leave too, or ``generation`` as in the paper.
Costs: what it takes to look ahead, a forward of the dense model and a head after each block, is
billed to nobody, and the clock cannot leave it out: times of this method mean nothing.
What it is not: a policy, since it knows the answer; nor a bound in the strict sense. Depths are
those of the dense model with all tokens before at full depth; in use, a token attends to keys and
values propagated from where others left, so that its prediction can differ from the dense model's
though each token alone would agree. And agreeing on the likeliest token is not agreeing on its
probability: scored by likelihood this bounds nothing. Measured on the embedded model (512 tokens of
web text, dense 3.59 nats): with exact keys and values ``first`` needs 22.0 of 30 blocks and has
7.20 nats, ``stays`` 26.6 and 5.86; propagated ones add to that. Read it on generation.
Deviations: decoder-only; the target is a setting that changes nothing above 1: what is saved is the
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate, Granularity, Phases


@dataclass(kw_only=True)
class ExitOracle(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        agree: ``first``, or ``stays``: from there on all blocks must agree.
        phases: ``both``, or ``generation`` (full depth on the prompt).
    """

    name: ClassVar[str] = "exit_oracle"
    granularity: ClassVar[Granularity] = "token"
    paper: ClassVar[str] = "arXiv 2207.07061"
    published_phases: ClassVar[Phases] = "generation"
    uses_labels: ClassVar[bool] = True
    foresees: ClassVar[bool] = True

    phases: Literal["generation", "both"] = "both"
    agree: Literal["first", "stays"] = "first"

    @property
    def budgeted(self) -> bool:
        """What is saved is the result."""
        return False

    def start(self, context: ForwardContext) -> Tensor | None:
        """A full plan at target 1.0, else none: each token's depth is looked up."""
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        if context.foresight is None:
            raise RuntimeError("the runtime offers no foresight to this method")
        self._depths = depths(context.foresight(), self.agree)
        return None

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """Open for the tokens that have not left."""
        gate: Gate = layer == 0 or self._depths > layer
        return gate, gate


def depths(likeliest: Tensor, agree: Literal["first", "stays"]) -> Tensor:
    """Blocks that each token executes, int64 ``[batch, tokens]``, from 1 to ``layers``.

    ``likeliest`` is int64 ``[layers + 1, batch, tokens]``, as ``ForwardContext.foresight`` gives.
    """
    agrees = (likeliest[1:] == likeliest[-1]).long()
    if agree == "first":
        return agrees.argmax(0) + 1
    lasting = agrees.flip(0).cumprod(0).sum(0)
    return len(agrees) - lasting + 1
