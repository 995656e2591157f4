"""Which forwards read a task's texts, as ``evaluation.scoring`` and ``evaluation.generation`` do.

A context is read once for all of a document's continuations, a beginning that contexts share once
for all of them; what is written runs a token a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyndepth.evaluation.scoring import Group

WRITTEN = 0.75
"""Assumed part of a task's limit that texts have when they stop. Measured on the offline suite:
17.8 of 23 tokens under the dense model."""


@dataclass(frozen=True)
class Pass:
    """A forward of ``rows`` sequences of ``width`` tokens, padding included, over ``keys`` tokens.

    ``heads`` tokens go through the LM head; ``generation`` tells the phase; it is run ``times``;
    ``writes``: its tokens are those of texts that are written, not read.
    """

    rows: float
    width: float
    keys: float
    heads: float
    generation: bool
    times: float = 1.0
    writes: bool = False

    @property
    def tokens(self) -> float:
        """Of all its runs, padding included."""
        return self.rows * self.width * self.times


def scored(
    groups: Sequence[Group], batch_size: int, budget: int, sharing: bool, times: float = 1.0
) -> list[Pass]:
    """The forwards that score ``groups``, of which there are ``times`` as many as are given.

    A beginning that at least half of the groups share is read once, however many there are.
    """
    from dyndepth.evaluation.scoring import _COPIED, _ROWS_PER_CONTEXT, shared_prefixes

    contexts = [group.context for group in groups]
    found = shared_prefixes(contexts) if sharing else [(0, list(range(len(groups))))]
    passes: list[Pass] = []
    begun = [0] * len(groups)
    for length, members in found:
        if length:
            often = 1.0 if 2 * len(members) >= len(groups) else times
            passes.append(Pass(1, length, length, 0, False, often))
        for index in members:
            begun[index] = length
    order = sorted(range(len(groups)), key=lambda i: len(contexts[i]) - begun[i], reverse=True)
    lengths = [len(contexts[index]) - begun[index] for index in order]
    for part in _parts(lengths, batch_size, budget):
        rows = order[part]
        keys = max(len(contexts[index]) for index in rows)
        heads = len(rows)
        passes.append(Pass(len(rows), lengths[part.start], keys, heads, False, times))
    more = sorted(
        (
            (len(tokens) - 1, len(group.context))
            for group in groups
            for tokens in group.continuations
            if len(tokens) > 1
        ),
        reverse=True,
    )
    longest = max((length for length, _ in more), default=0)
    width = max((context for _, context in more), default=0)
    most = min(_ROWS_PER_CONTEXT * batch_size, max(1, _COPIED // max(1, width + longest)))
    lengths = [length for length, _ in more]
    for part in _parts(lengths, most, budget):
        chunk = more[part]
        keys = max(length + context for length, context in chunk)
        heads = sum(length for length, _ in chunk)
        passes.append(Pass(len(chunk), chunk[0][0], keys, heads, True, times))
    return passes


def checked(groups: Sequence[Group], batch_size: int, budget: int, sharing: bool) -> list[Pass]:
    """What is scored beside: some documents in both ways, before a task (``agreement``)."""
    from dyndepth.evaluation.agreement import FIRST, spread

    some = [groups[index] for index in spread(groups)[:FIRST]]
    return [
        *scored(some, batch_size, budget, sharing),
        *(Pass(1, group.read[1], group.read[1], group.size[1], True) for group in some),
    ]


def alone(groups: Sequence[Group], times: float) -> list[Pass]:
    """The forwards of a method that reads one sequence at a time: context and continuation."""
    return [
        Pass(1, size, size, len(tokens), True, times)
        for group in groups
        for tokens in group.continuations
        for size in [len(group.context) + len(tokens) - 1]
    ]


def written(
    prompts: Sequence[int], limit: int, batch_size: int, budget: int, times: float = 1.0
) -> list[Pass]:
    """The forwards that complete prompts of so many tokens, up to ``limit`` new ones each."""
    from dyndepth.evaluation.generation import _HELD

    lengths = sorted(prompts, reverse=True)
    passes = []
    # The last token is written and not read; a batch goes on until its last text ends.
    steps = WRITTEN * max(0, limit - 1)
    for part in _parts(lengths, batch_size, _HELD * budget):
        rows, width = part.stop - part.start, lengths[part.start]
        passes.append(Pass(rows, width, width, rows, False, times))
        if limit > 1:
            last = float(limit - 1)
            kept = rows * steps / last
            keys = width + steps / 2
            passes.append(Pass(kept, 1, keys, kept, True, last * times, writes=True))
    return passes


def _parts(lengths: Sequence[int], most: int, budget: int) -> list[slice]:
    from dyndepth.evaluation.forwards import parts

    return list(parts(lengths, most, budget))


DRAFTED, ACCEPTED = 4, 0.6
"""Assumed tokens of a draft, and the assumed chance that one of them stands if those before do."""


def verified(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The forwards of the whole model, and those of drafts, where texts are written by drafts, one
    after another; what is read stays as it is."""
    # The accepted ones, of which each needs all before it, and one of the model's own.
    a_round = sum(ACCEPTED**place for place in range(DRAFTED + 1))
    whole, drafts = [], []
    for one in passes:
        if not one.writes:
            whole.append(one)
            continue
        rounds, most = one.rows * one.times / a_round, DRAFTED + 1
        whole.append(Pass(1, most, one.keys, most, True, rounds))
        drafts.append(Pass(1, 1, one.keys, 1, True, rounds * DRAFTED))
    return whole, drafts


def repeated(passes: Sequence[Pass], times: float) -> list[Pass]:
    """The same forwards so many times as often."""
    return [replace(one, times=one.times * times) for one in passes]
