"""Tables for a terminal of any width, in which nothing is cut inside of a word or a number.

A column is at least as wide as its longest word or interval; what is longer goes on in a second
line, names after a bracket, comma, dash or underscore. Where that is too much for the terminal, the
columns that matter least are left out, and named below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dyndepth.common import commands

NAME = 22
"""Letters of a name that stay together at the most, where there is nothing to part it at."""
EASILY = 18
"""Letters that a name has room for before numbers have."""
_BETWEEN = 2
"""Blanks between two columns."""
_WORDS = re.compile(r"\S+")
_INTERVALS = re.compile(r"\[[^]]*\]|\S+")
_NAMES = re.compile(rf"[^\s_(,=/+.:-]{{1,{NAME}}}[_(,=/+.:-]*|[_(,=/+.:-]{{1,{NAME}}}")


@dataclass(frozen=True)
class Column:
    """One column of a printed table.

    Attributes:
        heading: above it.
        texts: one a row.
        name: holds names or sentences, which stand on the left.
        rank: those of the highest rank are left out first where there is no room; of 0, never.
        dim: for each row whether its text is printed dimly; none unless given.
    """

    heading: str
    texts: Sequence[str]
    name: bool = False
    rank: int = 0
    dim: Sequence[bool] = ()

    @property
    def most(self) -> int:
        """Letters of its longest line."""
        return max(map(len, (self.heading, *self.texts)))

    def least(self, pieces: re.Pattern[str] = _INTERVALS) -> int:
        """Letters of its longest piece."""
        heading = max(map(len, self.heading.split()), default=1)
        pieces = _NAMES if self.name else pieces
        found = (len(piece) for text in self.texts for piece in pieces.findall(text))
        easily = min(self.most, EASILY) if self.name else 1
        return max(heading, easily, max(found, default=1))

    def folded(self, width: int) -> list[str]:
        """The texts in lines of ``width`` letters, an interval in one line if it fits there."""
        if self.name:
            return ["\n".join(_parted(text, width)) for text in self.texts]
        pieces = _INTERVALS if self.least() <= width else _WORDS
        return ["\n".join(_lines(pieces.findall(text), width)) for text in self.texts]

    def within(self, lines: int) -> int:
        """The least width at which no text takes more than so many ``lines``, its longest line
        where there is none."""
        widths = range(self.least(), self.most)
        high = (max(text.count("\n") for text in self.folded(width)) < lines for width in widths)
        return next((w for w, fits in zip(widths, high, strict=True) if fits), self.most)


def _lines(pieces: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _parted(text: str, width: int) -> list[str]:
    """Lines of a name: between words if they fit, else after a sign."""
    lines = [""]
    for word in text.split():
        pieces = [word] if len(word) <= width else _NAMES.findall(word)
        for place, piece in enumerate(pieces):
            blank = " " if lines[-1] and not place else ""
            if len(lines[-1]) + len(blank) + len(piece) <= width:
                lines[-1] += blank + piece
            else:
                # What no terminal has room for is parted anywhere.
                parts = [piece[at : at + width] for at in range(0, len(piece), width)]
                lines += parts
    return [line for line in lines if line] or [""]


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[int], list[str]]:
    """The columns that fit into ``width`` letters, how wide each is, and headings of those that do
    not; those of rank 0 stay in any case."""
    kept, left_out = list(columns), []

    def room() -> int:
        return width - _BETWEEN * (len(kept) - 1)

    while sum(each.least() for each in kept) > room() and any(each.rank for each in kept):
        last = max(each.rank for each in kept)
        left_out += [each.heading for each in kept if each.rank == last]
        kept = [each for each in kept if each.rank != last]
    least = [each.least() for each in kept]
    if sum(least) > room():
        # Too little even so: intervals are parted, then names are.
        least = [each.least(_WORDS) for each in kept]
        for place, each in enumerate(kept):
            more = sum(least) - room()
            least[place] -= max(0, min(more, least[place] - 8)) if each.name else 0
        return kept, least, left_out
    tried = [_widths(kept, room(), lines) for lines in (1, 2, 3, 4)]
    found = min(filter(None, tried), key=lambda widths: _height(kept, widths), default=least)
    return kept, found, left_out


def _widths(columns: Sequence[Column], room: int, lines: int) -> list[int] | None:
    """Widths where numbers take at most so many ``lines`` and names the rest of the room; None if
    there is too little."""
    found = [each.least() if each.name else each.within(lines) for each in columns]
    spare = room - sum(found)
    if spare < 0:
        return None
    names = [place for place, each in enumerate(columns) if each.name]
    # The narrowest of them first: a letter, a word.
    for place in sorted(names, key=lambda place: columns[place].most):
        more = min(spare, columns[place].most - found[place])
        found[place] += more
        spare -= more
    return found


def _height(columns: Sequence[Column], widths: Sequence[int]) -> int:
    """Lines of all rows together."""
    texts = [each.folded(width) for each, width in zip(columns, widths, strict=True)]
    return sum(max(text.count("\n") + 1 for text in row) for row in zip(*texts, strict=True))


def narrow(below: int) -> bool:
    """Whether standard output is a terminal of fewer columns than that."""
    to = commands.console()
    return to.is_terminal and to.width < below


def print_columns(
    columns: Sequence[Column], title: str, caption: str = "", groups: Sequence[object] = ()
) -> None:
    """Print a table to standard output; one that goes to no terminal has all its columns.

    ``groups``: by row; where it changes, there is a blank line.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    to = commands.console()
    every = sum(each.least() + _BETWEEN for each in columns)
    kept, widths, left_out = fitting(columns, to.width if to.is_terminal else max(every, to.width))
    if left_out:
        caption = "; ".join(filter(None, (caption, f"left out at this width: {', '.join(left_out)}")))
    # Wider than the terminal if need be, which then folds its lines.
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        width=sum(widths) + _BETWEEN * (len(kept) - 1),
    )
    for each, width in zip(kept, widths, strict=True):
        table.add_column(
            escape(each.heading),
            justify="left" if each.name else "right",
            width=width,
            overflow="fold",
        )
    texts = [each.folded(width) for each, width in zip(kept, widths, strict=True)]
    for place, row in enumerate(zip(*texts, strict=True)):
        dim = [bool(each.dim) and each.dim[place] for each in kept]
        cells = [
            f"[dim]{escape(text)}[/dim]" if faint else escape(text)
            for text, faint in zip(row, dim, strict=True)
        ]
        last = bool(groups) and place + 1 < len(groups) and groups[place] != groups[place + 1]
        table.add_row(*cells, end_section=last)
    if title:
        to.print(escape(title), style="bold", highlight=False)
    to.print(table, crop=False)
    if caption:
        to.print(escape(caption), style="dim", highlight=False)
