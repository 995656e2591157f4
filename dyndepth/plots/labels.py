"""Target speedups written beside their marks, where they cover neither marks nor each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndepth.plots.style import INK

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


_SIZE = 7  # points
_MARK = 4.5  # points from a mark's middle to its edge and a little beyond
_ANGLES = (0, 180, 40, -40, 140, -140, 90, -90)
_DISTANCES = (1.0, 1.8, 2.8, 4.0)
_STEPS = 25
"""Places on a line between two marks that labels keep clear of."""
_NEAR = 1.5
"""From this distance on a thin line leads from the label to its mark."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in points."""


def label_targets(axis: Axes, curves: Sequence[pd.DataFrame]) -> None:
    """Write the ``target_speedup`` of each row of ``curves`` beside its mark at ``x``, ``value``;
    labels keep clear of the lines that join the rows of a curve.

    The axis must have its final limits and place (``figure.draw_without_rendering``).
    """
    import pandas as pd
    from matplotlib.patheffects import withStroke

    found = pd.concat(curves)
    figure = axis.get_figure(root=True)
    assert figure is not None  # an axis that was drawn has one
    unit = figure.dpi / 72
    places = found[["x", "value"]].to_numpy(dtype=float)
    middles = axis.transData.transform(places) / unit
    frame = axis.get_window_extent()
    inside = (frame.x0 / unit, frame.y0 / unit, frame.x1 / unit, frame.y1 / unit)
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in middles]
    for (x, y), low, high in zip(middles, _ends(axis, found, "low"), _ends(axis, found, "high"),
                                 strict=True):  # fmt: skip
        taken += [(low[0] / unit, y - 1, high[0] / unit, y + 1)]
        taken += [(x - 1, low[1] / unit, x + 1, high[1] / unit)]
    for own in curves:
        steps = np.linspace(0, 1, _STEPS)[:, None]
        ends = axis.transData.transform(own[["x", "value"]].to_numpy(dtype=float)) / unit
        for one, other in itertools.pairwise(ends):
            taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in one + steps * (other - one)]
    for place, (x, y), target in zip(places, middles, found["target_speedup"], strict=True):
        text = f"{target:g}×"
        width, height = 0.62 * _SIZE * len(text), 1.1 * _SIZE
        best: tuple[float, float, float, float, Box] | None = None
        for distance, across, up in _places(width, height):
            left, bottom = x + across - width / 2, y + up - height / 2
            box = (left, bottom, left + width, bottom + height)
            cost = sum((_shared(box, other) for other in taken), width * height)
            cost -= _shared(box, inside)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, distance, across, up, box)
            if cost < 1e-6:
                break
        assert best is not None
        taken.append(best[4])
        leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        # Not part of the layout: labels lie inside their panel.
        axis.annotate(
            text, tuple(place), best[2:4], textcoords="offset points", ha="center", va="center",
            fontsize=_SIZE, color=INK, arrowprops=leader if best[1] > _NEAR else None, zorder=5,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        ).set_in_layout(False)  # fmt: skip


def _ends(axis: Axes, found: pd.DataFrame, end: str) -> Any:
    """Ends of the intervals in pixels, ``[rows, (across, up)]``."""
    return axis.transData.transform(found[[f"x_{end}", end]].to_numpy(dtype=float))


def _places(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Distance and offset in points of a label's middle from its mark's, the best first."""
    for distance in _DISTANCES:
        for angle in _ANGLES:
            turn = math.radians(angle)
            across = math.cos(turn) * (width / 2 + _MARK + 1) * distance
            yield distance, across, math.sin(turn) * (height / 2 + _MARK + 1) * distance


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
