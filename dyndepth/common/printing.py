"""Tables for a terminal of any width, in which nothing is cut inside of a word or a number.

A column is at least as wide as its longest word or interval; what is longer goes on in a second
line, names after a bracket, comma, dash or underscore. Where that is too much for the terminal, the
columns that matter least are left out, and named below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from dyndepth.common import commands

NAME = 22
"""Letters of a name that stay together at the most, where there is nothing to part it at."""
EASILY = 18
"""Letters that a name has room for before numbers have."""
_BETWEEN = 2
"""Blanks between two columns."""
_WORDS = re.compile(r"\S+")
_INTERVALS = re.compile(r"\[[^]]*\]|\S+")
_SIGNS = re.compile(r"(?<=[_(,=/+:])|(?<=[A-Za-z]-)(?=[A-Za-z])")
"""Where a name may be parted: after a sign, and never inside of a number."""


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

    def least(self, pieces: re.Pattern[str] = _INTERVALS, easily: bool = True) -> int:
        """Letters of its longest piece; of a name so many that it is read ``easily``."""
        heading = max(map(len, self.heading.split()), default=1)
        parts = _pieces if self.name else pieces.findall
        found = (len(piece) for text in self.texts for piece in parts(text))
        room = min(self.most, EASILY) if self.name and easily else 1
        return max(heading, room, max(found, default=1))

    def folded(self, width: int) -> list[str]:
        """The texts in lines of ``width`` letters, an interval in one line if it fits there."""
        if self.name:
            return ["\n".join(_parted(text, width)) for text in self.texts]
        pieces = _INTERVALS if self.least() <= width else _WORDS
        return ["\n".join(_lines(pieces.findall(text), width)) for text in self.texts]

    def within(self, most: Sequence[int], least: int) -> list[tuple[int, list[int]]]:
        """For each of ``most`` the width, from ``least`` on, at which no text takes more lines than
        that (the longest line where there is none), and the lines of each text there."""
        found, width = [], least
        counted = [text.count("\n") + 1 for text in self.folded(width)]
        for lines in sorted(most, reverse=True):
            while max(counted) > lines and width < self.most:
                width += 1
                counted = [text.count("\n") + 1 for text in self.folded(width)]
            found.append((width, counted))
        return found


def _pieces(text: str) -> list[str]:
    """What of a name stays together."""
    signs = (piece for word in text.split() for piece in _SIGNS.split(word))
    return [one[at : at + NAME] for one in signs for at in range(0, len(one), NAME)]


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
        pieces = [word] if len(word) <= width else _pieces(word)
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
    least = [each.least(easily=sum(each.least() for each in kept) <= room()) for each in kept]
    if sum(least) > room():
        # Too little even so: intervals are parted, then names are.
        least = [each.least(_WORDS) for each in kept]
        for place, each in enumerate(kept):
            more = sum(least) - room()
            least[place] -= max(0, min(more, least[place] - 8)) if each.name else 0
        return kept, least, left_out
    return kept, _widths(kept, least, room()) or least, left_out


_NUMBER_LINES = (1, 2, 3, 4)
_NAME_LINES = (1, 2, 3, 5, 8, 13)


def _widths(columns: Sequence[Column], least: Sequence[int], room: int) -> list[int]:
    """The widths, none below ``least``, at which all rows together take the fewest lines; what is
    left goes to names. Empty if none is within ``room``."""
    if not columns or not columns[0].texts:
        return []
    choices = [
        each.within(_NAME_LINES if each.name else _NUMBER_LINES, width)
        for each, width in zip(columns, least, strict=True)
    ]
    places = [place for place, each in enumerate(columns) if each.name]
    best: tuple[int, list[int]] | None = None
    for number in range(len(_NUMBER_LINES)):
        # Three names are tried in every way, more of them alike.
        ways = product(range(len(_NAME_LINES)), repeat=min(len(places), 3))
        for way in ways:
            own = dict(zip(places, (*way, *way[-1:] * len(places)), strict=False))
            taken = [each[own.get(place, number)] for place, each in enumerate(choices)]
            widths = [width for width, _ in taken]
            if sum(widths) <= room:
                high = sum(
                    max(lines) for lines in zip(*(counts for _, counts in taken), strict=True)
                )
                best = (high, widths) if best is None or high < best[0] else best
    if best is None:
        return []
    found = best[1]
    for place in sorted(places, key=lambda place: columns[place].most):
        more = min(room - sum(found), columns[place].most - found[place])
        found[place] += max(0, more)
    return found


def narrow(below: int) -> bool:
    """Whether standard output is a terminal of fewer columns than that."""
    to = commands.console()
    return to.is_terminal and to.width < below


def _of(groups: Sequence[object]) -> Callable[[int], object]:
    return lambda place: groups[place]


def print_columns(
    columns: Sequence[Column],
    title: str,
    caption: str | Callable[[Sequence[Column]], str] = "",
    groups: Sequence[object] = (),
    parted: bool = False,
) -> None:
    """Print a table to standard output; one that goes to no terminal has all its columns.

    ``caption``: what stands below, or what says it of the columns that are shown;
    ``groups``: by row; where it changes, there is a blank line, or, if the table is ``parted``, the
    group's name.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    to = commands.console()
    every = sum(each.least() + _BETWEEN for each in columns)
    kept, widths, left_out = fitting(columns, to.width if to.is_terminal else max(every, to.width))
    caption = caption if isinstance(caption, str) else caption(kept)
    if left_out:
        caption = "; ".join(
            filter(None, (caption, f"left out at this width: {', '.join(left_out)}"))
        )
    texts = [each.folded(width) for each, width in zip(kept, widths, strict=True)]
    cells = []
    for place, row in enumerate(zip(*texts, strict=True)):
        dim = [bool(each.dim) and each.dim[place] for each in kept]
        both = zip(row, dim, strict=True)
        cells.append([f"[dim]{escape(t)}[/dim]" if faint else escape(t) for t, faint in both])
    parts = [list(own) for _, own in groupby(range(len(cells)), _of(groups))] if parted else []
    if title:
        to.print(escape(title), style="bold", highlight=False)
    for number, places in enumerate(parts or [range(len(cells))]):
        # Wider than the terminal if need be, which then folds its lines.
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            show_header=not number,
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
        if parted and not number:
            to.print(table, crop=False)
            table.show_header = False
        if parted:
            to.print(escape(str(groups[places[0]])), style="italic", highlight=False)
        for place in places:
            after = groups[place + 1] if groups and place + 1 in places else None
            last = after is not None and after != groups[place]
            table.add_row(*cells[place], end_section=last)
        to.print(table, crop=False)
    if caption:
        to.print(escape(caption), style="dim", highlight=False)
