"""Figures of fitting: training curves, and how important each block is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndepth.common.errors import UserError
from dyndepth.plots.style import (
    COLOURS,
    TITLES,
    VERMILION,
    entries_of,
    figure_of,
    line,
    whole_numbers,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_FIRST = "first quarter to go, in this order"
_STROKES = ("-", "--", "-.")


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
    figure = figure_of(6.4, 2.4 * len(panels) + 0.4)
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axis, names in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            x, y = points[name]
            if name not in present:
                continue
            fainter = len(x) > 40 and name != "wanted"
            style = {"color": COLOURS[number], "linestyle": _STROKES[number]}
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
    whole_numbers(axes[-1].xaxis)
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    if title:
        figure.suptitle(title, fontsize=10)
    return written(figure, path)


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
    figure = figure_of(9.0, 0.7 + 2.5 * height)
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for axis in panels[len(shown) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis, (name, rows) in zip(panels, shown.items(), strict=False):
        _importance_panel(axis, rows)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel(labels.get(name, "score"))
        axis.set_xlabel("block (0 is next to the embedding)")
        handles |= entries_of(axis)
    handles[_FIRST] = handles.pop(_FIRST)  # last
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
        fontsize=8,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return written(figure, path)


def _importance_panel(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """One criterion: a line for each kind of unit, rings around the first quarter to go."""
    for kind, number in (("block", 2), ("attention", 0), ("mlp", 1)):
        part = sorted((row["layer"], row["score"]) for row in rows if row["sublayer"] == kind)
        if part:
            points = np.array(part)
            line(axis, points[:, 0], points[:, 1], number, TITLES.get(kind, "Block"))
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
    whole_numbers(axis.xaxis)


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
