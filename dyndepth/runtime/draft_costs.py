"""What speculation should come to, by arithmetic alone: no clock is read here.

Costs are relative to one step of the whole model over one token. In a round, ``length`` tokens are
drafted for ``draft`` each and read together, with the last one that stood, for ``verify``. With
probability ``acceptance`` a drafted token stands if those before it do, each like the next
(arXiv 2211.17192, section 3), so that a round writes

    tau = 1 + a + a^2 + ... + a^length = (1 - a^(length + 1)) / (1 - a)

tokens, the one of the whole model's own among them, and is tau / (length * draft + verify) times as
fast as steps. That probability is not the share of all drafted tokens that stand: those after a
refused one were never judged. ``chance`` gives it.

A step over few tokens waits for weights. ``by_bytes`` so counts the bytes of those that it reads:
its sublayers, the last norm and the LM head, which a draft needs, too. Left out: keys and values
(more of them for long texts, in draft and step alike), the row of the embeddings, all arithmetic,
and what calls cost beside. Wherever these count, costs are to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.method import ATTENTION, MLP
from dyndepth.models.blocks import Decoder
from dyndepth.runtime.acceptance import Round

LONGEST = 64
"""Tokens of the longest draft that ``best_length`` looks at, unless told."""


@dataclass(frozen=True)
class DraftCosts:
    """What drafting and verifying cost, each relative to a step of the whole model.

    Attributes:
        draft: of one drafted token.
        verify: of one forward over the last token and all drafted ones.
    """

    draft: float
    verify: float = 1.0

    def __post_init__(self) -> None:
        if not (self.draft >= 0 and self.verify > 0):
            raise ValueError(f"costs are 0 or more, and a verification's is above: {self}")


def by_bytes(
    model: nn.Module, plan: Tensor, *, readouts: float = 0.0, projected: bool = False
) -> DraftCosts:
    """Costs by the bytes of the weights that a step reads; a verification reads them once.

    ``plan`` ``[layers, 2]`` says which sublayers a draft runs: bool, or the share of its tokens
    that run each. ``readouts`` are LM heads that the method itself runs for a token; ``projected``:
    keys and values of skipped attentions are computed all the same. ``model`` may lie on the meta
    device. Raises ValueError for a plan of another shape.
    """
    parts = Decoder.of(model)
    weights = step_bytes(parts)
    if tuple(plan.shape) != tuple(weights.blocks.shape):
        wanted = list(weights.blocks.shape)
        raise ValueError(f"the plan must be {wanted}, layers and sublayers, not {list(plan.shape)}")
    share = plan.to("cpu", torch.float64)
    read = float((share * weights.blocks).sum()) + weights.rest + readouts * weights.head
    if projected:
        skipped = 1 - share[:, ATTENTION]
        read += float((skipped * weights.blocks[:, ATTENTION] * _key_value_share(parts)).sum())
    return DraftCosts(read / weights.step)


@dataclass(frozen=True, eq=False)
class StepBytes:
    """Bytes of the weights that a step over one token reads.

    Attributes:
        blocks: by block and sublayer, float64 ``[layers, 2]``.
        rest: the last norm and the LM head.
        head: the LM head alone, the embeddings' own matrix where the two are one.
    """

    blocks: Tensor
    rest: float
    head: float

    @property
    def step(self) -> float:
        """All of them."""
        return float(self.blocks.sum()) + self.rest

    @property
    def head_share(self) -> float:
        """The head's share: no draft that reads out costs less."""
        return self.head / self.step


def step_bytes(model: nn.Module | Decoder) -> StepBytes:
    """The bytes of a model's weights, as they are stored now; it may lie on the meta device."""
    parts = model if isinstance(model, Decoder) else Decoder.of(model)
    blocks = torch.zeros(len(parts.blocks), 2, dtype=torch.float64)
    for index, block in enumerate(parts.blocks):
        blocks[index, ATTENTION] = _bytes(block.attention_modules)
        blocks[index, MLP] = _bytes(block.mlp_modules)
    head = float(_bytes([parts.head]))
    return StepBytes(blocks, head + _bytes([parts.norm]), head)


def tokens_a_round(acceptance: float, length: int) -> float:
    """Expected tokens of a round: tau of the module's docstring, in [1, length + 1]."""
    _check(acceptance, length)
    return sum(acceptance**place for place in range(length + 1))


def predicted_speedup(acceptance: float, length: int, costs: DraftCosts) -> float:
    """How many times as fast as steps of the whole model such rounds are."""
    return tokens_a_round(acceptance, length) / (length * costs.draft + costs.verify)


def best_length(acceptance: float, costs: DraftCosts, most: int = LONGEST) -> int:
    """The length in [0, most] with the highest predicted speedup, the shortest of several."""
    return max(range(most + 1), key=lambda length: predicted_speedup(acceptance, length, costs))


def break_even(costs: DraftCosts, length: int | None = None, most: int = LONGEST) -> float | None:
    """The acceptance from which rounds of ``length`` are no slower than steps; None: never.

    Without a length, the lowest of any in [1, most]. At a verification that costs a step, that is
    what a drafted token costs.
    """
    if length is None:
        each = (break_even(costs, one) for one in range(1, most + 1))
        return min((found for found in each if found is not None), default=None)
    return _lowest(lambda chance: predicted_speedup(chance, length, costs) >= 1)


@dataclass(frozen=True)
class Kind:
    """Drafted tokens that are alike to whoever looks at their draft.

    Attributes:
        share: of all drafted tokens.
        stands: the probability with which one of them stands if those before it do.
    """

    share: float
    stands: float


def pays(stands: float, ahead: float, rate: float, costs: DraftCosts) -> bool:
    """Whether another token is worth its cost: ``stands * ahead > rate * draft``.

    ``stands`` is the probability that all tokens of the draft do, ``ahead`` that with which the
    next one stands then, ``rate`` what all rounds bring, in tokens for each unit of cost. What
    another token brings falls with every token, as both probabilities are at most 1, so the first
    that does not pay ends the draft: the rule is optimal for the ``rate`` of ``best_rate``.
    """
    return stands * ahead > rate * costs.draft


def best_rate(kinds: tuple[Kind, Kind], costs: DraftCosts, most: int) -> float:
    """The most tokens for each unit of cost that drafts of at most ``most`` tokens can bring, if
    it may be seen of which kind each token is before another is drafted.

    Rounds follow each other, so it is the root of: tokens - rate * cost, at its best, is 0; found
    by taking the rate of the policy that is best at the last one (Dinkelbach's iteration).
    """
    rate = 1 / costs.verify
    while True:
        tokens, cost = _round_at(rate, kinds, costs, most)
        if tokens <= rate * cost * (1 + 1e-12):
            return rate
        rate = tokens / cost


def _round_at(
    rate: float, kinds: tuple[Kind, Kind], costs: DraftCosts, most: int
) -> tuple[float, float]:
    """Expected tokens and cost of a round in which a token is drafted where it pays at ``rate``."""
    first, second = kinds
    ahead = sum(kind.share * kind.stands for kind in kinds)
    tokens, cost = 1.0, costs.verify
    chances = [1.0]  # of drafts that go on, by how many of their tokens are of the second kind
    for length in range(most):
        stands = [first.stands ** (length - n) * second.stands**n for n in range(length + 1)]
        chances = [
            chance if pays(one, ahead, rate, costs) else 0.0
            for one, chance in zip(stands, chances, strict=True)
        ]
        if not any(chances):
            break
        cost += costs.draft * sum(chances)
        tokens += ahead * sum(one * chance for one, chance in zip(stands, chances, strict=True))
        chances = [
            a * first.share + b * second.share
            for a, b in zip([*chances, 0.0], [0.0, *chances], strict=True)
        ]
    return tokens, cost


def chance(rounds: Iterable[Round]) -> float | None:
    """The acceptance of measured rounds: tokens that stand, of those that were judged, which are
    they and the first of each draft that does not stand. None where nothing was judged.

    The likeliest value under the module's assumption, whatever the drafts' lengths.
    """
    kept = refused = 0
    for each in rounds:
        kept += each.accepted
        refused += each.accepted < len(each.drafted)
    return kept / (kept + refused) if kept + refused else None


def _lowest(holds: Any) -> float | None:
    """The lowest value in [0, 1] at which what is monotone ``holds``; None: at none."""
    if not holds(1.0):
        return None
    low, high = 0.0, 1.0
    if holds(low):
        return low
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check(acceptance: float, length: int) -> None:
    if not (0 <= acceptance <= 1 and length >= 0):
        raise ValueError(f"a probability and a length of 0 or more, not {acceptance} and {length}")


def _bytes(modules: Sequence[Any]) -> int:
    """Bytes of all weights inside modules, one that two of them share counted once."""
    weights = {
        id(each): each
        for module in modules
        if isinstance(module, nn.Module)
        for each in module.parameters()
    }
    return sum(each.numel() * each.element_size() for each in weights.values())


def _key_value_share(parts: Decoder) -> Tensor:
    """The part of each attention's maps that makes keys and values: float64 ``[layers]``."""
    both = [(block.key_value_flops, block.query_flops) for block in parts.blocks]
    return torch.tensor([kept / (kept + other) for kept, other in both], dtype=torch.float64)
