"""Figures, each once: the notebooks and commands call these and draw nothing themselves.

Every function returns a matplotlib Figure and writes it to ``path`` if one is given (PNG, PDF or
SVG, by its ending). Colours are told apart by readers with any colour vision (Okabe and Ito 2008),
and lines by their markers and dashes as well.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndepth.errors import UserError
from dyndepth.method import SUBLAYERS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dyndepth.routes import Phase, Routes

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")
SKIPPED = "#EDEDED"
TITLES = dict(zip(SUBLAYERS, ("Attention", "MLP"), strict=True))

_TOKENS_SHOWN = 72
_FIRST = "first quarter to go, in this order"
_DPI = 150


def routing_heatmap(
    routes: Routes,
    document: str,
    path: str | Path | None = None,
    *,
    first: int = 0,
    count: int = _TOKENS_SHOWN,
) -> Figure:
    """Tokens by sublayers of one document: filled where a token executed.

    Shows ``count`` tokens from position ``first`` on, with their texts; a line marks where the
    prompt ends. Raises UserError for an unknown document, or a ``first`` beyond its end.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = routes.document(document)
    length = rows.stop - rows.start
    if not 0 <= first < length or count < 1:
        raise UserError(f"document {document!r} has {length} tokens, so none from {first} on")
    shown = slice(rows.start + first, min(rows.start + first + count, rows.stop))
    gates = routes.gates[shown]
    tokens, layers = gates.shape[:2]
    figure = _figure(max(6.0, 1.6 + 0.155 * tokens), 2.4 + 2 * max(1.2, 0.085 * layers))
    axes = figure.subplots(2, 1, sharex=True)
    colours = ListedColormap([SKIPPED, BLUE])
    boundary = routes.prompt_lengths[routes.documents.index(document)] - first
    ends = None
    for index, (axis, sublayer) in enumerate(zip(axes, SUBLAYERS, strict=True)):
        table = gates[:, :, index].T
        axis.imshow(
            table, cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower",
            interpolation="nearest",
        )  # fmt: skip
        axis.set_ylabel("block")
        axis.set_title(f"{TITLES[sublayer]}: {table.mean():.0%} executed", loc="left", fontsize=9)
        _whole_numbers(axis.yaxis)
        if 0 < boundary < tokens:
            ends = axis.axvline(boundary - 0.5, color=VERMILION, linewidth=2, label="prompt ends")
    labels = [readable(text) for text in routes.strings(shown)]
    axes[1].set_xticks(range(tokens), labels, rotation=90, fontsize=7, parse_math=False)
    axes[1].set_xlabel(f"tokens {first} to {first + tokens - 1} of {length}")
    handles: list[Artist] = [
        Patch(facecolor=BLUE, label="executed"),
        Patch(facecolor=SKIPPED, edgecolor="gray", linewidth=0.5, label="skipped"),
    ]
    handles += [ends] if ends else []
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{routes.label}, {document}", x=0.01, ha="left", fontsize=10)
    return _written(figure, path)


def executed_by_layer(
    routes: Routes | Iterable[Routes] | Mapping[str, Routes],
    path: str | Path | None = None,
    *,
    phase: Phase | None = None,
) -> Figure:
    """Executed fraction of tokens over blocks, a line for each record, by kind of sublayer."""
    figure, axes = _pair("block (0 is next to the embedding)")
    for number, (label, each) in enumerate(_named(routes).items()):
        table = each.by_sublayer(phase)
        for axis, sublayer in zip(axes, SUBLAYERS, strict=True):
            part = table[table["sublayer"] == sublayer]
            _line(axis, part["layer"], part["executed"], number, label)
    for axis in axes:
        _whole_numbers(axis.xaxis)
    return _finished(figure, axes, path)


def executed_by_position(
    routes: Routes | Iterable[Routes] | Mapping[str, Routes],
    path: str | Path | None = None,
    *,
    bins: int = 16,
    phase: Phase | None = None,
) -> Figure:
    """Executed fraction over the position in the document, a line for each record."""
    figure, axes = _pair("position in the document, tokens")
    for number, (label, each) in enumerate(_named(routes).items()):
        table = each.by_position(bins, phase)
        for axis, sublayer in zip(axes, SUBLAYERS, strict=True):
            part = table[table["sublayer"] == sublayer]
            _line(axis, (part["first"] + part["last"]) / 2, part["executed"], number, label)
    return _finished(figure, axes, path)


def training_curve(
    curve: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, title: str = ""
) -> Figure:
    """Loss, and executed beside wanted fraction, over tokens read (or steps).

    ``curve`` has a row a step, as methods keep it: ``loss``, ``executed``, ``wanted``, ``tokens``;
    a column that no row has is left out, and so are values that a row lacks. Raises UserError if
    there is nothing to draw.
    """
    across = "tokens" if any("tokens" in row for row in curve) else "step"
    points = {name: _points(curve, name, across) for name in ("loss", "executed", "wanted")}
    present = {name for name, (x, _) in points.items() if len(x)}
    if not present:
        raise UserError(
            "this training curve has neither loss nor executed; there is nothing to draw"
        )
    panels = [p for p in (("loss",), ("executed", "wanted")) if present & set(p)]
    figure = _figure(6.4, 2.4 * len(panels) + 0.4)
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axis, names in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            x, y = points[name]
            if name not in present:
                continue
            fainter = len(x) > 40 and name != "wanted"
            style = {"color": COLOURS[number], "linestyle": DASHES[number]}
            axis.plot(x, y, alpha=0.3 if fainter else 1, linewidth=1.2, **style,
                      label=None if fainter else name)  # fmt: skip
            if fainter:
                axis.plot(x, _smoothed(y), linewidth=1.8, **style, label=f"{name}, running mean")
        if len(names) > 1:
            axis.set_ylim(-0.02, 1.02)
        axis.set_ylabel("loss, nats a token" if names == ("loss",) else "executed fraction")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("tokens read" if across == "tokens" else "step")
    _whole_numbers(axes[-1].xaxis)
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    if title:
        figure.suptitle(title, fontsize=10)
    return _written(figure, path)


def importance(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: Mapping[str, str],
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Figure:
    """Scores over blocks, a panel for each criterion, with the first to go ringed and numbered.

    ``tables`` has the rows of ``Ranking.rows`` by criterion: ``layer``, ``sublayer`` (``block``
    where blocks are ranked), ``score``, ``rank`` from 1; ``labels`` says what each score is. The
    ringed quarter is that of the ranked units. Scores that span orders of magnitude have a
    logarithmic axis. Raises UserError if there is nothing to draw.
    """
    shown = {name: rows for name, rows in tables.items() if rows}
    if not shown:
        raise UserError("no unit was ranked; there is nothing to draw")
    height = -(-len(shown) // 2)
    figure = _figure(9.0, 0.7 + 2.5 * height)
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for axis in panels[len(shown) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis, (name, rows) in zip(panels, shown.items(), strict=False):
        _importance_panel(axis, rows)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel(labels.get(name, "score"))
        axis.set_xlabel("block (0 is next to the embedding)")
        drawn, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    handles[_FIRST] = handles.pop(_FIRST)  # last
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
        fontsize=8,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return _written(figure, path)


def _importance_panel(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """One criterion: a line for each kind of unit, rings around the first quarter to go."""
    for kind, number in (("block", 2), (SUBLAYERS[0], 0), (SUBLAYERS[1], 1)):
        part = sorted((row["layer"], row["score"]) for row in rows if row["sublayer"] == kind)
        if part:
            points = np.array(part)
            _line(axis, points[:, 0], points[:, 1], number, TITLES.get(kind, "Block"))
    first = [row for row in rows if row["rank"] <= max(1, len(rows) // 4)]
    axis.plot(
        [row["layer"] for row in first], [row["score"] for row in first], label=_FIRST,
        linestyle="none", marker="o", markersize=9, markerfacecolor="none",
        markeredgecolor=VERMILION,
    )  # fmt: skip
    for row in first:
        axis.annotate(
            str(row["rank"]), (row["layer"], row["score"]), xytext=(0, 7),
            textcoords="offset points", ha="center", fontsize=7, color=VERMILION, zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.4},
        )  # fmt: skip
    scores = [row["score"] for row in rows]
    if min(scores) > 0 and max(scores) > 30 * min(scores):
        axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)
    _whole_numbers(axis.xaxis)


def readable(token: str) -> str:
    """A token's text as a label: spaces and control characters visible, nothing empty."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥"}
    shown = "".join(
        marks.get(c, c if unicodedata.category(c)[0] not in "CZ" else "□") for c in token
    )
    return shown if len(shown) <= 14 else f"{shown[:13]}…"


# --- pieces -------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot: no global state, no window, nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _pair(across: str) -> tuple[Figure, Sequence[Axes]]:
    """Two panels, attention and MLP, with executed fractions upwards."""
    figure = _figure(8.4, 3.4)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, sublayer in zip(axes, SUBLAYERS, strict=True):
        axis.set_title(TITLES[sublayer], fontsize=10)
        axis.set_xlabel(across)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("executed fraction of tokens")
    return figure, axes


def _named(routes: Any) -> dict[str, Routes]:
    """Records by label; equal labels are numbered."""
    if isinstance(routes, Mapping):
        found = dict(routes)
    else:
        several = [routes] if hasattr(routes, "by_sublayer") else list(routes)
        found = {}
        for each in several:
            label, number = each.label, 2
            while label in found:
                label, number = f"{each.label} ({number})", number + 1
            found[label] = each
    if not found:
        raise UserError("there are no routes to draw; record some by python -m dyndepth.routes")
    return found


def _line(axis: Axes, x: Any, y: Any, number: int, label: str) -> None:
    axis.plot(
        x, y, label=label, color=COLOURS[number % len(COLOURS)], linewidth=1.4, markersize=4,
        marker=MARKERS[number % len(MARKERS)],
        linestyle=DASHES[(number + number // len(COLOURS)) % len(DASHES)],
    )  # fmt: skip


def _finished(figure: Figure, axes: Sequence[Axes], path: str | Path | None) -> Figure:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False,
        fontsize=8,
    )  # fmt: skip
    return _written(figure, path)


def _points(
    curve: Sequence[Mapping[str, Any]], name: str, across: str
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (row.get(across, step), row[name])
        for step, row in enumerate(curve, start=1)
        if row.get(name) is not None and np.isfinite(row[name])
    ]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the values, shorter at both ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        import warnings

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Tokens of other scripts than the font has are drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(path)
    return figure
