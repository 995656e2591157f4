"""Which token sequences begin alike: few-shot examples, instructions, questions asked twice."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 8
"""Tokens that a prefix must have to be worth a forward of its own."""


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Every sequence once: (length of a common prefix, indices of the sequences that have it).

    The length is 0 for a sequence that shares none; otherwise it is at least ``LEAST`` and leaves
    each sequence its last token. Sequences are taken in lexicographic order, in which equal
    beginnings are neighbours, and one joins those before it unless that saves fewer tokens.
    """
    order = sorted(range(len(sequences)), key=lambda index: list(sequences[index]))
    found: list[tuple[int, list[int]]] = []
    for index in order:
        own = len(sequences[index]) - 1
        if found:
            length, members = found[-1]
            common = min(length or own, own, _common(sequences[members[-1]], sequences[index]))
            common = min(common, len(sequences[members[0]]) - 1)
            if common >= LEAST and common * len(members) >= length * (len(members) - 1):
                found[-1] = common, [*members, index]
                continue
        found.append((0, [index]))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
