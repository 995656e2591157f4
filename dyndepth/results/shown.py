"""What a table of leaderboard rows shows people, whatever writes it: its columns, rows and legend.

``COLUMNS`` has a line a column; the terminal, LaTeX, Markdown and CSV of ``dyndepth.leaderboard``
all read it. A row is one method with its parameters at one target speedup, its seeds averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.cells.cell import DENSE
from dyndepth.cells.identity import LEADING, UNHASHED, Row
from dyndepth.cells.naming import lettered, titled
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.results.leaderboard import is_control
from dyndepth.results.noise import LOADED, SUSPECT, headed, legend, told_of
from dyndepth.results.seeds import together

FEW = "~"
"""Stands before an accuracy that a guess would reach: chance is inside of its interval."""


@dataclass(frozen=True)
class Shown:
    """One column for people.

    Attributes:
        key: its name in ``--columns``.
        heading: above it.
        text: of a row of ``board_rows``.
        reads: columns of leaderboard.csv that it tells; ``--format csv`` has their numbers.
        rank: of what a narrow terminal leaves out, the highest first; 0: never.
        name: holds names, which stand on the left.
        only: whether the column is needed for these rows; it may be asked for in any case.
    """

    key: str
    heading: str
    text: Callable[[Row], str]
    reads: tuple[str, ...]
    rank: int = 0
    name: bool = False
    only: Callable[[Sequence[Row]], bool] = lambda rows: True


def spread(row: Row, key: str, scale: float = 1, digits: int = 3, unit: str = "") -> str:
    """``value [low, high]`` of a leaderboard row; the ends only where they differ from it."""
    value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return ""
    text = f"{value * scale:.{digits}f}{unit}"
    if low is None or high is None or low == value == high:
        return text
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def by_chance(row: Row) -> bool:
    """Whether the interval of a row's mean accuracy holds what guesses score."""
    low, chance, high = (row.get(key) for key in ("mean_acc_low", "chance", "mean_acc_high"))
    return low is not None and chance is not None and low <= chance <= high


def full_name(row: Row) -> str:
    """The name of a row's method with its parameters, and what kind it is."""
    kind = " (bound)" if row["bound"] else " (control)" if is_control(row) else ""
    return titled(row) + kind + (" FAILED" if row["status"] == "error" else "")


def _ends(key: str) -> tuple[str, str, str]:
    return key, f"{key}_low", f"{key}_high"


def _any(key: str) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: any(row.get(key) is not None for row in rows)


def _several(key: str) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: len({str(row.get(key)) for row in rows}) > 1


def _accuracy(row: Row) -> str:
    return FEW * by_chance(row) + spread(row, "mean_acc")


def _retained(row: Row) -> str:
    """Nothing without interval: all documents of a few may be right by chance."""
    return "" if row.get("retained_low") is None else spread(row, "retained", 100, 0)


def _wall(key: str, rank: int) -> Shown:
    column = f"wall_{key}_speedup"
    reads = (column, f"wall_{key}_low", f"wall_{key}_high", SUSPECT, LOADED)
    return Shown(key, key, lambda row: told_of(row, key), reads, rank, only=_any(column))


COLUMNS = (
    Shown("run", "run", lambda row: str(row["run"]), ("run",), name=True, only=_any("run")),
    Shown("model", "model", lambda row: str(row["model"]), ("model",), name=True,
          only=_several("model")),
    Shown("method", "method", full_name, ("method", "parameters", "phases", "recovery", "bound"),
          name=True),
    Shown("target", "target", lambda row: f"{row['target_speedup']:g}x", ("target_speedup",)),
    Shown("seeds", "seeds", lambda row: str(len(row["seeds"])), ("seeds",), 9,
          only=lambda rows: any(len(row["seeds"]) > 1 for row in rows)),
    Shown("bits_per_byte", "bits/byte", lambda row: spread(row, "bits_per_byte"),
          _ends("bits_per_byte"), 1, only=_any("bits_per_byte")),
    Shown("mean_acc", "mean acc", _accuracy, (*_ends("mean_acc"), "chance"), 3,
          only=_any("mean_acc")),
    Shown("retained", "% of dense", _retained, _ends("retained"), 6, only=_any("retained_low")),
    Shown("rouge_l", "ROUGE-L", lambda row: spread(row, "rouge_l"), _ends("rouge_l"), 8,
          only=_any("rouge_l")),
    Shown("block", "block FLOPs", lambda row: spread(row, "block_speedup", 1, 2, "x"),
          ("block_speedup",), 2),
    Shown("total", "total FLOPs", lambda row: spread(row, "total_speedup", 1, 2, "x"),
          ("total_speedup",), 7),
    _wall("prefill", 5),
    _wall("decode", 4),
    _wall("decode_graphs", 5),
)  # fmt: skip
"""Every column that there is. A further one is one entry, and its column in
``columns.LEADERBOARD``."""


def chosen(rows: Sequence[Row], keys: Sequence[str] | None = None) -> list[Shown]:
    """The columns of ``keys``, in that order, or those that ``rows`` need.

    Raises:
        UserError: there is no column of that name.
    """
    known = {each.key: each for each in COLUMNS}
    if keys is None:
        return [each for each in COLUMNS if each.only(rows)]
    for key in keys:
        if key not in known:
            raise UserError(f"there is no column {key!r}; --columns takes {', '.join(known)}")
    return [known[key] for key in keys]


def headings(columns: Sequence[Shown], rows: Sequence[Row]) -> list[str]:
    """What stands above each column; of wall speedups with their mode where there are several."""
    walls = headed(rows)
    return [walls.get(each.key, each.heading) for each in columns]


_BY_SEED = frozenset({"cell", "seed"}) | UNHASHED - {"model"}


def board_rows(
    rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Row], list[str]]:
    """Rows of ``leaderboard`` with seeds averaged, in the order of the page, and what their ``run``
    letters stand for (``naming.lettered``; ``runs``: cell -> where it was read).

    The order: by target, then the best first (bits per byte where there are any, else the mean
    accuracy); bounds after all others, what failed last. ``seeds`` and ``cells`` are lists.
    """
    letters, stand_for = lettered(rows, runs)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row, letter in zip(rows, letters, strict=True):
        key = tuple(row[name] for name in LEADING if name not in _BY_SEED)
        groups.setdefault((*key, row["status"], letter), []).append({**row, "run": letter or None})
    found = [_averaged(group) for group in groups.values()]
    best = next((key for key in ("bits_per_byte", "mean_acc") if _any(key)(found)), "rouge_l")

    def place(row: Row) -> tuple[Any, ...]:
        value = row.get(best)
        quality = 0.0 if value is None else value if best == "bits_per_byte" else -value
        dense = row["method"] == DENSE and row["recovery"] == NONE
        return (
            *(row["status"] == "error", bool(row["bound"])),
            *(row["target_speedup"], row["run"] or "", not dense, value is None, quality),
        )

    return sorted(found, key=place), stand_for


def _averaged(group: Sequence[Row]) -> Row:
    group = sorted(group, key=lambda row: row["seed"])
    own = {"seeds": [one["seed"] for one in group], "cells": [one["cell"] for one in group]}
    return together(group) | own


def about(rows: Sequence[Row], texts: Iterable[str], stand_for: Sequence[str] = ()) -> str:
    """One line that says what the texts of a table mean, only of what stands there."""
    texts = list(texts)
    parts = ["[..]: 95% intervals"] if any("[" in text for text in texts) else []
    scored = [row for row in rows if row.get("mean_acc") is not None]
    if scored and all(row.get("mean_acc_low") is None for row in scored):
        parts.append("fewer than 10 documents a task: no intervals")
    guessed = {f"{row['chance']:.3f}" for row in rows if by_chance(row)}
    if any(text.startswith(FEW) for text in texts):
        parts.append(f"{FEW}: chance ({', '.join(sorted(guessed))}) is inside")
    parts += [text for text in (legend(texts),) if text]
    return "; ".join((*parts, *stand_for))
