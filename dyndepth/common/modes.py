"""How a model runs, in the words that flags, columns and rows have for it."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["eager", "graphs"]
"""``eager``: the host launches every kernel; ``graphs``: decode steps are replayed from CUDA
graphs, all else runs as in eager mode."""

MODES: tuple[Mode, ...] = get_args(Mode)
"""Every mode, in the order in which they are timed."""
EAGER, GRAPHS = MODES
