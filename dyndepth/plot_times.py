"""Figures of saved arithmetic against saved time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dyndepth.common.errors import UserError
from dyndepth.plot_curves import TOGETHER
from dyndepth.plot_headings import conditions, head, intervals
from dyndepth.plot_parts import (
    BLUE,
    DENSE,
    GRAY,
    IDEAL,
    INK,
    ORANGE,
    PAGE,
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
from dyndepth.plot_points import points, usable
from dyndepth.plot_targets import label_targets

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MARKS = 7
"""Marks with their targets that one panel holds."""
_ACROSS, _UP = "total FLOPs speedup, dense / executed (×)", "wall speedup, dense / method time (×)"


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
    longest at that batch). Target speedups stand beside the marks. Bars are 95% intervals over
    paired runs. Rows marked ``suspect`` are crossed out. Raises UserError where there is nothing
    to draw.
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
    title = title or f"saved FLOPs and saved time; {conditions(table, str(batch), str(length))}"
    return written(_drawn(phases, table, title), path)


def _drawn(phases: dict[str, pd.DataFrame], table: pd.DataFrame, title: str) -> Figure:
    import pandas as pd

    together = pd.concat(phases.values())
    scale = scale_of(together, square=True)
    order = together.drop_duplicates("label").sort_values("number")["label"].astype(str)
    shown: list[list[pd.DataFrame]]
    if many := len(order) > TOGETHER or max(map(len, phases.values())) > _MARKS:
        figure, panels = grid(len(order), _UP, square=True)
        shown = [[found[found["label"] == label] for found in phases.values()] for label in order]
        for axis, label in zip(panels, order, strict=True):
            for number, (phase, found) in enumerate(phases.items()):
                others = found[found["label"] != label]
                axis.plot(others["x"], others["value"], ".", color=GRAY, markersize=2, zorder=1)
                look = style(number) | {"color": (BLUE, ORANGE)[number], "markersize": 4}
                draw_curve(axis, found[found["label"] == label], look, phase, bars=True)
            _ideal(axis)
            axis.set_title(wrapped(label, 26), fontsize=7.5)
    else:
        figure = figure_of(PAGE if len(phases) > 1 else 0.6 * PAGE, 4.4)
        panels = list(np.atleast_1d(figure.subplots(1, len(phases), sharex=True, sharey=True)))
        shown = [[own for _, own in found.groupby("number")] for found in phases.values()]
        for axis, (phase, found) in zip(panels, phases.items(), strict=True):
            _ideal(axis)
            for _, own in found.groupby("number"):
                bound = bool(own["bound"].any())
                name = f"{own['label'].iloc[0]}" + (" (bound)" if bound else "")
                draw_curve(axis, own, style(int(own["number"].iloc[0]), bound), name, bars=True)
            axis.set_title(phase, fontsize=9)
            axis.set_xlabel(_ACROSS, fontsize=8)
            axis.tick_params(labelsize=8)
        panels[0].set_ylabel(_UP, fontsize=8)
    for axis in panels:
        scale(axis)
    head(
        figure,
        table,
        title,
        intervals(together, "Bars", "paired runs"),
        "Beside the marks: target speedups",
    )
    legend_below(figure, in_order(panels), columns=3, across=_ACROSS if many else "")
    figure.draw_without_rendering()
    for axis, curves in zip(panels, shown, strict=True):
        label_targets(axis, curves)
    return figure


def _ideal(axis: Axes) -> None:
    axis.axline((1, 1), slope=1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1,
                label=IDEAL)  # fmt: skip
    axis.axhline(1, color=GRAY, linewidth=1.2, zorder=1, label=DENSE)
