"""What all figures share: colours, markers, dashes, legends outside of the data, and files.

Colours are told apart by readers with any colour vision (Okabe and Ito 2008), and lines by their
markers and dashes as well, so that a figure can be read in black and white. Nothing goes through
pyplot: no global state, no window, nothing to close.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dyndepth.cells.cell import DENSE
from dyndepth.common.paths import path_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
"""Of lines one after another; ``BOUND_DASH`` is kept for bounds."""
BOUND_DASH = "--"
GRAY = "#9A9A9A"
INK = "#222222"
SKIPPED = "#EDEDED"
TITLES = {"attention": "Attention", "mlp": "MLP"}
"""Titles of the two kinds of sublayers, in the order of every routing table."""

FRONT = "Pareto front"
CHANCE = "chance"
SUSPECT = "suspect: faster than its FLOPs allow"
LOADED = "loaded: timed on a busy machine"
IDEAL = "ideal: all saved FLOPs become time"
OTHERS = "the others"

"""Legend entries that all panels of a figure share."""

DOUBTS = {"suspect": ("x", SUSPECT), "loaded": ("1", LOADED)}
"""Columns of points that say why a time is in doubt -> the mark over it, and its legend entry."""

_DPI = 150
_SALT = "dyndepth"
"""Seeds the ids inside an SVG, so that equal figures are equal files."""
PAGE = 7.4
"""Width of a printed page in inches: no figure of curves or tables is wider, so that no text gets
smaller than it is here (7 points at least)."""
COLUMNS = 4
"""Panels beside each other that a page holds."""


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, laid out so that nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def style(number: int, bound: bool = False) -> dict[str, Any]:
    """Colour, marker and dashes of line ``number``; a bound's are dashed and hollow."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": BOUND_DASH if bound else DASHES[number // len(COLOURS) % len(DASHES)],
        "markerfacecolor": "white" if bound else colour,
        "linewidth": 1.4,
        "markersize": 5,
    }


def line(axis: Axes, x: Any, y: Any, number: int, label: str) -> None:
    """Draw one of several lines that are told apart by colour, marker and dashes."""
    look = style(number) | {"markersize": 4}
    # Many points: markers would hide the dashes.
    look |= {"markevery": max(1, len(x) // 32)}
    axis.plot(x, y, label=label, **look)


def legend_below(
    figure: Figure, entries: dict[str, Any], columns: int = 4, across: str = ""
) -> None:
    """A legend under the panels, never over data; fewer columns where labels are long.

    ``across`` labels the x axis of all panels: the layout would put the figure's own label for
    that into the legend.
    """
    if not entries:
        return
    width = figure.get_size_inches()[0]
    longest = max(map(len, entries))
    fitting = max(1, int(width / (0.6 + 0.075 * longest)))
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", frameon=False,
        ncols=min(columns, fitting, len(entries)), fontsize=7.5, handlelength=3,
        title=across or None, title_fontsize=8,
    )  # fmt: skip


def entries_of(axis: Axes) -> dict[str, Any]:
    """Label -> handle of what an axis shows."""
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def in_order(panels: Iterable[Axes]) -> dict[str, Any]:
    """Legend entries of all panels; what they share comes last.

    Where panels draw the same entry as a line and as a lone mark, the line stands in the legend.
    """
    found: dict[str, Any] = {}
    for axis in panels:
        for name, handle in entries_of(axis).items():
            lone = getattr(handle, "get_linestyle", lambda: "")() == "None"
            if name not in found or not lone:
                found[name] = handle
    dense = [name for name in found if name.startswith(f"{DENSE} (")]
    shared = (DENSE, *dense, CHANCE, OTHERS, IDEAL, SUSPECT, LOADED)
    first = {name: handle for name, handle in found.items() if name not in shared}
    fronts = {name: handle for name, handle in first.items() if name.startswith(FRONT)}
    first = {name: handle for name, handle in first.items() if name not in fronts}
    return first | fronts | {name: found[name] for name in shared if name in found}


def grid(count: int, ylabel: str, square: bool = False) -> tuple[Figure, list[Axes]]:
    """``count`` small panels with the same axes, a page wide; ``legend_below`` labels x for all.

    The last row is full, so that x is labelled there and nowhere else; the first one may be short.
    """
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    width = PAGE if columns == COLUMNS else 0.4 + columns * (PAGE - 0.4) / COLUMNS
    figure = figure_of(max(width, 4.0), (1.75 if square else 1.5) * rows + 1.3)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    empty = rows * columns - count
    for axis in panels[0, columns - empty :]:
        axis.remove()
    found = [*panels[0, : columns - empty], *panels[1:].flatten()]
    for axis in found:
        axis.tick_params(labelsize=7)
    figure.supylabel(ylabel, fontsize=8)
    return figure, found


def draw_curve(axis: Axes, own: pd.DataFrame, look: dict[str, Any], label: str, bars: bool) -> None:
    """One line with its intervals: a band, or bars where there is no line or x has some too."""
    look = look | ({"linestyle": "none"} if len(own) == 1 else {})
    axis.plot(own["x"], own["value"], label=label, zorder=3, **look)
    colour = look["color"]
    across = bool((own["x_high"] > own["x_low"]).any())
    if bars or across:
        widths = [(own["x"] - own["x_low"]), (own["x_high"] - own["x"])] if across else None
        axis.errorbar(
            own["x"], own["value"], yerr=[own["value"] - own["low"], own["high"] - own["value"]],
            xerr=widths, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2, alpha=0.6, zorder=2,
        )  # fmt: skip
    elif (own["high"] > own["low"]).any():
        edge = {"linestyle": BOUND_DASH, "linewidth": 0.5} if look["markerfacecolor"] == "white" \
            else {"linewidth": 0}  # fmt: skip
        axis.fill_between(own["x"], own["low"], own["high"], facecolor=colour, alpha=0.13,
                          edgecolor=colour, zorder=1, **edge)  # fmt: skip
    for doubt, (mark, told) in DOUBTS.items():
        if doubt in own and own[doubt].any():
            doubtful = own[own[doubt]]
            axis.plot(doubtful["x"], doubtful["value"], mark, color=VERMILION, markersize=10,
                      zorder=4, label=told, linestyle="none")  # fmt: skip


def scale_of(
    found: pd.DataFrame,
    through: Iterable[float] = (),
    *,
    logarithmic: bool | None = None,
    square: bool = False,
) -> Callable[[Axes], None]:
    """What sets an axis's limits and scale; equal for all panels of a figure.

    All intervals and the values of ``through`` are shown, and 1 across (upwards, too, if
    ``square``). By default the scale is logarithmic where values differ by a factor of three.
    """
    values = [*found["value"], *through, *([1.0] if square else [])]
    low, high = min(values), max(values)
    if logarithmic is None:
        logarithmic = is_logarithmic(values) and not square
    bottom, top = min(low, found["low"].min()), max(high, found["high"].max())
    if logarithmic:
        # An interval that reaches 0 has no end on this scale.
        bottom, top = max(bottom, low / 3) / 1.08, top * 1.08
    else:
        margin = 0.06 * (top - bottom) or 0.1 * abs(high) or 0.1
        bottom, top = bottom - margin, top + margin
    left, right = min(found["x_low"].min(), 1.0), max(found["x_high"].max(), 1.0)
    margin = 0.06 * (right - left or 1.0)
    sides = (left - margin, right + margin)

    def apply(axis: Axes) -> None:
        axis.grid(alpha=0.3)
        if logarithmic:
            from matplotlib.ticker import LogLocator, NullFormatter

            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(bottom, top)
        axis.set_xlim(*sides)

    return apply


def is_logarithmic(values: Iterable[float]) -> bool:
    """Whether such values need a logarithmic scale: positive, and three times apart."""
    shown = list(values)
    return min(shown) > 0 and max(shown) > 3 * min(shown)


def wrapped(label: str, width: int = 30) -> str:
    """A long label in lines of at most ``width`` characters, broken where a reader would."""
    lines = textwrap.wrap(re.sub(r"(?<! )\(", " (", label, count=1), width, break_long_words=False)
    return "\n".join(lines)


def readable(token: str) -> str:
    """A token's text as a label: spaces and control characters visible, nothing empty."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥"}
    shown = "".join(
        marks.get(c, c if unicodedata.category(c)[0] not in "CZ" else "□") for c in token
    )
    return shown if len(shown) <= 14 else f"{shown[:13]}…"


def whole_numbers(axis: Any) -> None:
    """Ticks of an x or y axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def written(figure: Figure, path: str | Path | None) -> Figure:
    """Write ``figure`` to ``path`` (PNG, PDF or SVG, by its ending) if one is given; return it."""
    if path is not None:
        path = path_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path, path.suffix.lower().removeprefix("."))
    return figure


def save(figure: Figure, file: Path | IO[bytes], kind: str, **about: str) -> None:
    """Write ``figure`` as a ``kind`` (png, pdf or svg) to ``file``, with ``about`` in its metadata.

    Equal figures give equal bytes: no date is kept, and ids in an SVG are seeded.
    """
    import warnings

    from matplotlib import rc_context

    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    metadata = undated.get(kind, {}) | about
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": _SALT}):
        # Tokens of other scripts than the font has are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format=kind or None, metadata=metadata)


_HEADING_SIZE = 8
_LETTERS = 17
"""Letters of that size that an inch holds."""
SEVERAL = "with several seeds from the lowest to the highest end"


def head(figure: Figure, table: pd.DataFrame, title: str, *notes: str) -> None:
    """Write the model's name and ``title`` over ``figure``, ``notes`` as sentences below, and what
    the letters of several runs stand for."""
    width = int(figure.get_size_inches()[0] * _LETTERS)
    first = ": ".join(filter(None, (of_all(table, "model"), title)))
    second = " ".join(f"{note}." for note in notes if note)
    lines = [*textwrap.wrap(first, width), *textwrap.wrap(second, width)]
    told = sorted(table["run_told"].dropna().unique()) if "run_told" in table else []
    lines += [line for text in told for line in textwrap.wrap(text, width, subsequent_indent="  ")]
    if lines:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=_HEADING_SIZE)


def of_all(table: pd.DataFrame, column: str) -> str:
    """The value of a column, or its values; empty where the table has none."""
    values = table[column].dropna().unique() if column in table else ()
    return " and ".join(
        f"{value:g}" if isinstance(value, float) else str(value) for value in values
    )


def conditions(timed: pd.DataFrame, batch: str, length: str) -> str:
    """Under which conditions the rows of ``timed`` were measured, as far as they say."""
    threads = of_all(timed, "threads")
    found = [f"batch {batch}" if batch else "", f"{length} tokens" if length else ""]
    found += [of_all(timed, "device_name")]
    found += [f"{threads} thread{'s' * (threads != '1')}" if threads else ""]
    found += [of_all(timed, "dtype")]
    return ", ".join(filter(None, found))


def intervals(found: pd.DataFrame, shape: str, over: str = "documents") -> str:
    """What bands or bars (``shape``) of these points show; empty where they have none."""
    if not (found["low"] < found["high"]).any():
        return ""
    several = f"; {SEVERAL}" if (found["seeds"] > 1).any() else ""
    return f"{shape}: 95% intervals over {over}{several}"
