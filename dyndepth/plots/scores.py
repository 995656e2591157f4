"""Figures of scores against what was saved: FLOPs as counted, or wall-clock as measured.

Up to ``TOGETHER`` curves share a panel with their legend below it; more get a panel each, with all
others in gray behind, so that twenty can be told apart as well as one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dyndepth.cells import naming
from dyndepth.cells.cell import DENSE
from dyndepth.cells.recipe import NONE
from dyndepth.cells.times import one_each
from dyndepth.common.errors import UserError
from dyndepth.common.modes import EAGER, Mode
from dyndepth.plots.labels import label_targets
from dyndepth.plots.runs import by_run
from dyndepth.plots.style import (
    BLUE,
    CHANCE,
    DOUBTS,
    FRONT,
    GRAY,
    IDEAL,
    INK,
    ORANGE,
    OTHERS,
    PAGE,
    VERMILION,
    conditions,
    draw_curve,
    figure_of,
    grid,
    head,
    in_order,
    intervals,
    is_logarithmic,
    legend_below,
    of_all,
    scale_of,
    style,
    wrapped,
    written,
)
from dyndepth.plots.tables import (
    LOWER_IS_BETTER,
    MEANS,
    METRICS,
    SAME_BUDGET,
    chance_of,
    mark_doubts,
    on_front,
    points,
    reference,
    spread,
    usable,
)
from dyndepth.results.noise import loaded

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
_RULE = (
    "Ringed: no competitor with the same recovery scores better at as few FLOPs (differences below "
    f"{SAME_BUDGET:.0%} count as none)"
)
_CHANCE, _OPEN = "Chance: mean of 1 / choices", ", 0 for a task that offers none"
_RINGS, _DOTS = ("o", "s", "D"), ((0, (1, 1.5)), (0, (3, 1.5)), (0, (5, 1.5, 1, 1.5)))
"""Of the fronts of one recovery after another."""
_DENSE = ("-", (0, (7, 2)), (0, (4, 2, 1, 2)), (0, (1, 2)))
"""Lines of dense of one run after another."""
_TITLE = 26
"""Letters in a line of a small panel's title."""


def accuracy_vs_flops(
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    metric: str = "mean_acc",
    across: Literal["block_speedup", "total_speedup", "block_fraction"] = "block_speedup",
    title: str = "",
) -> Figure:
    """A score against the FLOPs speedup (or executed share) that was achieved, a line a method.

    ``table`` is a leaderboard, or one task of it (``tables.task_table``); ``metric`` one of
    its columns, with a band where ``metric_low`` and ``metric_high`` are. Dense is a gray line in
    the band of its interval; a thin line is chance, where the table knows it; bounds are dashed and
    hollow. Competitors that no other with the same recovery beats in both are ringed and joined,
    those whose interval holds chance left out, and all where dense's does. Raises UserError where
    there is nothing to draw or rows can't stand together.
    """
    return _scores(table, path, metric, across, title, front=True)


def accuracy_vs_wallclock(
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    metric: str = "mean_acc",
    phase: Literal["prefill", "decode"] = "decode",
    title: str = "",
) -> Figure:
    """As ``accuracy_vs_flops``, against the wall speedup of ``phase`` with its interval.

    ``table`` is a leaderboard: wall speedups in eager mode, of the shape that it names.
    Targets stand beside the marks; there is no front, since both values of a point are uncertain.
    """
    across = f"wall_{phase}_speedup"
    ends = {f"wall_{phase}_{end}": f"{across}_{end}" for end in ("low", "high")}
    table = table.rename(columns=ends)
    timed = usable(table, metric, across)
    about = conditions(timed, of_all(timed, "wall_batch"), of_all(timed, "wall_length"))
    heading = f"{title or _named(timed, metric)}, by {phase} time"
    heading += f"; {about}" if about else ""
    return _scores(table, path, metric, across, heading, front=False)


def _scores(
    table: pd.DataFrame, path: str | Path | None, metric: str, across: str, title: str, front: bool
) -> Figure:
    found = points(table, metric, across)
    dense = usable(table, metric, across)
    timed = across.removeprefix("wall_").removesuffix("_speedup") if not front else ""
    for doubt in DOUBTS if timed else ():
        column = dense.get(f"wall_{doubt}")
        mark_doubts(found, dense, doubt, None if column is None else column.map(_names(timed)))
    dense = dense[reference(dense)]
    if found.empty:
        raise UserError("the table holds no method beside dense; there is nothing to compare")
    fraction, lower = across == "block_fraction", metric in LOWER_IS_BETTER
    chance = chance_of(table, metric, dense["mean_acc"].mean() if "mean_acc" in dense else 1.0)
    # Value and ends of each run's interval; nothing where there is no dense.
    full = {run: spread(own, metric) for run, own in by_run(dense)} if len(dense) else {}
    by_chance = chance is not None and any(low <= chance <= high for _, low, high in full.values())
    banded = any(low < high for _, low, high in full.values())
    several = "run" in table and table["run"].nunique() > 1
    found["front"] = False
    if front and not by_chance and not several:
        found["front"] = on_front(found, lower, fraction, chance)
    through = [
        *(end for ends in full.values() for end in ends),
        *([] if chance is None else [chance]),
    ]
    logarithmic = lower and is_logarithmic([*found["value"], *dense[metric]])
    scale = scale_of(found, through, logarithmic=logarithmic)

    whole = found["recovery"].nunique()

    def backdrop(axis: Axes, ring: float, recoveries: list[str]) -> None:
        for place, (run, (value, low, high)) in enumerate(full.items()):
            axis.axhline(value, color=GRAY, linewidth=1.2, zorder=1, linestyle=_DENSE[place % 4],
                         label=f"{DENSE} ({run})" if run else DENSE)  # fmt: skip
            if low < high:
                axis.axhspan(low, high, color=GRAY, alpha=0.18, linewidth=0, zorder=0.3)
        if chance is not None:
            axis.axhline(chance, color=INK, linewidth=0.7, linestyle=(0, (9, 3)), zorder=1,
                         label=CHANCE)  # fmt: skip
        for recovery, marker, dots in zip(recoveries, _RINGS, _DOTS, strict=False):
            own = found[found["front"] & (found["recovery"] == recovery)].sort_values("x")
            if len(own):
                axis.plot(
                    own["x"], own["value"], color=INK, linewidth=0.8, linestyle=dots,
                    marker=marker, markersize=ring, markerfacecolor="none", markeredgewidth=0.8,
                    zorder=1.5, label=_front_of(recovery, len(recoveries), whole),
                )  # fmt: skip

    xlabel = ACROSS[across]
    ylabel = METRICS.get(metric, metric)
    about = ["lower is better"] * lower + ["log scale"] * logarithmic
    ylabel += f" ({', '.join(about)})" if about else ""
    curves = [own for _, own in found.groupby("number")]
    recoveries = sorted(set(found["recovery"]), key=lambda name: (name != NONE, name))
    many = len(curves) > TOGETHER
    if not many:
        runs = table["run_told"].nunique() if "run_told" in table else 0
        figure = figure_of(PAGE, 4.8 + 0.3 * runs)
        panels = [figure.subplots()]
        backdrop(panels[0], 10, recoveries)
        for own in curves:
            bound = bool(own["bound"].any())
            name = str(own["label"].iloc[0]) + (" (bound)" if bound else "")
            look = style(int(own["number"].iloc[0]), bound)
            draw_curve(panels[0], own, look, wrapped(name), bars=len(own) == 1)
        panels[0].set_xlabel(xlabel)
        panels[0].set_ylabel(ylabel)
    else:
        figure, panels = grid(len(curves), ylabel)
        for axis, own in zip(panels, curves, strict=True):
            # A method is held against those with the same recovery.
            backdrop(axis, 5, list(own["recovery"].unique()))
            for other in curves:
                axis.plot(other["x"], other["value"], color=GRAY, linewidth=0.5, alpha=0.6,
                          marker="." if len(other) == 1 else "", markersize=2, zorder=0.5,
                          label=OTHERS)  # fmt: skip
            bound = bool(own["bound"].any())
            look = style(0, bound) | {"color": VERMILION if bound else BLUE, "markersize": 3.5}
            draw_curve(axis, own, look, "bound" if bound else "competitor", bars=len(own) == 1)
            axis.set_title(wrapped(str(own["label"].iloc[0]), _TITLE), fontsize=7.5)
    for axis in panels:
        scale(axis)
    shape = "Bars" if not front or (found.groupby("number").size() == 1).all() else "Bands"
    head(
        figure,
        table,
        title or _named(table, metric),
        intervals(found, shape),
        "Gray band: dense's interval" if banded else "",
        _CHANCE + _OPEN * (metric in MEANS) if chance is not None else "",
        _RULE + (", none whose interval holds chance" if chance is not None else "")
        if found["front"].any()
        else _no_front(by_chance, several) * front,
        "" if front else "Beside the marks: target speedups",
    )
    legend_below(figure, in_order(panels), across=xlabel if many else "")
    if not front:
        figure.draw_without_rendering()
        shown = [[own] for own in curves] if many else [curves]
        for axis, marked in zip(panels, shown, strict=True):
            label_targets(axis, marked)
    return written(figure, path)


def _names(key: str) -> Callable[[Any], bool]:
    """Whether a leaderboard's entry, ``prefill, decode``, names ``key``."""
    return lambda text: isinstance(text, str) and key in text.split(", ")


def _no_front(by_chance: bool, several: bool) -> str:
    if several:
        return "No Pareto front: the runs' settings differ"
    return "No Pareto front: dense's own interval holds chance" * by_chance


def _named(table: pd.DataFrame, metric: str) -> str:
    """What is shown, with the names of the tasks that go into a mean."""
    tasks = of_all(table, "accuracy_tasks") if metric in MEANS else ""
    name = METRICS.get(metric, metric)
    return f"{name.removeprefix('mean ')}, mean over {tasks}" if tasks else name


def _front_of(recovery: str, here: int, whole: int) -> str:
    """A front's name where ``here`` of ``whole`` recoveries have theirs in the same panel."""
    if whole == 1:
        return FRONT
    short = naming.recovered({"recovery": recovery})
    return f"{FRONT}, recovery {short}" if here > 1 else f"{FRONT}, same recovery"


_MARKS = 7
"""Marks with their targets that one panel holds."""
_ACROSS, _UP = "total FLOPs speedup, dense / executed (×)", "wall speedup, dense / method time (×)"


def flops_vs_wallclock(
    timing: pd.DataFrame,
    path: str | Path | None = None,
    *,
    batch: int | None = None,
    length: int | None = None,
    mode: Mode = EAGER,
    title: str = "",
) -> Figure:
    """Wall speedup against total FLOPs speedup of the same forwards; on the diagonal all saved
    arithmetic became saved time.

    ``timing`` is timing.csv. Prefill and decode have a panel each (with many methods: two marks in
    every method's panel), at ``batch`` (default: the smallest) and ``length`` (default: the
    longest at that batch), in one ``mode``. Target speedups stand beside the marks. Bars are 95%
    intervals over paired runs. Rows that are ``suspect``, or were timed on a loaded machine, are
    marked. Raises UserError where there is nothing to draw.
    """
    if "mode" in timing:
        timing = timing[timing["mode"].fillna(EAGER) == mode]
    timing = _one_each(timing)
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
    for phase, found in phases.items():
        own = table[table["phase"] == phase]
        mark_doubts(found, own, "suspect", own["suspect"].eq(True) if "suspect" in own else None)
        mark_doubts(found, own, "loaded", own.apply(loaded, axis=1))
    named = "" if mode == EAGER else f" in {mode} mode"
    about = conditions(table, str(batch), str(length))
    title = title or f"saved FLOPs and saved time{named}; {about}"
    return written(_drawn(phases, table, title), path)


def _one_each(timing: pd.DataFrame) -> pd.DataFrame:
    """Of each cell one row a shape and phase; see ``times.one_each``."""
    plain = timing.astype(object).where(timing.notna(), None).assign(at=range(len(timing)))
    plain = plain[plain["wall_speedup"].notna()]
    chosen = [
        row["at"]
        for _, own in plain.groupby(["cell", "label"], observed=True)
        for row in one_each([{str(k): v for k, v in row.items()} for row in own.to_dict("records")])
    ]
    return timing.iloc[sorted(chosen)]


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
