"""Which drafted tokens the whole model took: by their place in the draft, and by kind of token.

A token counts where it was judged: the whole model said what stands in its place. Those that follow
the first wrong one of a draft were not; they continue a text that was never written. Where a text
ended inside of a draft, the rest of that was judged all the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.plots.style import (
    INK,
    PAGE,
    entries_of,
    figure_of,
    legend_below,
    style,
    whole_numbers,
    written,
)
from dyndepth.results.statistics.proportions import share
from dyndepth.writing.pieces import CUT
from dyndepth.writing.result import Generated, Proposal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("word start", "word inside", "number", "punctuation", "white space", "other")
"""Kinds of tokens, by their text alone, whatever the tokenizer: see ``kind``."""
_NEEDED = ": pays from here on"


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


def by_position(texts: Generated | Iterable[Generated]) -> pd.DataFrame:
    """A row for each place in a draft, from 1: see ``_table``. Its share is the probability that
    the token there stands if those before it do."""
    found: dict[int, list[bool]] = defaultdict(list)
    for proposal in _proposals(texts):
        for place in range(proposal.judged):
            found[place + 1].append(place < proposal.accepted)
    return _table("position", {place: found[place] for place in sorted(found)})


def by_kind(texts: Generated | Iterable[Generated]) -> pd.DataFrame:
    """A row for each kind of drafted token that was judged, in the order of ``KINDS``: see
    ``_table``."""
    found: dict[str, list[bool]] = defaultdict(list)
    for proposal in _proposals(texts):
        for place, piece in enumerate(proposal.drafted[: proposal.judged]):
            found[kind(piece)].append(place < proposal.accepted)
    return _table("kind", {name: found[name] for name in KINDS if name in found})


def _table(name: str, found: dict[int, list[bool]] | dict[str, list[bool]]) -> pd.DataFrame:
    """``name``, ``judged`` and ``accepted`` tokens, and their share (``value``) from ``low`` to
    ``high``: Wilson's 95% interval, as if tokens were independent."""
    import pandas as pd

    rows = []
    for key, outcomes in found.items():
        held = share(sum(outcomes), len(outcomes))
        counts = {name: key, "judged": len(outcomes), "accepted": sum(outcomes)}
        rows.append({**counts, "value": held.value, "low": held.low, "high": held.high})
    return pd.DataFrame(rows, columns=[name, "judged", "accepted", "value", "low", "high"])


def _proposals(texts: Generated | Iterable[Generated]) -> Iterable[Proposal]:
    several = [texts] if isinstance(texts, Generated) else texts
    return (proposal for each in several for proposal in each.proposals)


def kind(piece: str) -> str:
    """Which of ``KINDS`` the text of a token is.

    White space: nothing else in it. Number: a digit in it, and no letter. Word start: letters after
    white space, or in the upper case; word inside: letters without either. Punctuation: anything
    else that can be seen. Other: what cannot, a part of a letter or nothing.
    """
    bare = piece.strip()
    if not bare:
        return "white space" if piece else "other"
    if CUT in bare:
        return "other"
    if re.search(r"[^\W\d_]", bare):
        starts = piece[0].isspace() or bare[0].isupper()
        return "word start" if starts else "word inside"
    if re.search(r"\d", bare):
        return "number"
    return "punctuation"
