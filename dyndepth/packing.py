"""Documents with their continuations as rows of tokens: batches, packed rows, masks.

A document is one row: its context, then one continuation after the other, under a mask in which a
continuation sees the context and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.scoring import Group

_PADDING = 0.125
"""Padding that a batch may hold as a share of its tokens."""

Size = tuple[int, int]
"""What a document takes: its length, which is padded to the batch's longest, and its weight, which
is held."""


def batches(sizes: Sequence[Size], most: int) -> Iterator[list[int]]:
    """Indices of documents of similar lengths, longest first, that are held together.

    A batch holds as much as its heaviest document times their number: at most ``most``, but for a
    single document that is heavier.
    """
    batch: list[int] = []
    heaviest = padding = useful = 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        length, weight = sizes[index]
        gap = sizes[batch[0]][0] - length if batch else 0
        crowded = padding + gap > _PADDING * (useful + length)
        if batch and (crowded or max(heaviest, weight) * (len(batch) + 1) > most):
            yield batch
            batch, heaviest, padding, useful, gap = [], 0, 0, 0, 0
        batch.append(index)
        heaviest = max(heaviest, weight)
        padding += gap
        useful += length
    if batch:
        yield batch


@dataclass(frozen=True)
class Packed:
    """Continuations of a batch of documents, one row a document, padded on the right.

    Attributes:
        ids, positions: int64 ``[batch, tokens]``.
        segments: int64 ``[batch, tokens]``: 0 in the context, from 1 on the continuation's number,
            -1 on padding.
        lengths: tokens of each context, int64 ``[batch]``.
        spans: for each row, for each continuation, its part of all continuation tokens, in order.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    lengths: Tensor
    spans: list[list[slice]]

    @classmethod
    def of(cls, batch: Sequence[Group], contexts: bool, device: torch.device) -> Packed:
        """Every continuation but for its last token, after its context if ``contexts``."""
        tokens: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        spans: list[list[slice]] = []
        done = 0
        for group in batch:
            length = len(group.context)
            row = list(group.context) if contexts else []
            place, segment = list(range(len(row))), [0] * len(row)
            spans.append([])
            for number, continuation in enumerate(group.continuations, start=1):
                more = len(continuation) - 1
                row += continuation[:-1]
                place += range(length, length + more)
                segment += [number] * more
                spans[-1].append(slice(done, done + more))
                done += more
            tokens.append(row)
            positions.append(place)
            segments.append(segment)
        return cls(
            table(tokens, 0, device),
            table(positions, 0, device),
            table(segments, -1, device),
            torch.tensor([len(group.context) for group in batch], device=device),
            spans,
        )


def tree_mask(
    packed: Packed, segments: Tensor, positions: Tensor, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Additive mask ``[batch, 1, tokens, keys]``.

    A token sees what stands before it in its context and in its own continuation, and of that what
    its attention's ``window`` reaches. ``segments`` and ``positions`` are those of the keys, int64
    ``[batch, keys]``; the last keys are the packed tokens themselves.
    """
    tokens, length = packed.ids.shape[1], segments.shape[1]
    theirs = segments[:, None, :]
    seen = (theirs == 0) | (theirs == packed.segments[:, :, None])
    seen &= torch.ones(tokens, length, dtype=torch.bool, device=seen.device).tril(length - tokens)
    if window is not None:
        seen &= packed.positions[:, :, None] - positions[:, None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def table(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of different lengths, filled up on the right: int64 ``[rows, longest]``."""
    width = max(map(len, rows))
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), width)
