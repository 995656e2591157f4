"""MindSkip, trained by Router-Tuning: attentions are skipped for a whole sequence, by its prompt.

Idea: of all sublayers, attentions of the deeper blocks are missed least; a router each, trained
alone beside the frozen model, says which of them a sequence needs.
Paper: Router-Tuning, arXiv 2410.13184.
Rule: with n(x) = x / rms(x) of the stream x that enters block l and p the mean of n(x) over the
real tokens of the prompt, the attention of block l runs, for all of the sequence, iff
    w . p + b >= threshold.
Only the last 16 blocks but one have routers, the last half but one of a model with fewer than 32;
all else always runs. As in the authors' release, the choice is made in the prompt, stored, and used
for the tokens that follow. The threshold, near 0, is solved on calibration text so that the
measured speedup meets the target. A prompt of fewer than ``least`` tokens, which a text that is
scored without a context has, says too little: then the mean of calibration text decides.
Granularity: sequence. Phases: both. KV policy: drop: a skipped attention keeps nothing.
Causality: as for ``prompt_router``: the prompt alone is read.
Costs: a linear map of each prompt token an attention that may be skipped, billed. Attentions are a
small part of a block's work on short texts: a target beyond that is refused with the one that can
be met.
Deviations: the reference weights its budget by 0 unless told otherwise, has no bias, reads the norm
with the block's own factors, takes padding into the mean, and keeps the choice on the module, where
two generations that take turns mix; its threshold is 0.5. Plain text in place of instructions.
Defaults are what trains within minutes on a processor, as for ``layer_controller``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dyndepth.methods.prompt_router.fitted import TrainedPromptRule


@dataclass(kw_only=True)
class MindSkip(TrainedPromptRule):
    """See the module's docstring, and ``PromptRule`` for the fields."""

    name: ClassVar[str] = "mindskip"
    paper: ClassVar[str] = "arXiv 2410.13184"
    attention_only: ClassVar[bool] = True

    def routed(self, layers: int) -> range:
        """The last 16 blocks but one, or the last half but one."""
        return range(layers - min(16, layers // 2), layers - 1)

    def max_speedup(self, layers: int) -> float:
        """Without any of these attentions, each half of its block, as over long texts: a bound.
        Where attention is less of a block, ``fit`` refuses what is beyond reach of the model."""
        return 1 / (1 - len(self.routed(layers)) / (2 * layers))
