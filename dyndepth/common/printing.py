"""Tables for a terminal of any width, in which nothing is cut inside of a word or a number.

A column is at least as wide as its longest word or interval; what is longer goes on in a second
line. Where that is too much for the terminal, the columns that matter least are left out, and named
below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dyndepth.common import commands

NAME = 10
"""Letters of a name that stay together at the least."""
_BETWEEN = 3
"""What a column costs beside its text: two blanks and a line."""


@dataclass(frozen=True)
class Column:
    """One column of a printed table.

    Attributes:
        heading: above it.
        texts: one a row.
        name: holds names, which stand on the left and may be broken anywhere.
        rank: those of the highest rank are left out first where there is no room; of 0, never.
    """

    heading: str
    texts: Sequence[str]
    name: bool = False
    rank: int = 0

    @property
    def most(self) -> int:
        """Letters of its longest line."""
        return max(map(len, (self.heading, *self.texts)))

    def least(self, pieces: re.Pattern[str]) -> int:
        """Letters of its longest piece; of a name, ``NAME`` are enough."""
        heading = max(map(len, self.heading.split()), default=1)
        own = max((len(piece) for text in self.texts for piece in pieces.findall(text)), default=1)
        return max(heading, min(own, NAME) if self.name else own)

    def folded(self, width: int) -> list[str]:
        """The texts in lines of ``width`` letters, an interval in one line if it fits there."""
        if self.name:
            return list(self.texts)
        pieces = _INTERVALS if self.least(_INTERVALS) <= width else _WORDS
        return ["\n".join(_lines(pieces.findall(text), width)) for text in self.texts]


_WORDS = re.compile(r"\S+")
_INTERVALS = re.compile(r"\[[^]]*\]|\S+")


def _lines(pieces: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[int], list[str]]:
    """The columns that fit into ``width`` letters, how wide each is, and headings of those that do
    not; those of rank 0 stay in any case."""
    kept, left_out = list(columns), []

    def room() -> int:
        return width - 1 - _BETWEEN * len(kept)

    def widths(pieces: re.Pattern[str]) -> list[int]:
        return [each.least(pieces) for each in kept]

    while sum(widths(_INTERVALS)) > room() and any(each.rank for each in kept):
        last = max(each.rank for each in kept)
        left_out += [each.heading for each in kept if each.rank == last]
        kept = [each for each in kept if each.rank != last]
    found = widths(_INTERVALS if sum(widths(_INTERVALS)) <= room() else _WORDS)
    spare = max(0, room() - sum(found))
    # Numbers get whole lines before names do.
    for index in sorted(range(len(kept)), key=lambda index: (kept[index].name, found[index])):
        more = min(spare, kept[index].most - found[index])
        found[index] += more
        spare -= more
    return kept, found, left_out


def narrow(below: int) -> bool:
    """Whether standard output is a terminal of fewer columns than that."""
    to = commands.console()
    return to.is_terminal and to.width < below


def print_columns(columns: Sequence[Column], title: str, caption: str) -> None:
    """Print a table to standard output; one that goes to no terminal has all its columns."""
    from rich.markup import escape
    from rich.table import Table

    to = commands.console()
    every = 1 + sum(each.least(_INTERVALS) + _BETWEEN for each in columns)
    kept, widths, left_out = fitting(columns, to.width if to.is_terminal else max(every, to.width))
    if left_out:
        caption += f"; for want of width without {', '.join(left_out)}"
    table = Table(
        title=escape(title),
        caption=escape(caption),
        caption_justify="left",
        # Wider than the terminal if need be, which then folds its lines.
        width=1 + sum(widths) + _BETWEEN * len(kept),
    )
    for each, width in zip(kept, widths, strict=True):
        table.add_column(
            escape(each.heading),
            justify="left" if each.name else "right",
            width=width,
            overflow="fold",
        )
    texts = (each.folded(width) for each, width in zip(kept, widths, strict=True))
    for row in zip(*texts, strict=True):
        table.add_row(*map(escape, row))
    to.print(table, crop=False)
