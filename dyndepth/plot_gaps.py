"""Figures of what is lost: how far methods stay below the bounds, and what each task retains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dyndepth.errors import UserError
from dyndepth.plot_curves import ACROSS, TOGETHER
from dyndepth.plot_parts import (
    GRAY,
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
    labelled,
    main_metric,
    points,
    reference,
    task_table,
    usable,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ROW, _COLUMN = 0.27, 0.5  # inches of a heatmap's cell


def gaps(
    table: pd.DataFrame, metric: str = "mean_acc", across: str = "block_speedup"
) -> pd.DataFrame:
    """How much better each bound is than each competitor at the competitor's achieved budget.

    One row a competitor's point and bound: the columns of ``plot_points.points``, and ``bound_by``
    (the bound's label), ``bound_value``, ``gap`` (positive where the bound is better, in units of
    ``metric``) with ``gap_low`` and ``gap_high``: the competitor's own 95% interval; the bound's is
    not in it. A bound's curve starts at dense and is linear in the executed share between its
    points; it may spend less than its budget, so it never gets worse with more. Points beyond its
    measured range are left out. Raises UserError without a bound, or where none can be compared.
    """
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
        figure = figure_of(max(5.6, 3.6 * count + 0.6), 4.2)
        panels = list(np.atleast_1d(figure.subplots(1, count, sharex=True, sharey=True)))
        panels[0].set_ylabel(ylabel)
    scale = scale_of(found, [0.0], logarithmic=False)
    entries: dict[str, Any] = {}
    for axis, name in zip(panels, names if many else bounds, strict=True):
        part = found[found["label" if many else "bound_by"] == name]
        axis.axhline(0, color=GRAY, linewidth=1.2, zorder=1, label="as good as the bound")
        for label, own in part.groupby("bound_by" if many else "label", observed=True, sort=False):
            number = bounds.index(label) if many else int(own["number"].iloc[0])
            draw_curve(axis, own, style(number, bound=many), wrapped(str(label), 44), bars=True)
        axis.set_title(wrapped(str(name)), fontsize=8)
        scale(axis)
        entries |= in_order(axis)
    heading = "; ".join(filter(None, (title, "bars: the method's own 95% interval")))
    figure.suptitle(heading, fontsize=9)
    legend_below(figure, entries, columns=3, across=ACROSS[across])
    return written(figure, path)


def retained_by_task(
    accuracy: pd.DataFrame,
    compute: pd.DataFrame,
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Figure:
    """What each task retains of dense: a heatmap a task, methods by target speedups, in percent.

    Each task's main metric (``plot_points.MAIN``) divided by dense's; where lower is better,
    dense's divided by the method's. Seeds are averaged; a dot stands where nothing was measured.
    Raises UserError where there is nothing to draw.
    """
    import seaborn

    table = retained(accuracy, compute)
    tasks = list(dict.fromkeys(table["task"]))
    names = list(dict.fromkeys(table.sort_values("number")["label"]))
    targets = sorted(set(table["target_speedup"]))
    rows, columns = len(names), len(targets)
    widest = max(map(len, names)) * 0.075
    width = widest + len(tasks) * (max(_COLUMN * columns, 1.5) + 0.2) + 1.0
    figure = figure_of(width, 1.5 + max(_ROW * rows, 0.8))
    panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
    for axis, task in zip(panels, tasks, strict=True):
        part = table[table["task"] == task]
        values = part.pivot(index="label", columns="target_speedup", values="retained")
        values = values.reindex(index=names, columns=targets)
        seaborn.heatmap(
            values, ax=axis, cmap="cividis", vmin=0, vmax=1, cbar=False, linewidths=0.5,
            annot=values.map(lambda v: "·" if np.isnan(v) else f"{100 * v:.0f}"), fmt="",
            annot_kws={"fontsize": 7}, xticklabels=[f"{t:g}×" for t in targets],
            yticklabels=names,
        )  # fmt: skip
        axis.set_title(
            f"{wrapped(task, 20)}\n{METRICS.get(part['metric'].iloc[0], '')}", fontsize=8
        )
        axis.set(xlabel="", ylabel="")
        axis.tick_params(labelsize=8, length=0)
        axis.tick_params(axis="x", labelrotation=90 if columns > 6 else 0)
        axis.tick_params(axis="y", labelrotation=0)
    bar = figure.colorbar(panels[0].collections[0], ax=list(panels), pad=0.01, aspect=30)
    bar.set_label("share of dense's score (numbers: %)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("target speedup of the block FLOPs", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return written(figure, path)


def retained(accuracy: pd.DataFrame, compute: pd.DataFrame) -> pd.DataFrame:
    """One row a task, curve and target: ``task``, ``metric``, ``label``, ``number``, ``bound``,
    ``target_speedup``, ``retained`` (see ``retained_by_task``).

    Raises UserError if no task has scores of both dense and another method.
    """
    import pandas as pd

    accuracy = labelled(accuracy)
    parts = []
    for task in accuracy["task"].dropna().unique():
        metric = main_metric(accuracy, task)
        table = task_table(accuracy, compute, task, metric)
        dense = table.loc[reference(table), metric].mean()
        found = points(table, metric, "block_speedup")
        if not found.empty and dense > 0:
            ratio = dense / found["value"] if metric in LOWER_IS_BETTER else found["value"] / dense
            parts.append(found.assign(task=task, metric=metric, retained=ratio))
    if not parts:
        raise UserError("no task has scores of both dense and another method")
    return pd.concat(parts, ignore_index=True)
