"""Figures of where tokens go: which sublayers ran, by token, block and position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.plots.style import (
    BLUE,
    PAGE,
    SKIPPED,
    TITLES,
    VERMILION,
    entries_of,
    figure_of,
    head,
    legend_below,
    line,
    readable,
    whole_numbers,
    wrapped,
    written,
)
from dyndepth.plots.tables import check_one_setting, drafted, labelled, reference

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dyndepth.routes.trace import Phase, Routes


_TOKENS_SHOWN = 72


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
    figure = figure_of(max(6.0, 1.6 + 0.155 * tokens), 2.4 + 2 * max(1.2, 0.085 * layers))
    axes = figure.subplots(2, 1, sharex=True)
    colours = ListedColormap([SKIPPED, BLUE])
    boundary = routes.prompt_lengths[routes.documents.index(document)] - first
    ends = None
    for index, (axis, sublayer) in enumerate(zip(axes, TITLES, strict=True)):
        table = gates[:, :, index].T
        axis.imshow(
            table, cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower",
            interpolation="nearest",
        )  # fmt: skip
        axis.set_ylabel("block")
        axis.set_title(f"{TITLES[sublayer]}: {table.mean():.0%} executed", loc="left", fontsize=9)
        whole_numbers(axis.yaxis)
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
    return written(figure, path)


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
        for axis, sublayer in zip(axes, TITLES, strict=True):
            part = table[table["sublayer"] == sublayer]
            line(axis, part["layer"], part["executed"], number, label)
    for axis in axes:
        whole_numbers(axis.xaxis)
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
        for axis, sublayer in zip(axes, TITLES, strict=True):
            part = table[table["sublayer"] == sublayer]
            line(axis, (part["first"] + part["last"]) / 2, part["executed"], number, label)
    return _finished(figure, axes, path)


def executed_in_run(
    routing: pd.DataFrame, path: str | Path | None = None, *, target_speedup: float, title: str = ""
) -> Figure:
    """A run's executed fractions at one target: heatmaps of methods by blocks, attention and MLP.

    ``routing`` is routing.parquet; all phases together, over all tasks, seeds averaged. The mean
    over blocks stands at the end of each row. Lossless methods are left out: their target is the
    draft's, and where nothing is drafted every block runs. Raises UserError where nothing else was
    run at that target.
    """
    import seaborn

    check_one_setting(routing)
    table = labelled(routing)
    table = table[(table["phase"] == "all") & (table["task"] == "all") & ~reference(table)]
    table = table[table["target_speedup"] == target_speedup]
    exact = drafted(table)
    if not table.empty and exact.all():
        who = ", ".join(dict.fromkeys(map(str, table["label"])))
        raise UserError(
            f"lossless methods alone have the target speedup {target_speedup:g} ({who}): it is "
            "that of their drafts, and routing.parquet holds none"
        )
    table = table[~exact]
    if table.empty:
        raise UserError(f"routing.parquet has no method at the target speedup {target_speedup:g}")
    names = [name for name in table["label"].cat.categories if (table["label"] == name).any()]
    layers = int(table["layer"].max()) + 1
    figure = figure_of(PAGE, 1.3 + max(1.0, 0.25 * len(names)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, sublayer in zip(axes, TITLES, strict=True):
        part = table[table["sublayer"] == sublayer]
        values = part.pivot_table("executed", "label", "layer", observed=True).reindex(names)
        step = max(1, layers // 10)
        seaborn.heatmap(
            100 * values, ax=axis, cmap="cividis", vmin=0, vmax=100, cbar=False, rasterized=True,
            yticklabels=[wrapped(name, 24) for name in names], xticklabels=step,
        )  # fmt: skip
        for row, mean in enumerate(values.mean(axis=1)):
            axis.text(layers + 0.3, row + 0.5, f"{mean:.0%}", fontsize=7, va="center")
        axis.set_title(TITLES[sublayer], fontsize=8)
        axis.set_xlabel("block (0 is next to the embedding)", fontsize=8)
        axis.set_ylabel("")
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="y", labelrotation=0, length=0)
        axis.tick_params(axis="x", labelrotation=0)
    bar = figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.01, aspect=25)
    bar.set_label("% of tokens that executed", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    heading = ", ".join(
        filter(None, (title, f"which blocks run, at a target speedup of {target_speedup:g}×"))
    )
    head(figure, table, heading, "Right of each panel: mean over blocks")
    return written(figure, path)


def _pair(across: str) -> tuple[Figure, Sequence[Axes]]:
    """Two panels, attention and MLP, with executed fractions upwards."""
    figure = figure_of(PAGE, 3.4)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, sublayer in zip(axes, TITLES, strict=True):
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


def _finished(figure: Figure, axes: Sequence[Axes], path: str | Path | None) -> Figure:
    legend_below(figure, entries_of(axes[0]))
    return written(figure, path)
