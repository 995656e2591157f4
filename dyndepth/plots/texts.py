"""The route of one text as a picture: each token under its text, each block executed or skipped."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndepth.plots.style import (
    BLUE,
    SKIPPED,
    TITLES,
    VERMILION,
    figure_of,
    readable,
    whole_numbers,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dyndepth.routes.trace import Routes

ROW = 64
"""Tokens beside each other whose texts can be read."""
ROWS = 4
"""Rows of tokens in a picture; a longer text is drawn as means over ranges of its tokens."""
RANGES = 96
_LETTERS = 13
"""Letters of the title that an inch holds."""


def text_route(
    routes: Routes, document: str, path: str | Path | None = None, *, row: int = ROW
) -> Figure:
    """All tokens of one document across, blocks upwards, attention and MLP apart.

    Up to ``ROWS`` rows of ``row`` tokens show each token with its text: filled where it executed.
    A longer document is cut into at most ``RANGES`` ranges of tokens, whose shade is the executed
    fraction. The title has the executed fractions; a line marks where the prompt ends. Raises
    UserError for an unknown document.
    """
    rows = routes.document(document)
    gates, prompt = routes.gates[rows], routes.prompt_lengths[routes.documents.index(document)]
    wide = len(gates) > ROWS * row
    figure = _means(gates, prompt) if wide else _tokens(gates, prompt, routes.strings(rows), row)
    shares = ", ".join(
        f"{TITLES[kind]} {gates[:, :, index].mean():.0%}" for index, kind in enumerate(TITLES)
    )
    title = (
        f"{routes.label} on {document}, {len(gates)} tokens: {gates.mean():.0%} of sublayers "
        f"executed ({shares})"
    )
    lines = textwrap.fill(title, int(_LETTERS * figure.get_size_inches()[0]))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=10, parse_math=False)
    return written(figure, path)


def _tokens(gates: np.ndarray, prompt: int, texts: list[str], row: int) -> Figure:
    """Each token by itself, ``row`` of them beside each other."""
    from matplotlib.colors import ListedColormap

    tokens, layers = gates.shape[:2]
    across, count = min(row, tokens), -(-tokens // row)
    panel = max(0.9, 0.055 * layers)
    figure = figure_of(max(7.4, 1.1 + 0.16 * across), 0.9 + count * (2 * panel + 0.95))
    axes = figure.subplots(2 * count, 1, squeeze=False)[:, 0]
    colours, ends = ListedColormap([SKIPPED, BLUE]), None
    for number in range(count):
        first = number * row
        shown = gates[first : first + row]
        for index, kind in enumerate(TITLES):
            axis = axes[2 * number + index]
            axis.imshow(
                shown[:, :, index].T, cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            _framed(axis, TITLES[kind], across)
            ends = _end_of_prompt(axis, prompt - first, len(shown)) or ends
            axis.set_xticks([])
            # Tokens that stand beside each other are told apart.
            axis.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
            axis.set_yticks(np.arange(layers - 1) + 0.5, minor=True)
            axis.grid(which="minor", axis="x", color="white", linewidth=0.8)
            axis.grid(which="minor", axis="y", color="white", linewidth=0.2)
            axis.tick_params(which="minor", length=0)
        labels = [readable(text) for text in texts[first : first + row]]
        axis.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7, parse_math=False)
    _legend(figure, ends)
    return figure


def _means(gates: np.ndarray, prompt: int) -> Figure:
    """Executed fractions of ranges of tokens."""
    tokens, layers = gates.shape[:2]
    width = -(-tokens // RANGES)
    starts = np.arange(0, tokens, width)
    counts = np.diff([*starts, tokens])
    shares = np.add.reduceat(gates.astype(float), starts, axis=0) / counts[:, None, None]
    panel = max(1.2, 0.055 * layers)
    figure = figure_of(9.0, 1.4 + 2 * panel)
    axes = figure.subplots(2, 1, sharex=True)
    for index, (axis, kind) in enumerate(zip(axes, TITLES, strict=True)):
        edge = len(starts) * width - 0.5
        image = axis.imshow(
            shares[:, :, index].T, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower",
            interpolation="nearest", extent=(-0.5, edge, -0.5, layers - 0.5),
        )  # fmt: skip
        _framed(axis, TITLES[kind], None)
        axis.set_xlim(-0.5, tokens - 0.5)
        ends = _end_of_prompt(axis, prompt, tokens)
    axes[1].set_xlabel(f"token of the text (means over {width} tokens)", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, aspect=30)
    bar.set_label("fraction of tokens that executed", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if ends is not None:
        figure.legend(handles=[ends], loc="outside lower right", frameon=False, fontsize=8)
    return figure


def _framed(axis: Axes, name: str, across: int | None) -> None:
    axis.set_ylabel(f"{name}\nblock", fontsize=8)
    axis.tick_params(labelsize=7)
    whole_numbers(axis.yaxis)
    if across is not None:  # so that tokens are as wide in a last row that is short
        axis.set_xlim(-0.5, across - 0.5)
        for side in ("top", "right", "bottom", "left"):
            axis.spines[side].set_visible(False)


def _end_of_prompt(axis: Axes, place: int, tokens: int) -> Any:
    """The line where the prompt ends, if that is inside, and more than the first token."""
    if not 1 < place < tokens:
        return None
    return axis.axvline(place - 0.5, color=VERMILION, linewidth=2, label="prompt ends")


def _legend(figure: Figure, ends: Any) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=BLUE, label="executed"),
        Patch(facecolor=SKIPPED, edgecolor="gray", linewidth=0.5, label="skipped"),
    ]
    handles += [] if ends is None else [ends]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8,
        title="block 0 is next to the embedding", title_fontsize=8, alignment="left",
    )  # fmt: skip
