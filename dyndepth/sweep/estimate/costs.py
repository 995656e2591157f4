"""What the parts of a cell take: scoring, fitting, trying a bound's plans, timing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import CellSpec
from dyndepth.cells.recipe import RANKED, Recipe
from dyndepth.sweep.estimate.machines import Machine
from dyndepth.sweep.estimate.models import Shape
from dyndepth.sweep.estimate.passes import Pass, verified

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod, Reading
    from dyndepth.sweep.estimate.texts import Text

LOGITS = 6
"""How often a float32 logit is written or read, from the LM head's product to its log-probability
and the likeliest token."""
TRIED = 0.5
"""Assumed part of a dense pass that trying a plan takes: plans are shallower, and share blocks."""
CELL = 0.7
"""Assumed seconds of a cell for requests, metrics and tables. Measured on two cores."""
PAIRS = 40
"""Assumed pairs until an interval is narrow enough, where a level times so many."""
SETTLING = 3
"""Assumed passes of compiled dense before the first round: until nothing is compiled any more."""


@dataclass(frozen=True)
class Depth:
    """How much of the model a method runs.

    Attributes:
        share: of the block FLOPs, where it skips.
        prompt: whether it skips there, too.
        readouts: LM heads a token where it skips.
        ahead: whether everything runs once more, with a head after each block (``foresees``).
        drafts: whether it is so in drafts alone, which the whole model verifies.
    """

    share: float = 1.0
    prompt: bool = True
    readouts: float = 0.0
    ahead: bool = False
    drafts: bool = False

    @classmethod
    def of(cls, method: DynamicDepthMethod, readouts: float) -> Depth:
        """That of a method at its target."""
        share = 1 / method.target_speedup
        readouts = readouts if share < 1 else 0.0
        both = method.phases == "both"
        return cls(share, both, readouts, method.foresees, method.speculates)


DENSE = Depth()


@dataclass
class Work:
    """Seconds and FLOPs of some part."""

    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.seconds * times, self.flops * times)


def run(machine: Machine, shape: Shape, passes: Iterable[Pass], depth: Depth = DENSE) -> Work:
    """What forwards take at that depth."""
    if depth.drafts:
        whole, drafts = verified(list(passes))
        return run(machine, shape, whole) + run(
            machine, shape, drafts, replace(depth, drafts=False)
        )
    total = Work()
    head = shape.costs.lm_head
    for one in passes:
        skips = one.generation or depth.prompt
        share, readouts = (depth.share, depth.readouts) if skips else (1.0, 0.0)
        tokens = one.rows * one.width
        blocks = shape.flops(one.keys)
        heads = one.heads + tokens * readouts
        flops = tokens * blocks * share + heads * head
        read = shape.size * share * (shape.in_blocks + one.rows * one.keys * shape.cache)
        if heads:
            read += shape.size * shape.in_head + 4 * LOGITS * heads * shape.vocabulary
        launched = shape.layers * share
        if depth.ahead:
            flops += tokens * (blocks + (shape.layers + 1) * head)
            read += shape.size * shape.in_blocks
            read += 4 * LOGITS * tokens * (shape.layers + 1) * shape.vocabulary
            launched += shape.layers
        seconds = machine.seconds(flops, read, launched)
        total += Work(seconds, flops) * one.times
    return total


def scoring(
    machine: Machine, shape: Shape, texts: Sequence[Text], method: Any, depth: Depth, rows: int
) -> Work:
    """Scoring all texts under a method."""
    budget = budget_of(machine.kind)
    sharing = depth.drafts or (not method.by_document and method.kv_policy != "evict")
    total = Work()
    for text in texts:
        # Texts are drafted one after another; what is read, is read as dense reads it.
        most = 1 if depth.drafts and text.prompts else rows
        pooled = method.pooled and not depth.drafts
        total += run(machine, shape, text.passes(most, budget, sharing, pooled), depth)
    return total


def budget_of(kind: str) -> int:
    """Tokens that a forward may hold, of ``evaluation.forwards``."""
    import torch

    from dyndepth.evaluation import forwards

    return forwards.budget_of(torch.device(kind))


def reading(machine: Machine, shape: Shape, one: Reading) -> Work:
    """What a fit's reading takes."""
    tokens = one.windows * one.length
    blocks = one.forwards + one.backwards
    flops = tokens * (shape.flops(one.length) * blocks + one.heads * shape.costs.lm_head)
    forwards = max(1.0, tokens / budget_of(machine.kind)) * blocks
    read = forwards * shape.size * shape.in_blocks
    read += 4 * LOGITS * tokens * one.heads * shape.vocabulary
    return Work(machine.seconds(flops, read, shape.layers * forwards), flops)


def recovery_readings(recipe: Recipe, share: float) -> list[Reading]:
    """What training adapters reads: states' gradients alone, for the weights are frozen; the LM
    head's logits are made again for them. Where modules are ranked, scores are learned in the same
    way, and what is kept of them is trained once more."""
    from dyndepth.method import Reading

    steps = [recipe.steps]
    if recipe.modules == RANKED:
        steps += [recipe.score_steps or 0, *([recipe.steps] if recipe.keep != 1 else [])]
    return [
        Reading(
            windows=count * recipe.batch * recipe.accumulate,
            length=recipe.length,
            forwards=share,
            backwards=share,
            heads=3.0,
        )
        for count in steps
    ]


def timing(
    machine: Machine,
    shape: Shape,
    longest: int | None,
    levels: Mapping[str, Any],
    depth: Depth,
    compiled: bool = False,
) -> Work:
    """Timing a cell against dense: pairs, until their interval is narrow or the time is over, and
    the passes after them that are watched, not timed.

    ``levels`` are what ``grid.asked_level`` gives, by mode. With ``compiled`` dense takes part a
    second time, some passes of it before the first round; compiling itself does not count.
    """
    from dyndepth.common.modes import GRAPHS
    from dyndepth.timing.levels import what_fits
    from dyndepth.timing.rounds import PROFILED

    total = Work()
    if depth.ahead:
        return total
    for mode, level in levels.items():
        chosen, _ = what_fits(longest, level, machine.kind)
        graphs, on_gpu = mode == GRAPHS, machine.kind == "cuda"
        # By graphs memory lies ready; under the profiler passes run on a GPU alone.
        watched = (0 if graphs else 1) + (PROFILED if on_gpu else 0)
        for each in chosen.shapes:
            if graphs and not each.new_tokens:
                continue
            passes = [Pass(each.batch, each.length, each.length, each.batch, False)]
            if each.new_tokens:
                keys = each.length + each.new_tokens
                decode = Pass(each.batch, 1, keys, each.batch, True, each.new_tokens, writes=True)
                passes.append(decode)
            dense = run(machine, shape, passes)
            pair = dense + run(machine, shape, passes, depth)
            turn = pair + dense * compiled
            warm = max(chosen.warmup, chosen.texts) if on_gpu else chosen.warmup
            least = warm + chosen.pairs
            most = warm + min(chosen.most, max(chosen.pairs, PAIRS))
            rounds = max(least, min(most, chosen.seconds / max(turn.seconds, 1e-9)))
            total += turn * rounds + pair * watched + dense * (SETTLING * compiled)
    return total


def untargeted(plan: CellSpec) -> str:
    """The cell's method without its target, by which what is kept for all targets is known."""
    return repr((plan.method, sorted(plan.parameters.items()), plan.seed))
