"""Random mask: each sublayer executes as often as under another method, on tokens drawn at random.

Idea: what a trained router's choice of *tokens* is worth, given its choice of sublayers; with one
rate for all sublayers, what its choice of *sublayers* is worth.
Paper: none (control).
Rule: token t of document D executes sublayer s of block l iff
    hash(seed, D, t, l, s) < rate[l, s],
a Bernoulli draw from the token's real position, so that one forward, cached decode, padding and
batch mates see the same mask; without document ids all sequences share one. ``matched``: the rates
are the executed fractions of ``source``, fitted to the same target, on calibration text, shifted on
the logit scale (0 and 1 stay) until the expected block speedup is the target. ``uniform``: every
rate is 1 / speedup, and no source is fitted.
Granularity: token and sublayer; no block and no token is protected but by a rate of 1.
KV policy: project, as the routers that it is compared to; ``kv=evict``: what that is worth.
Phases: both; ``generation`` keeps the prompt at full depth.
Costs: none of its own: the source's routers are not billed, so at equal block FLOPs its total FLOPs
are a little lower. Report at least three seeds: they vary the mask alone, never the source.
Deviations: draws are independent, while a router's decisions go together between tokens and
sublayers; the rates are means over calibration text, while a router's follow each document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.calibration import measured, solve_threshold
from dyndepth.fitting.fits import fit_cached
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Gate,
    Granularity,
    KVPolicy,
    Reading,
)
from dyndepth.methods.skipgpt import SkipGPT
from dyndepth.runtime.flops import BlockCosts

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


_WINDOWS = 8
_BITS = 32
_MASK = 2**_BITS - 1


@dataclass(kw_only=True)
class RandomMask(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        source: specification of the method whose rates are matched; it gets this method's target
            and phases, and its own seed (0 unless named).
        rates: ``matched``, or ``uniform``: the same for all sublayers.
        length: tokens of each of the 8 calibration windows.
        kv: ``evict`` for that policy in place of ``project``. The draws stay the same, and so the
            executed blocks; the source keeps its own policy.
        phases: ``both``, or ``generation`` for full depth on the prompt.
    """

    name: ClassVar[str] = "random_mask"
    granularity: ClassVar[Granularity] = "token"
    paper: ClassVar[str] = "control"
    needs_training: ClassVar[bool] = True
    by_document: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {
        "source": f"{SkipGPT.name}({', '.join(f'{k}={v}' for k, v in SkipGPT.quick.items())})",
        "length": 48,
    }

    phases: Literal["generation", "both"] = "both"
    source: str = SkipGPT.name
    rates: Literal["matched", "uniform"] = "matched"
    length: int = 256
    kv: Literal["project", "evict"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}")

    @property
    def kv_policy(self) -> KVPolicy:
        """As the field says."""
        return self.kv or "project"

    def source_method(self) -> DynamicDepthMethod:
        """The source, not fitted. Raises UserError for an unknown one, or one of other phases."""
        given: dict[str, Any] = {"target_speedup": self.target_speedup}
        if any(f.name == "phases" for f in fields(load_method(self.source))):
            given["phases"] = self.phases
        source = load_method(self.source, **given)
        if source.phases != self.phases:
            raise UserError(
                f"random_mask: {self.source} skips in phases {source.phases!r} only; "
                f"give random_mask phases={source.phases}"
            )
        return source

    def max_speedup(self, layers: int) -> float:
        """The source's; infinite for ``uniform``."""
        return float("inf") if self.rates == "uniform" else self.source_method().max_speedup(layers)

    @property
    def window_length(self) -> int:
        """Its own, or the source's where that is longer."""
        if self.rates == "uniform":
            return self.length
        return max(self.length, self.source_method().window_length or 0)

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """Its source's, unless that is fitted or shipped, and the rates read off it and checked."""
        if self.target_speedup == 1.0:
            return Expenses()
        share = 1 / self.target_speedup
        own = Reading(windows=2 * _WINDOWS, length=self.length, forwards=share)
        if self.rates == "uniform":
            return Expenses(fit=(replace(own, windows=_WINDOWS),))
        source = self.source_method().expenses(layers, model, corpus)
        return Expenses(fit=(*(() if source.shipped else source.fit), own))

    def fit(self, model: torch.nn.Module, corpus: Corpus | None = None) -> Self:
        """Find the rates. Raises UserError if ``matched`` is to be fitted without a corpus."""
        costs = BlockCosts.of(model)
        share = torch.full((len(costs.mlp), 2), 1 / self.target_speedup, dtype=torch.float64)
        if self.rates == "matched" and self.target_speedup > 1.0:
            if corpus is None:
                raise UserError("random_mask reads its source's rates off text; give fit a corpus")
            source = fit_cached(self.source_method(), model, corpus)
            windows = corpus.windows(
                self.length, _WINDOWS, source.seed, split="calibration", model=model
            )
            seen = measured(model, source, windows)
            weights = torch.tensor([costs.attention(self.length).tolist(), costs.mlp.tolist()]).T
            share = shifted(seen.executed, weights.double(), self.target_speedup)
            self.facts = {"source": repr(source), "source_speedup": seen.speedup}
        self.tensors = {"rates": share}
        if corpus is not None and self.target_speedup > 1.0:
            windows = corpus.windows(self.length, _WINDOWS, 0, split="calibration", model=model)
            self.facts["achieved_speedup"] = measured(model, self, windows).speedup
        return self

    def start(self, context: ForwardContext) -> Tensor | None:
        """A full plan at target 1.0, else none. Raises UserError without rates for this depth."""
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        rates = self.tensors.get("rates")
        if rates is None or len(rates) != context.layers:
            raise UserError(
                f"random_mask has no rates for a model of {context.layers} blocks; "
                "call fit(model, corpus) before attaching"
            )
        self._limits = (rates.double() * 2**_BITS).round().long().tolist()
        documents = context.documents or [""] * context.batch
        keys = torch.tensor([[document_key(self.seed, document)] for document in documents])
        self._tokens = mixed(mixed(context.positions) ^ keys.to(context.device))
        return None

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """The draws of one block."""
        attention, mlp = (self._draw(2 * layer + s, self._limits[layer][s]) for s in (0, 1))
        return attention, mlp

    def _draw(self, sublayer: int, limit: int) -> Gate:
        if limit <= 0 or limit > _MASK:
            return limit > 0
        # An odd multiplier spreads the sublayers' numbers over all bits.
        return mixed(self._tokens ^ ((sublayer + 1) * 0x9E3779B1 & _MASK)) < limit


@lru_cache(maxsize=4096)
def document_key(seed: int, document: str) -> int:
    """32 bits that stand for a document under a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {document}".encode()).digest()[:4])


def mixed(values: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in int64 that flips each bit with probability near one half.

    Source: ``lowbias32`` of C. Wellons, "Prospecting for Hash Functions" (2018), public domain.
    Products overflow int64 at times; their lower 32 bits, all that is kept, are right all the same.
    """
    values = (values ^ values >> 16) * 0x7FEB352D & _MASK
    values = (values ^ values >> 15) * 0x846CA68B & _MASK
    return values ^ values >> 16


def shifted(rates: Tensor, costs: Tensor, target: float) -> Tensor:
    """``rates`` moved by one constant on the logit scale so that they cost 1 / ``target``.

    Both tables are float64 ``[layers, 2]``; a sublayer's expected cost is its rate times its cost.
    Where all rates are 0 or 1 there is nothing to move.
    """

    def speedup(less: float) -> float:
        return float(costs.sum() / (costs * (rates.logit() - less).sigmoid()).sum().clamp_min(1.0))

    less, _ = solve_threshold(
        speedup, target, 0.0, 0.05, low=-20.0, high=20.0, tolerance=1e-5, rounds=60
    )
    return (rates.logit() - less).sigmoid()
