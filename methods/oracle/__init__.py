"""Route oracle: each document takes the best of a set of routes, chosen by its own outcomes.

Idea: how much could a router of whole sequences gain that never erred? Routes are tried on the
documents that are scored, and the answers decide.
Paper: the oracle of Glavas et al., arXiv 2410.20022.
Rule: at every depth k = 2 .. L - 1 of L blocks the routes are the sets of Unified Layer Skipping,
the k blocks of most influence, the first k and some random sets; the full depth is one more.
    ``budget``: the routes that maximise the task's mean quality while the executed block FLOPs of
        all its documents are at most 1 / speedup of the dense model's: a multiple-choice knapsack,
        solved exactly, task by task. Quality is the task's first metric on the document. Where
        text is written, each route's FLOPs are those of its own text, scaled to the dense model's.
    ``match``: each document takes its cheapest route that is as good as full depth, the best of
        those; what is saved is the result.
Granularity: sequence. Phases: ``both``, or ``generation`` as in the paper.
KV policy: drop (``both``), prompt_only (``generation``). In a batch whose documents differ, a
block's keys and values are computed for all of them if any runs it.
Costs: trying the routes is billed to nobody. Documents whose outcomes are not known, such as those
that are timed, follow a route drawn from the chosen ones: they cost the same and are not better.
A document that no route gets right takes its cheapest one, since nothing is lost by the first
metric: the task's other metrics (perplexity beside the accuracy of the last word) can be wrecked.
What it is not: a policy. And a bound with luck in it: the maximum over noisy outcomes is above what
any rule can know. ``routes=random`` tells what that is worth: as many routes at every depth, all
random. ``cross_fitted`` takes the luck of single routes away: half of each depth's routes are the
evidence, and a document executes the partner, in the other half, of the one that it would choose.
What is left is the choice of its depth, and the luck in that: what shallow routes have in common,
such as a liking for the same answer, is right for some documents by chance. Routes without a
partner are not used. With ``match`` it is refused: what is executed would not be what was found as
good as full depth.
Deviations: keys and values of skipped blocks are not kept; the paper masks densely and keeps all.
It scores fine-tuned models by ROUGE and counts layers; here any task by its metric, and FLOPs. The
paper's set of routes is not known. ``random`` sets keep the first and the last block.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.fitting.importance import CRITERIA, Settings, rank
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Granularity,
    Outcomes,
    Reading,
)
from dyndepth.methods.oracle.knapsack import solve
from dyndepth.methods.random_skip import kept_blocks
from dyndepth.methods.uls import UnifiedLayerSkipping
from dyndepth.models.blocks import blocks

Route = tuple[int, ...]
"""The blocks that run, ascending."""


@dataclass(kw_only=True)
class Oracle(DynamicDepthMethod):
    """See the module's docstring.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
        rule: ``budget`` or ``match``.
        routes: ``all`` as listed there, or ``random``.
        random: random sets at every depth, among ``all``.
        depths: try only so many depths, evenly spaced; None: all.
        cross_fitted: choose by one half of each depth's routes, execute the other; for ``budget``.
        windows: of calibration text for the blocks' influence; None: as published for pruning.
            Without a corpus there is no route by influence.
    """

    name: ClassVar[str] = "oracle"
    granularity: ClassVar[Granularity] = "sequence"
    paper: ClassVar[str] = "arXiv 2410.20022"
    uses_labels: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"windows": 4}

    phases: Literal["generation", "both"] = "both"
    rule: Literal["budget", "match"] = "budget"
    routes: Literal["all", "random"] = "all"
    random: int = 2
    depths: int | None = None
    cross_fitted: bool = False
    windows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("random", 0), ("depths", 1), ("windows", 1)):
            given = getattr(self, field)
            if given is not None and given < least:
                raise ValueError(f"oracle: {field} must be at least {least}, not {given}")
        if self.cross_fitted and self.rule == "match":
            raise ValueError(
                "oracle: cross_fitted goes with rule=budget alone; under match a document would "
                "execute another route than the one found as good as full depth"
            )
        self._drawn: dict[str, int] = {}

    @property
    def budgeted(self) -> bool:
        """``match`` saves what it can."""
        return self.rule == "budget"

    def max_speedup(self, layers: int) -> float:
        """L / 2: the shallowest route runs two blocks. There is but one, so it has no partner:
        cross-fitted, L / the second depth tried."""
        return layers / min(self._grid(layers)[self.cross_fitted :], default=layers)

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """The blocks' influence, and the routes that are tried."""
        if self.target_speedup == 1.0:
            return Expenses()
        windows, length = CRITERIA[Settings().criterion].text or (0, 0)
        one = Reading(windows=self.windows or windows, length=length, kept=True)
        order = list(range(layers))  # of any influence: as many routes
        routes = sum(
            min(len(self._listed(layers, depth, order)), comb(layers - 2, depth - 2))
            for depth in self._grid(layers)
        )
        return Expenses(fit=(one,), candidates=1 + routes)

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Lay out the routes: bool ``[routes, layers, 2]``, full depth first, then by depth."""
        layers = len(blocks(model))
        if self.target_speedup == 1.0:
            return self
        order: list[int] = []
        if corpus is not None:
            settings = Settings(windows=self.windows, seed=self.seed)
            order = [unit[0] // 2 for unit in rank(model, corpus, settings, progress=False).order]
        routes = [tuple(range(layers))]
        for depth in self._grid(layers):
            # No more than there are random sets: a twin has as many routes at every depth.
            listed = self._listed(layers, depth, order)[: comb(layers - 2, depth - 2)]
            if self.routes == "random":
                listed = self._random(layers, depth, len(listed), f"twin {depth}")
            routes += listed
        plans = torch.zeros(len(routes), layers, 2, dtype=torch.bool)
        for number, route in enumerate(routes):
            plans[number, list(route)] = True
        self.tensors["routes"] = plans
        self._drawn = {}
        return self

    def _grid(self, layers: int) -> list[int]:
        """Depths below the full one, ascending."""
        every = list(range(2, layers))
        if self.depths is None or self.depths >= len(every):
            return every
        return [every[round(x)] for x in np.linspace(0, len(every) - 1, self.depths)]

    def _listed(self, layers: int, depth: int, order: list[int]) -> list[Route]:
        """The different routes of one depth; ``order`` has the blocks of least influence first."""
        spaced = (
            UnifiedLayerSkipping(target_speedup=layers / depth, spacing=spacing).kept_blocks(layers)
            for spacing in ("paper", "even")
        )
        routes = [tuple(kept) for kept in spaced]
        if order:
            routes.append(tuple(sorted(order[layers - depth :])))
        routes.append(tuple(range(depth)))
        routes += self._random(layers, depth, self.random, f"route {depth}")
        return list(dict.fromkeys(routes))

    def _random(self, layers: int, depth: int, count: int, name: str) -> list[Route]:
        """``count`` different random sets that keep both ends, or as many as are found."""
        found: dict[Route, None] = {}
        for number in range(20 * count):
            if len(found) == count:
                break
            kept = kept_blocks(self.seed, f"{name} {number}", layers, depth)
            found[tuple(sorted(kept))] = None
        return list(found)

    def candidates(self) -> Tensor | None:
        """All routes, unless full depth is asked for."""
        return None if self.target_speedup == 1.0 else self._plans()

    def _plans(self) -> Tensor:
        if "routes" not in self.tensors:
            raise UserError("oracle has no routes yet: fit it to the model first")
        return self.tensors["routes"]

    def choose(self, outcomes: Outcomes) -> None:
        """A route for each document of one task; facts ``chosen`` and, a task, what it promises."""
        seen, run = np.array(list(self._pairs())).T
        quality, flops = outcomes.quality.numpy(), outcomes.flops.numpy()
        weights = outcomes.weights.numpy() / outcomes.weights.numpy().sum()
        # Partners have the same depth; where blocks differ in size, the dearer one counts.
        costs = np.maximum(flops[:, seen], flops[:, run])
        if self.rule == "match":
            places = _cheapest_as_good(quality[:, seen], costs)
        else:
            budget = float(outcomes.dense_flops.numpy().sum()) / self.target_speedup
            places = self._within(budget, weights[:, None] * quality[:, seen], costs, outcomes)
        every = np.arange(len(places))
        chosen, dense = run[places], outcomes.dense_flops.numpy().sum()
        known = self.facts.setdefault("chosen", {})
        known |= dict(zip(outcomes.documents, chosen.tolist(), strict=True))
        self.facts.setdefault("tasks", {})[outcomes.task] = {
            "metric": outcomes.metric,
            "documents": len(places),
            "executed": float(flops[every, chosen].sum() / dense) if dense else 1.0,
            "quality": float(weights @ quality[every, chosen]),
            "evidence": float(weights @ quality[every, seen[places]]),
            "dense": float(weights @ quality[:, 0]),
        }
        self._drawn = {}

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """(route that is seen, route that is run), full depth first."""
        depths = self._plans()[:, :, 0].sum(1).tolist()
        yield 0, 0
        for depth in sorted(set(depths[1:])):
            members = [number for number, one in enumerate(depths) if one == depth and number]
            if not self.cross_fitted:
                yield from zip(members, members, strict=True)
                continue
            random.Random(f"{self.seed} {depth}").shuffle(members)
            half = len(members) // 2
            yield from zip(members[:half], members[half : 2 * half], strict=True)

    def _within(
        self, budget: float, values: np.ndarray, costs: np.ndarray, outcomes: Outcomes
    ) -> np.ndarray:
        """The best choice; UserError where even the cheapest routes exceed the budget."""
        # The small addend undoes rounding: 2 of 30 blocks must do for a speedup of 15.
        budget *= 1 + 1e-12
        least = costs.min(1).sum()
        if least > budget:
            raise UserError(
                f"oracle: on task {outcomes.task} the cheapest routes reach a speedup of "
                f"{outcomes.dense_flops.sum() / least:.4g}, not {self.target_speedup:g}"
            )
        return solve(values, costs, budget)

    def start(self, context: ForwardContext) -> Tensor:
        """Each document's route, ``[batch, layers, 2]``."""
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        documents = context.documents or [""] * context.batch
        return self._plans()[[self._route(document) for document in documents]]

    def _route(self, document: str) -> int:
        """The chosen route, or one drawn by the document's id: see the docstring's Costs."""
        chosen = self.facts.get("chosen", {})
        if document in chosen:
            return chosen[document]
        if document not in self._drawn:
            pool = sorted(chosen.values()) or self._nearest()
            digest = hashlib.sha256(f"{self.seed} {document}".encode()).digest()
            self._drawn[document] = pool[int.from_bytes(digest[:8]) % len(pool)]
        return self._drawn[document]

    def _nearest(self) -> list[int]:
        """Routes, but for the full one, of the depth nearest to the budget."""
        shares = self._plans()[1:, :, 0].double().mean(1)
        gaps = (shares - 1 / self.target_speedup).abs()
        near = (gaps <= gaps.min() + 1e-9).nonzero()[:, 0] + 1 if len(gaps) else torch.zeros(1)
        return [int(number) for number in near]


def _cheapest_as_good(quality: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """For each document the cheapest route not below route 0, the best of those: ``[n]``."""
    allowed = np.where(quality >= quality[:, :1], costs, np.inf)
    rows = zip(quality, allowed, strict=True)
    return np.array([np.lexsort((-good, cost))[0] for good, cost in rows])
