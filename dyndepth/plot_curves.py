"""Figures of scores against what was saved, and of saved arithmetic against saved time.

Up to ``TOGETHER`` curves share a panel with their legend beside it; more get a panel each, with all
others in gray behind, so that twenty can be told apart as well as one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dyndepth.errors import UserError
from dyndepth.plot_parts import (
    BLUE,
    DENSE,
    FRONT,
    GRAY,
    IDEAL,
    INK,
    ORANGE,
    OTHERS,
    VERMILION,
    draw_curve,
    figure_of,
    grid,
    in_order,
    legend_below,
    scale_of,
    style,
    wrapped,
    written,
)
from dyndepth.plot_points import (
    LOWER_IS_BETTER,
    METRICS,
    on_front,
    points,
    reference,
    usable,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOGETHER = 8
"""Curves that one panel holds."""
ACROSS = {
    "block_speedup": "achieved block FLOPs speedup, dense / executed (×)",
    "total_speedup": "achieved total FLOPs speedup, dense / executed (×)",
    "block_fraction": "executed share of dense's block FLOPs",
    "wall_prefill_speedup": "measured prefill speedup, dense / method time (×)",
    "wall_decode_speedup": "measured decode speedup, dense / method time (×)",
}
_INTERVALS = "95% intervals over documents, seeds included"


def accuracy_vs_flops(
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    metric: str = "mean_acc",
    across: Literal["block_speedup", "total_speedup", "block_fraction"] = "block_speedup",
    title: str = "",
) -> Figure:
    """A score against the FLOPs speedup (or executed share) that was achieved, a line a method.

    ``table`` is a leaderboard, or one task of it (``plot_points.task_table``); ``metric`` one of
    its columns, with a band where ``metric_low`` and ``metric_high`` are. Dense is a gray line;
    bounds are dashed and hollow; competitors that no other beats in both are ringed and joined.
    Raises UserError where there is nothing to draw or rows can't stand together.
    """
    return _scores(table, path, metric, across, title)


def accuracy_vs_wallclock(
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    metric: str = "mean_acc",
    phase: Literal["prefill", "decode"] = "decode",
    title: str = "",
) -> Figure:
    """As ``accuracy_vs_flops``, against the wall speedup of ``phase`` with its interval.

    ``table`` is a leaderboard: wall speedups at its smallest batch and longest length.
    """
    across = f"wall_{phase}_speedup"
    ends = {f"wall_{phase}_{end}": f"{across}_{end}" for end in ("low", "high")}
    return _scores(table.rename(columns=ends), path, metric, across, title)


def _scores(
    table: pd.DataFrame, path: str | Path | None, metric: str, across: str, title: str
) -> Figure:
    found = points(table, metric, across)
    dense = usable(table, metric, across)
    dense = dense[reference(dense)]
    if found.empty:
        raise UserError("the table holds no method beside dense; there is nothing to compare")
    fraction, lower = across == "block_fraction", metric in LOWER_IS_BETTER
    found["front"] = on_front(found, lower, fraction)
    ylabel = METRICS.get(metric, metric) + (" (lower is better)" if lower else "")

    def backdrop(axis: Axes, ring: float) -> None:
        if len(dense):
            axis.axhline(dense[metric].mean(), color=GRAY, linewidth=1.2, zorder=1, label=DENSE)
        front = found[found["front"]].sort_values("x")
        axis.plot(
            front["x"], front["value"], color=INK, linewidth=0.8, linestyle=(0, (1, 1.5)),
            marker="o", markersize=ring, markerfacecolor="none", markeredgewidth=0.8, zorder=1.5,
            label=FRONT,
        )  # fmt: skip

    scale = scale_of(found, dense[metric], logarithmic=None if lower else False)
    note = _INTERVALS if (found["low"] < found["high"]).any() else ""
    return _drawn(found, backdrop, scale, ACROSS[across], ylabel, title, note, path)


def flops_vs_wallclock(
    timing: pd.DataFrame,
    path: str | Path | None = None,
    *,
    batch: int | None = None,
    length: int | None = None,
    title: str = "",
) -> Figure:
    """Wall speedup against total FLOPs speedup of the same forwards; on the diagonal all saved
    arithmetic became saved time.

    ``timing`` is timing.csv. Prefill and decode have a panel each (with many methods: two marks in
    every method's panel), at ``batch`` (default: the smallest) and ``length`` (default: the
    longest at that batch). Bars are 95% intervals over paired runs. Rows marked ``suspect`` are
    crossed out. Raises UserError where there is nothing to draw.
    """
    table = usable(timing, "wall_speedup", "total_speedup")
    batch = int(table["batch"].min()) if batch is None else batch
    table = table[table["batch"] == batch]
    length = int(table["length"].max()) if length is None and len(table) else length
    table = table[table["length"] == length]
    phases = {
        phase: points(table[table["phase"] == phase], "wall_speedup", "total_speedup")
        for phase in ("prefill", "decode")
        if (table["phase"] == phase).any()
    }
    phases = {phase: found for phase, found in phases.items() if len(found)}
    if not phases:
        raise UserError(f"no method beside dense was timed at batch {batch}, length {length}")
    suspect = table["suspect"].eq(True) if "suspect" in table else False
    for phase, found in phases.items():
        doubtful = table[(table["phase"] == phase) & suspect]
        pairs = set(zip(doubtful["label"], doubtful["target_speedup"], strict=True))
        found["suspect"] = [
            pair in pairs for pair in zip(found["label"], found["target_speedup"], strict=True)
        ]
    title = title or f"Batch {batch}, {length} tokens"
    return _times(phases, title, path)


def _times(phases: dict[str, pd.DataFrame], title: str, path: str | Path | None) -> Figure:
    import pandas as pd

    together = pd.concat(phases.values())
    scale = scale_of(together, square=True)
    xlabel, ylabel = "total FLOPs speedup (×)", "wall speedup (×)"
    curves = together["label"].unique()
    if len(curves) > TOGETHER:
        order = together.drop_duplicates("label").sort_values("number")["label"].astype(str)
        figure, panels = grid(len(order), ylabel, square=True)
        for axis, label in zip(panels, order, strict=True):
            for number, (phase, found) in enumerate(phases.items()):
                others = found[found["label"] != label]
                axis.plot(others["x"], others["value"], ".", color=GRAY, markersize=2, zorder=1)
                look = style(number) | {"color": (BLUE, ORANGE)[number]}
                draw_curve(axis, found[found["label"] == label], look, phase, bars=True)
            _ideal(axis)
            axis.set_title(wrapped(label), fontsize=8)
    else:
        figure = figure_of(4.0 * len(phases) + 0.6, 4.6)
        panels = list(np.atleast_1d(figure.subplots(1, len(phases), sharex=True, sharey=True)))
        for axis, (phase, found) in zip(panels, phases.items(), strict=True):
            _ideal(axis)
            for _, own in found.groupby("number"):
                bound = bool(own["bound"].any())
                name = f"{own['label'].iloc[0]}" + (" (bound)" if bound else "")
                draw_curve(axis, own, style(int(own["number"].iloc[0]), bound), name, bars=True)
            axis.set_title(phase, fontsize=10)
            axis.set_xlabel(xlabel)
        panels[0].set_ylabel(ylabel)
    entries: dict[str, Any] = {}
    for axis in panels:
        scale(axis)
        entries |= in_order(axis)
    title += "; bars: 95% intervals over paired runs"
    figure.suptitle(title, fontsize=10)
    legend_below(figure, entries, across=xlabel if len(curves) > TOGETHER else "")
    return written(figure, path)


def _ideal(axis: Axes) -> None:
    axis.axline((1, 1), slope=1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1,
                label=IDEAL)  # fmt: skip
    axis.axhline(1, color=GRAY, linewidth=1.2, zorder=1, label=DENSE)


# --- curves on panels ---------------------------------------------------------------------------


def _drawn(
    found: pd.DataFrame,
    backdrop: Callable[[Axes, float], None],
    scale: Callable[[Axes], None],
    xlabel: str,
    ylabel: str,
    title: str,
    note: str,
    path: str | Path | None,
) -> Figure:
    """The curves of ``found`` over ``backdrop``: in one panel if they are few, else one each."""
    curves = [own for _, own in found.groupby("number")]
    if len(curves) <= TOGETHER:
        figure = figure_of(7.4, 4.2)
        panels = [figure.subplots()]
        backdrop(panels[0], 10)
        for own in curves:
            bound = bool(own["bound"].any())
            name = str(own["label"].iloc[0]) + (" (bound)" if bound else "")
            look = style(int(own["number"].iloc[0]), bound)
            draw_curve(panels[0], own, look, wrapped(name), bars=len(own) == 1)
        panels[0].set_xlabel(xlabel)
        panels[0].set_ylabel(ylabel)
        entries = in_order(panels[0])
        figure.legend(
            list(entries.values()), list(entries), loc="outside right upper", frameon=False,
            fontsize=8, handlelength=3, labelspacing=0.8,
        )  # fmt: skip
    else:
        figure, panels = grid(len(curves), ylabel)
        entries = {}
        for axis, own in zip(panels, curves, strict=True):
            backdrop(axis, 6)
            for other in curves:
                axis.plot(other["x"], other["value"], color=GRAY, linewidth=0.5, alpha=0.6,
                          zorder=0.5, label=OTHERS)  # fmt: skip
            bound = bool(own["bound"].any())
            look = style(0, bound) | {"color": VERMILION if bound else BLUE}
            draw_curve(axis, own, look, "bound" if bound else "competitor", bars=len(own) == 1)
            axis.set_title(wrapped(str(own["label"].iloc[0])), fontsize=8)
            entries |= in_order(axis)
        legend_below(figure, entries, columns=5, across=xlabel)
    for axis in panels:
        scale(axis)
    heading = "; ".join(part for part in (title, note) if part)
    if len(panels) == 1:
        panels[0].set_title(heading, fontsize=9, loc="left")
    elif heading:
        figure.suptitle(heading, fontsize=10)
    return written(figure, path)
