"""Prompt router, in the style of FiRST: a sequence's blocks are chosen once, from its prompt.

Idea: which blocks a text needs depends on what it is about, which its prompt says; one choice a
sequence keeps batches together and leaves no token without keys and values that it reads.
Paper: in the style of FiRST, arXiv 2410.12513 (Findings of EMNLP 2025), whose code is not public
and whose equations are known here at second hand: no reproduction. What is kept: a router a block,
fed by the prompt, soft in training and hard in use, whose choice is kept for the whole answer; then
LoRA with the routers frozen (``--recovery lora``).
Rule: with n(x) = x / rms(x) of the stream x that enters block l, 0 < l < L - 1, and p the mean of
n(x) over the real tokens of the prompt,
    attention and MLP of block l run, for all of the sequence, iff w . p + b >= threshold;
the first and the last block always run. The threshold, near 0, is solved on calibration text so
that the measured speedup meets the target. A prompt of fewer than ``least`` tokens, which a text
that is scored without a context has, says too little: then the mean of calibration text decides.
Granularity: sequence. Phases: ``both``, or ``generation``: the prompt is read at full depth.
KV policy: drop, or prompt_only. What is chosen is kept with the cache, a row a sequence.
Causality: the prompt alone is read, so that a likelihood never depends on what comes after its
token: a context is a prompt, what is scored is not. Within a prompt that skips (``both``) every
token depends on all of it. Fits, calibration and recovery take half of each window as its prompt,
and the loss of the other half.
Costs: a linear map of each prompt token a block that may be skipped, billed.
Deviations: the mean is a plain one, over real tokens; the budget is met by a threshold, in place of
0.5 and a weight in the loss. Defaults are what trains within minutes on a processor, as for
``layer_controller``; nearer to the paper: ``prompt_router(estimator=soft, objective=ce,
cost=linear)``. Two controls are one plan for all: ``reads=constant``, whose routers saw no prompt
in training, and ``reads=frequent``, the blocks that trained routers run for most prompts of the
calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .fitted import TrainedPromptRule


@dataclass(kw_only=True)
class PromptRouter(TrainedPromptRule):
    """See the module's docstring, and ``PromptRule`` for the other fields.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
    """

    name: ClassVar[str] = "prompt_router"
    paper: ClassVar[str] = "in the style of arXiv 2410.12513"

    phases: Literal["generation", "both"] = "both"

    def routed(self, layers: int) -> range:
        """All blocks but the first and the last."""
        return range(1, layers - 1)

    def max_speedup(self, layers: int) -> float:
        """The first and the last block alone."""
        return layers / min(layers, 2)
