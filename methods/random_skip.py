"""Random skipping: a uniformly random set of blocks for each document.

Idea: what any informed choice of blocks must beat at the same number of blocks.
Paper: none (control); the random baseline of Glavas et al., arXiv 2410.20022.
Rule: keep the first and the last block and round(L / speedup) - 2 of the others, those with the
lowest hash of (seed, document, block).
Granularity: sequence. The same document has the same blocks in every forward, whatever its batch;
without document ids all sequences share one set.
Phases: ``both``, or ``generation`` as in Glavas et al.
KV policy: prompt_only (``generation``), drop (``both``). In a batch whose documents differ, a
block's keys and values are computed for all of them if any runs it; those never read are counted
as padding.
Deviations: the reference draws a new set for every forward, that is, for every generated token,
which leaves later tokens without keys and values of earlier ones; here a document keeps its set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Granularity, Phases


@dataclass(kw_only=True)
class RandomSkip(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
    """

    name: ClassVar[str] = "random_skip"
    granularity: ClassVar[Granularity] = "sequence"
    paper: ClassVar[str] = "control"
    published_phases: ClassVar[Phases] = "generation"

    phases: Literal["generation", "both"] = "both"

    def max_speedup(self, layers: int) -> float:
        """L / 2: the first and the last block always run."""
        return layers / 2

    def start(self, context: ForwardContext) -> Tensor:
        """A plan for each sequence, ``[batch, layers, 2]``. Raises UserError beyond reach."""
        kept = round(context.layers / self.target_speedup)
        if kept < min(2, context.layers):
            raise UserError(
                f"random_skip keeps the first and the last block, so {context.layers} blocks allow "
                f"a speedup of at most {self.max_speedup(context.layers):g}, not "
                f"{self.target_speedup:g}"
            )
        plan = torch.zeros(context.batch, context.layers, 2, dtype=torch.bool)
        documents = context.documents or [""] * context.batch
        for row, document in enumerate(documents):
            plan[row, list(kept_blocks(self.seed, document, context.layers, kept))] = True
        return plan


@lru_cache(maxsize=4096)
def kept_blocks(seed: int, document: str, layers: int, kept: int) -> tuple[int, ...]:
    """The ``kept`` blocks of a document, first and last included, in no particular order."""

    def draw(block: int) -> bytes:
        return hashlib.sha256(f"{seed} {block} {document}".encode()).digest()

    inner = sorted(range(1, layers - 1), key=draw)
    return (0, layers - 1, *inner[: kept - 2])
