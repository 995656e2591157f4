"""What drafts propose and the whole model takes back: token by token, and how often."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.generate.accepted import by_kind, by_position
from dyndepth.generate.pieces import KINDS
from dyndepth.plots.style import (
    BLUE,
    INK,
    ORANGE,
    PAGE,
    SKIPPED,
    VERMILION,
    entries_of,
    figure_of,
    legend_below,
    readable,
    style,
    whole_numbers,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dyndepth.generate.written import Generated, Proposal

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
_NEEDED = ": pays from here on"
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


def acceptance(
    texts: Generated | Sequence[Generated] | Mapping[str, Generated | Sequence[Generated]],
    path: str | Path | None = None,
    *,
    needed: Mapping[str, float] | None = None,
) -> Figure:
    """How often drafted tokens stand: by their place in the draft, and by kind of token.

    ``texts`` are one text, several of one draft, or such by name; ``needed``, by the same names, is
    the acceptance from which each draft pays, drawn as a line. Only judged tokens count: those
    whose draft stood up to them. Bars: Wilson's 95% intervals, as if tokens were independent.
    Raises UserError where nothing was drafted.
    """
    found = _named(texts)
    places = {name: by_position(own) for name, own in found.items()}
    kinds = {name: by_kind(own) for name, own in found.items()}
    if all(table.empty for table in places.values()):
        raise UserError("nothing was drafted in these texts, so there is nothing to draw")
    figure = figure_of(PAGE, 3.3)
    left, right = figure.subplots(1, 2, sharey=True)
    shown = [kind for kind in KINDS if any(kind in set(each["kind"]) for each in kinds.values())]
    for number, name in enumerate(found):
        look = style(number) | {"markersize": 4.5, "linewidth": 1.2}
        aside = 0.14 * (number - (len(found) - 1) / 2)
        table = places[name]
        _points(left, table["position"] + aside / 2, table, look, name)
        table = kinds[name]
        _points(
            right, [shown.index(kind) + aside for kind in table["kind"]], table,
            look | {"linestyle": "none"}, name,
        )  # fmt: skip
    for label, value, colour in _lines_needed(list(found), needed or {}):
        for axis in (left, right):
            axis.axhline(
                value, color=colour, linestyle=":", linewidth=1.2, label=label, zorder=1
            )  # fmt: skip
    left.set_ylabel("share that stands, of those judged", fontsize=8)
    left.set_xlabel("place in the draft", fontsize=8)
    left.set_ylim(-0.03, 1.03)
    whole_numbers(left.xaxis)
    counts = {kind: sum(_judged(table, kind) for table in kinds.values()) for kind in shown}
    labels = ["\n".join((*kind.split(), f"{count} judged")) for kind, count in counts.items()]
    right.set_xticks(range(len(shown)), labels)
    right.set_xlim(-0.6, len(shown) - 0.4)
    for axis, heading in ((left, "By place in the draft"), (right, "By kind of token")):
        axis.set_title(heading, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, axis="y")
    entries = entries_of(left)
    legend_below(figure, {name: entries[name] for name in sorted(entries, key=_is_line)})
    return written(figure, path)


def _points(axis: Axes, x: Any, table: Any, look: dict[str, Any], name: str) -> None:
    errors = [(table["value"] - table["low"]).clip(0), (table["high"] - table["value"]).clip(0)]
    axis.errorbar(x, table["value"], yerr=errors, capsize=2, label=name, elinewidth=0.8, **look)


def _judged(table: Any, kind: str) -> int:
    return int(table.loc[table["kind"] == kind, "judged"].sum())


def _lines_needed(
    names: Sequence[str], needed: Mapping[str, float]
) -> list[tuple[str, float, str]]:
    """Label, value and colour of each acceptance that is needed, those that are the same as one."""
    shared: dict[float, list[int]] = {}
    for number, name in enumerate(names):
        if name in needed:
            shared.setdefault(round(needed[name], 3), []).append(number)
    return [
        (
            ", ".join(names[number] for number in own) + _NEEDED,
            value,
            INK if len(own) > 1 else style(own[0])["color"],
        )
        for value, own in shared.items()
    ]


def _is_line(label: str) -> bool:
    """Whether a legend entry is that of an acceptance that is needed; these come last."""
    return label.endswith(_NEEDED)


def _named(texts: Any) -> dict[str, list[Generated]]:
    """Texts by name: their method's where they have none."""
    if isinstance(texts, Mapping):
        return {name: _several(each) for name, each in texts.items()}
    own = _several(texts)
    return {own[0].method: own} if own else {}


def _several(texts: Any) -> list[Generated]:
    return list(texts) if isinstance(texts, Iterable) else [texts]


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
