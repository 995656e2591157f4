"""Many static plans scored together (``dyndepth.evaluation.plan_scoring``) against the same one by
one.

A part of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dyndepth.evaluation import plan_scoring, scoring
from dyndepth.evaluation.scoring import Group
from dyndepth.models.blocks import blocks
from dyndepth.models.loading import loaded
from dyndepth.runtime.attach import attach
from dyndepth.timing.jobs import given
from dyndepth.timing.pairing import interleave, ratio

BATCH = 8
"""Documents a round."""


def routes(corpus: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both ways on the same documents, in the first of the dtypes; a printed line each.

    ``ratio`` is seconds together / seconds one by one: the median over the parts of the documents,
    in whose rounds the two alternate. ``computed`` is the share of the plans' sublayers that is
    left to compute where equal beginnings are shared; ``difference`` the largest between the
    log-likelihoods of the two (nats).
    """
    dtype = options.dtypes[0]
    model = loaded(vars(options), dtype)
    plans = spaced_and_random(len(blocks(model)))
    documents = questions(corpus, options.documents, model)
    parts = [documents[start : start + BATCH] for start in range(0, len(documents), BATCH)]
    lines: dict[str, dict[str, float]] = {}
    for skipping in options.skipping:
        with tqdm(total=2 * len(parts), desc=f"routes, {skipping}", unit="run") as bar:
            together = Together(model, plans, parts, skipping, bar)
            alone = OneByOne(model, plans, parts, skipping, bar)
            together.warm_up()
            alone.warm_up()
            times = interleave(
                {"together": together.run, "one by one": alone.run},
                repeats=len(parts),
                warmup=0,
                seed=0,
                device=options.device,
            )
        found = ratio(times["together"], times["one by one"])
        name = f"routes/{skipping}/{dtype}"
        lines[name] = line = {
            "ratio": found.median,
            "low": found.low,
            "high": found.high,
            "together_s": sum(times["together"]),
            "one_by_one_s": sum(times["one by one"]),
            "computed": computed(plans),
            "difference": max(
                (a - b).abs().max().item() for a, b in zip(together.found, alone.found, strict=True)
            ),
        }
        print(
            f"{name:42} {len(plans)} plans on {len(documents)} documents: "
            f"{line['together_s']:.1f} s together, {line['one_by_one_s']:.1f} s one by one, "
            f"ratio {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}], "
            f"shares compute {line['computed']:.3f}, differ by {line['difference']:.1e} nats",
            flush=True,
        )
    return lines


def spaced_and_random(layers: int) -> Tensor:
    """For each number of blocks one plan that is spaced and two that are random: bool
    ``[3 layers, layers, 2]``."""
    generator = torch.Generator().manual_seed(0)
    plans = torch.zeros(layers, 3, layers, 2, dtype=torch.bool)
    for count in range(1, layers + 1):
        plans[count - 1, 0, spaced(count, layers)] = True
        for plan in plans[count - 1, 1:]:
            plan[torch.randperm(layers, generator=generator)[:count]] = True
    return plans.flatten(0, 1)


def spaced(count: int, layers: int) -> list[int]:
    """The first block, the last one, and between them the multiples of a whole interval."""
    if count == 1:
        return [0]
    interval = layers // (count - 1)
    inner = [block for block in range(1, layers - 1) if block % interval == 0]
    return [0, *inner[: count - 2], layers - 1]


def computed(plans: Tensor) -> float:
    """Distinct executed beginnings / executed sublayers."""
    beginnings, executed = set(), 0
    for plan in plans.flatten(1):
        done = tuple(plan.nonzero()[:, 0].tolist())
        beginnings |= {done[: stop + 1] for stop in range(len(done))}
        executed += len(done)
    return len(beginnings) / executed


def questions(corpus: Any, count: int, model: Any = None) -> list[Group]:
    """Documents like questions with three choices, cut from the corpus, the longest first.

    Contexts have 48 to 80 tokens, choices 2 to 6.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    windows = corpus.windows(98, count, seed=0, split="calibration", model=model)
    for number, window in enumerate(windows):
        context = int(torch.randint(48, 81, (1,), generator=generator))
        lengths = torch.randint(2, 7, (3,), generator=generator).tolist()
        rest = window[80:].tolist()
        choices = [rest[6 * place : 6 * place + length] for place, length in enumerate(lengths)]
        found.append(Group(str(number), window[80 - context : 80].tolist(), choices))
    return sorted(found, key=lambda group: group.size, reverse=True)


@dataclass
class Together:
    """All plans at once on one part of the documents after the other.

    ``found`` holds the log-likelihoods, float64 ``[plans, continuations]``, a part each.
    """

    model: Any
    plans: Tensor
    parts: list[list[Group]]
    skipping: Any
    bar: Any

    def __post_init__(self) -> None:
        self.found: list[Tensor] = []
        self._next = cycle(self.parts)

    def score(self, part: list[Group], plans: Tensor) -> Tensor:
        """Log-likelihoods of one part."""
        results = dict(plan_scoring.score(self.model, plans, part, phases=self.skipping))
        logs = [log.sum(1) for index in range(len(part)) for log, _ in results[index]]
        return torch.stack(logs, 1)

    def warm_up(self) -> None:
        """The first plans on the first part."""
        self.score(self.parts[0], self.plans[:3])

    def run(self) -> None:
        """What is timed."""
        self.found.append(self.score(next(self._next), self.plans))
        self.bar.update()


class OneByOne(Together):
    """One plan after the other, attached as a method."""

    def score(self, part: list[Group], plans: Tensor) -> Tensor:
        """Log-likelihoods of one part."""
        rows = []
        for plan in plans:
            with attach(self.model, given(plan, self.skipping)) as trace:
                results = dict(scoring.score(self.model, trace, part, BATCH))
            rows.append([log for index in range(len(part)) for log, _ in results[index]])
        return torch.tensor(rows, dtype=torch.float64)
