"""What drafts propose and the whole model takes back, token by token."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.plots.style import (
    BLUE,
    INK,
    ORANGE,
    PAGE,
    SKIPPED,
    VERMILION,
    figure_of,
    readable,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dyndepth.writing.result import Generated, Proposal

ROUNDS = 24
"""Rounds in a picture, unless told."""

_SIZE = 7.5
_LETTER = _SIZE * 0.602 / 72
"""Width in inches of a letter of the font of fixed width."""
_LEFT, _RIGHT, _HIGH, _LINE = 0.5, 0.1, 0.21, 0.29
"""Inches: what stands before the boxes of a round and after them, a box, and a line of them."""
_GAP, _PAD = 0.045, 0.05
_TITLE_LETTERS = 16.5
"""Letters of the title that an inch holds."""
_PROMPT = 90
"""Letters of the prompt's end that are shown."""


@dataclass(frozen=True)
class _Look:
    """How a box is drawn: told apart by fill, edge and what crosses the text, in grey as well."""

    label: str
    face: str
    edge: str
    ink: str
    crossed: bool = False
    dotted: bool = False


_ACCEPTED = _Look("drafted, stands", BLUE, BLUE, "white")
_REJECTED = _Look("drafted, taken back", "white", VERMILION, INK, crossed=True)
_UNJUDGED = _Look(
    "drafted after that, or after the end", "white", "#7A7A7A", "#6A6A6A", dotted=True
)
_OWN = _Look("the whole model's own", ORANGE, ORANGE, INK)
_LOOKS = (_ACCEPTED, _REJECTED, _UNJUDGED, _OWN)


def drafts(
    text: Generated,
    path: str | Path | None = None,
    *,
    first: int = 0,
    count: int = ROUNDS,
    title: str = "",
) -> Figure:
    """Rounds of one text from top to bottom: the drafted tokens, those that stand, the first that
    does not, and the token that the whole model wrote there.

    The filled boxes, read on from row to row, are the text. Spaces are shown as dots and ends of
    lines as arrows; a long draft goes on in the next line. Shows ``count`` rounds from ``first``
    on; round 0 is the first token, which nobody drafted. Raises UserError for a text that was
    written without drafts, or has no such rounds.
    """
    if not text.proposals:
        raise UserError(f"{text.method} drafted nothing of this text, so there is nothing to draw")
    rows = [(0, [(text.pieces[0], _OWN)])]
    rows += [(n, _boxes(each)) for n, each in enumerate(text.proposals, start=1)]
    shown = rows[first : first + count] if first >= 0 else []
    if not shown:
        raise UserError(f"the text has rounds 0 to {len(rows) - 1}, so none from {first} on")
    lines = [(n, line) for n, row in shown for line in _lines(row)]
    words = _words(text, title, shown[0][0], shown[-1][0], len(rows) - 1)
    height = len(lines) * _LINE
    top, bottom = 0.14 * len(words) + 0.14, 0.36
    figure = figure_of(PAGE, top + height + bottom)
    figure.set_layout_engine("none")
    axis = figure.add_axes(
        (0, bottom / (top + height + bottom), 1, height / (top + height + bottom))
    )
    axis.set_axis_off()
    axis.set_xlim(0, PAGE)
    axis.set_ylim(height, 0)
    before = None
    for place, (number, line) in enumerate(lines):
        middle = (place + 0.5) * _LINE
        if number != before:
            label = f"{number}"
            axis.text(_LEFT - 0.12, middle, label, fontsize=7, ha="right", va="center", color=INK)
            if before is not None:
                axis.axhline(place * _LINE, 0.02, 0.985, color=SKIPPED, linewidth=0.6, zorder=0)
        before = number
        _draw(axis, line, middle)
    figure.text(
        0.015, 1 - 0.06 / figure.get_figheight(), "\n".join(words), fontsize=8, va="top",
        color=INK, parse_math=False, linespacing=1.25,
    )  # fmt: skip
    _legend(figure)
    return written(figure, path)


def _boxes(proposal: Proposal) -> list[tuple[str, _Look]]:
    """The tokens of one round with how each is drawn."""
    found = []
    for place, piece in enumerate(proposal.drafted):
        look = _ACCEPTED if place < proposal.written else _REJECTED
        # What was judged after the text's end is in no text.
        last = proposal.written if proposal.own is None else proposal.judged
        found.append((piece, look if place < last else _UNJUDGED))
    return found if proposal.own is None else [*found, (proposal.own, _OWN)]


def _lines(row: Sequence[tuple[str, _Look]]) -> list[list[tuple[str, _Look, float, float]]]:
    """A round's boxes in lines: shown text, look, left edge and width in inches."""
    lines: list[list[tuple[str, _Look, float, float]]] = [[]]
    x = _LEFT
    for piece, look in row:
        shown = readable(piece)
        width = _width(shown) + 2 * _PAD
        if lines[-1] and x + width > PAGE - _RIGHT:
            lines.append([])
            x = _LEFT
        lines[-1].append((shown, look, x, width))
        x += width + _GAP
    return lines


def _width(text: str) -> float:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return (max(1, len(text)) + wide) * _LETTER


def _draw(axis: Axes, line: Sequence[tuple[str, _Look, float, float]], middle: float) -> None:
    from matplotlib.patches import Rectangle

    for shown, look, x, width in line:
        box = Rectangle((x, middle - _HIGH / 2), width, _HIGH, **_patch(look))
        axis.add_patch(box)
        axis.text(
            x + width / 2, middle, shown, fontsize=_SIZE, family="monospace", color=look.ink,
            ha="center", va="center_baseline", parse_math=False,
        )  # fmt: skip
        if look.crossed:
            axis.plot([x, x + width], [middle, middle], color=look.edge, linewidth=0.9)


def _patch(look: _Look) -> dict[str, Any]:
    return {
        "facecolor": look.face,
        "edgecolor": look.edge,
        "linewidth": 0.9,
        "linestyle": ":" if look.dotted else "-",
    }


def _words(text: Generated, title: str, first: int, last: int, rounds: int) -> list[str]:
    """The lines over a picture."""
    drafted = sum(len(each.drafted) for each in text.proposals)
    accepted = sum(each.accepted for each in text.proposals)
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    each = text.tokens_per_verification or 0.0
    part = "" if (first, last) == (0, rounds) else f"; rounds {first} to {last} of {rounds}"
    taken = f"{drafted} tokens drafted, {accepted} accepted{share}"
    counts = f"{taken}; {each:.2f} tokens a verification{part}"
    heading = textwrap.wrap(title or text.method, int(_TITLE_LETTERS * PAGE))
    prompt = " ".join(text.prompt.split())
    after = prompt if len(prompt) <= _PROMPT else f"…{prompt[1 - _PROMPT :]}"
    return [*heading, f"After “{after}”", counts]


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=look.label, **_patch(look)) for look in _LOOKS]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.01, 0.0), ncols=4, frameon=False,
        fontsize=7.5, handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip
