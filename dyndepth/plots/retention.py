"""Figures of what is lost: how far methods stay below the bounds, and what each task retains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dyndepth.common.errors import UserError
from dyndepth.plots.runs import by_run
from dyndepth.plots.scores import ACROSS, TOGETHER
from dyndepth.plots.style import (
    GRAY,
    INK,
    PAGE,
    SKIPPED,
    draw_curve,
    figure_of,
    grid,
    head,
    in_order,
    intervals,
    legend_below,
    scale_of,
    style,
    wrapped,
    written,
)
from dyndepth.plots.tables import (
    LOWER_IS_BETTER,
    METRICS,
    labelled,
    main_metric,
    mark_doubts,
    points,
    reference,
    task_table,
    usable,
)
from dyndepth.results.statistics.intervals import LEAST

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure


_ACROSS = 3
"""Heatmaps beside each other on a page."""
_ROW = 0.25  # inches of a heatmap's row
_NAME = 24  # letters in a line of a row's name


def gaps(
    table: pd.DataFrame, metric: str = "mean_acc", across: str = "block_speedup"
) -> pd.DataFrame:
    """How much better each bound is than each competitor at the competitor's achieved budget.

    ``table`` is of one task (``tables.task_table``): a bound spends more on one task and less
    on another, so that what it executed over all says nothing of a score on one.

    One row a competitor's point and bound: the columns of ``tables.points``, and ``bound_by``
    (the bound's label), ``bound_value``, ``gap`` (positive where the bound is better, in units of
    ``metric``) with ``gap_low`` and ``gap_high``: the competitor's own 95% interval; the bound's is
    not in it. A bound's curve starts at dense and is linear in the executed share between its
    points; it may spend less than its budget, so it never gets worse with more. Points beyond its
    measured range are left out. Raises UserError without a bound, or where none can be compared.
    """
    if len(by_run(table)) > 1:
        raise UserError(
            "a bound is held against methods of its own run; draw each run's own figure"
        )
    found = points(table, metric, across)
    bounds, own = found[found["bound"]], found[~found["bound"]]
    if bounds.empty:
        raise UserError("the table holds no bound to compare with")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    dense = usable(table, metric, across)
    dense = dense[reference(dense)]
    rows = []
    for label, curve in bounds.groupby("label", observed=True, sort=False):
        x = [*curve["x"], *dense[across]]
        value = [*curve["value"], *dense[metric]]
        shares = 1 / np.array(x)
        order = np.argsort(shares)
        shares, best = shares[order], np.maximum.accumulate(sign * np.array(value)[order])
        for point in own.to_dict("records"):
            share = 1 / point["x"]
            if not shares[0] - 1e-9 <= share <= shares[-1] + 1e-9:
                continue
            above = sign * float(np.interp(share, shares, best))
            ends = sorted(sign * (above - point[end]) for end in ("low", "high"))
            rows.append(
                point
                | {"bound_by": label, "bound_value": above, "gap": sign * (above - point["value"])}
                | {"gap_low": ends[0], "gap_high": ends[1]}
            )
    import pandas as pd

    if not rows:
        raise UserError(
            "no competitor achieved a budget at which a bound was measured; sweep both over the "
            "same target speedups"
        )
    return pd.DataFrame(rows)


def bound_gap(
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    metric: str = "mean_acc",
    across: Literal["block_speedup", "total_speedup"] = "block_speedup",
    title: str = "",
) -> Figure:
    """``gaps`` over the achieved speedup: a panel a bound with a line a method, or, with many
    methods, a panel a method with a line a bound.

    Raises UserError as ``gaps`` does.
    """
    found = gaps(table, metric, across)
    found = found.assign(value=found["gap"], low=found["gap_low"], high=found["gap_high"])
    ylabel = f"bound ahead by, {METRICS.get(metric, metric)}"
    names, bounds = list(dict.fromkeys(found["label"])), list(dict.fromkeys(found["bound_by"]))
    many = len(names) > TOGETHER
    count = len(names) if many else len(bounds)
    if many or count > 3:
        figure, panels = grid(count, ylabel)
    else:
        figure = figure_of(PAGE, 4.4)
        panels = list(np.atleast_1d(figure.subplots(1, count, sharex=True, sharey=True)))
        panels[0].set_ylabel(ylabel)
    scale = scale_of(found, [0.0], logarithmic=False)
    for axis, name in zip(panels, names if many else bounds, strict=True):
        part = found[found["label" if many else "bound_by"] == name]
        axis.axhline(0, color=GRAY, linewidth=1.2, zorder=1, label="as good as the bound")
        for label, own in part.groupby("bound_by" if many else "label", observed=True, sort=False):
            number = bounds.index(label) if many else int(own["number"].iloc[0])
            draw_curve(axis, own, style(number, bound=many), wrapped(str(label), 44), bars=True)
        axis.set_title(wrapped(str(name), 26 if many else 30), fontsize=7.5)
        scale(axis)
    name = METRICS.get(metric, metric)
    heading = f"{title or name}, how far a bound is ahead at the same budget"
    head(figure, table, heading, intervals(found, "Bars, the method's own"))
    legend_below(figure, in_order(panels), columns=3, across=ACROSS[across])
    return written(figure, path)


def retained_by_task(
    accuracy: pd.DataFrame,
    compute: pd.DataFrame,
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Figure:
    """What each task retains of dense: a heatmap a task, methods by target speedups, in percent.

    Each task's main metric (``tables.MAIN``) divided by dense's; where lower is better,
    dense's divided by the method's, so that less is worse in every panel (comparison.csv always
    divides by dense's). Seeds are averaged; a dash stands where nothing was measured, nothing where
    there were fewer documents than an interval needs. Targets of 1
    are left out. Raises UserError where there is nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    table = retained(accuracy, compute)
    table = table[table["target_speedup"] > 1]
    if table.empty:
        raise UserError("no method was run at a target speedup above 1")
    tasks = list(dict.fromkeys(table["task"]))
    names = list(dict.fromkeys(table.sort_values("number")["label"]))
    targets = sorted(set(table["target_speedup"]))
    columns = min(_ACROSS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = figure_of(max(4.0, PAGE * columns / _ACROSS), rows * (_ROW * len(names) + 0.6) + 1.3)
    cells = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    # The last row is full: it alone has the targets.
    first = columns - (rows * columns - len(tasks))
    for axis in cells[0, first:]:
        axis.remove()
    panels = [*cells[0, :first], *cells[1:].flatten()]
    colours = ScalarMappable(Normalize(0, 100), colormaps["cividis"])
    for axis, task in zip(panels, tasks, strict=True):
        part = table[table["task"] == task]
        few = set(zip(*(part.loc[part["few"], key] for key in ("label", "target_speedup")),
                      strict=True))  # fmt: skip
        values = part.pivot(index="label", columns="target_speedup", values="retained")
        values = 100 * values.reindex(index=names, columns=targets)
        axis.pcolormesh(values, cmap=colours.cmap, norm=colours.norm, edgecolor="white",
                        linewidth=0.5)  # fmt: skip
        for (row, column), value in np.ndenumerate(values.to_numpy()):
            missing = bool(np.isnan(value))
            short = (names[row], targets[column]) in few
            dash = "" if short else "–"
            axis.text(
                column + 0.5, row + 0.5, dash if missing else f"{value:.0f}", fontsize=7,
                ha="center", va="center", color=INK if missing else _ink_on(colours, value),
            )  # fmt: skip
        metric = part["metric"].iloc[0]
        ratio = "dense / method" if metric in LOWER_IS_BETTER else "method / dense"
        name = METRICS.get(metric, metric)
        axis.set_title(f"{wrapped(task, 30)}\n{name}, {ratio}, %", fontsize=7.5)
        axis.set_facecolor(SKIPPED)
        axis.set_xticks(np.arange(len(targets)) + 0.5, [f"{t:g}×" for t in targets])
        axis.set_yticks(np.arange(len(names)) + 0.5, [wrapped(name, _NAME) for name in names])
        axis.tick_params(labelsize=7, length=0)
        axis.tick_params(axis="x", labelrotation=90 if len(targets) > 6 else 0)
    panels[0].set_ylim(len(names), 0)
    for axis in cells[-1]:
        axis.set_xlabel("target block FLOPs speedup", fontsize=7.5)
    head(
        figure,
        accuracy,
        title or "what each task retains of dense's score",
        "Dash: not measured" if _any_missing(table, tasks, names, targets) else "",
        f"Empty: fewer than {LEAST} documents" if table["few"].any() else "",
    )
    bar = figure.colorbar(
        colours,
        ax=panels,
        location="bottom",
        extend="max",
        aspect=50,
        shrink=0.7,
    )
    bar.set_label("% of dense's score retained", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    return written(figure, path)


def _ink_on(colours: ScalarMappable, value: float) -> str:
    """Black or white, whichever stands out more from a value's colour (relative luminance)."""
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
        for part in colours.to_rgba(np.array([value]))[0, :3]
    )
    # Here black and white have the same contrast.
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _any_missing(
    table: pd.DataFrame, tasks: list[str], names: list[str], targets: list[float]
) -> bool:
    return len(table) < len(tasks) * len(names) * len(targets)


def retained(accuracy: pd.DataFrame, compute: pd.DataFrame) -> pd.DataFrame:
    """One row a task, curve and target: ``task``, ``metric``, ``label``, ``number``, ``bound``,
    ``target_speedup``, ``retained`` (see ``retained_by_task``) and ``few``: True where one of the
    two has too few documents for a share to mean something; ``retained`` is empty there.

    Raises UserError if no task has scores of both dense and another method.
    """
    import pandas as pd

    accuracy = labelled(accuracy)
    parts = []
    tasks = accuracy["task"].dropna().unique()
    runs = [(task, own) for task in tasks for _, own in by_run(accuracy[accuracy["task"] == task])]
    for task, rows in runs:
        metric = main_metric(rows, task)
        table = task_table(rows, compute, task, metric)
        dense = table.loc[reference(table), metric].mean()
        found = points(table, metric, "block_speedup")
        if not found.empty and dense > 0:
            ratio = dense / found["value"] if metric in LOWER_IS_BETTER else found["value"] / dense
            found = found.assign(task=task, metric=metric)
            short = table["n"] < LEAST
            # A share of dense needs dense's documents, too.
            mark_doubts(found, table, "few", short | bool(short[reference(table)].any()))
            parts.append(found.assign(retained=ratio.mask(found["few"])))
    if not parts:
        raise UserError("no task has scores of both dense and another method")
    return pd.concat(parts, ignore_index=True)
