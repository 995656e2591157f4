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
from dyndepth.common.paths import path_of
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
    ends = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    return interval(*ends, scale=scale, digits=digits, unit=unit)


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    scale: float = 1,
    digits: int = 3,
    unit: str = "",
) -> str:
    """``value [low, high]``; no ends where they are unknown or the value itself, nothing without
    value."""
    if value is None:
        return ""
    text = f"{value * scale:.{digits}f}{unit}"
    if low is None or high is None or low == value == high:
        return text
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def by_chance(row: Row) -> bool:
    """Whether the interval of a row's mean accuracy holds what guesses score."""
    return holds(row.get("chance"), row.get("mean_acc_low"), row.get("mean_acc_high"))


def holds(chance: float | None, low: float | None, high: float | None) -> bool:
    """Whether ``chance`` is inside of an interval; False where one of them is unknown."""
    return None not in (chance, low, high) and low <= chance <= high  # type: ignore[operator]


def folders(runs: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]] | None:
    """``runs`` (cell -> where it was read) by the folders' names alone, for what leaves this
    machine; with as much of the path as tells them apart."""
    if runs is None:
        return None
    parts = {run: path_of(run).resolve().parts for where in runs.values() for run in where}
    longest = max(map(len, parts.values()), default=1)
    for count in range(1, longest + 1):
        names = {run: "/".join(own[-count:]) for run, own in parts.items()}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return {cell: [names[run] for run in where] for cell, where in runs.items()}


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
    accuracy); bounds after all others, then what is lossless, what failed last. ``seeds`` and
    ``cells`` are lists.
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
            *(row["status"] == "error", bool(row.get("lossless")), bool(row["bound"])),
            *(row["target_speedup"], row["run"] or "", not dense, value is None, quality),
        )

    return sorted(found, key=place), stand_for


def _averaged(group: Sequence[Row]) -> Row:
    group = sorted(group, key=lambda row: row["seed"])
    own = {"seeds": [one["seed"] for one in group], "cells": [one["cell"] for one in group]}
    return together(group) | own


SCORED = {"bits_per_byte": "bits/byte", "mean_acc": "mean acc", "rouge_l": "ROUGE-L"}
"""Columns of scores that have intervals, and their headings."""


def without_interval(rows: Sequence[Row], texts: Iterable[str] | None = None) -> str:
    """Why scores of ``rows`` have no interval, as far as they are among ``texts`` (default: all of
    them); empty where all have one."""
    from dyndepth.results.statistics.intervals import LEAST  # numpy comes late

    shown = None if texts is None else set(texts)
    scored, bare = set(), set()
    for key in SCORED:
        for row in rows:
            if row.get(key) is not None and (shown is None or _as_shown(row, key) in shown):
                scored.add(key)
                bare |= {key} if row.get(f"{key}_low") is None else set()
    if not bare:
        return ""
    names = "" if bare == scored else f" of {', '.join(SCORED[k] for k in SCORED if k in bare)}"
    return f"fewer than {LEAST} documents a task: no intervals{names}"


def _as_shown(row: Row, key: str) -> str:
    return _accuracy(row) if key == "mean_acc" else spread(row, key)


def about(rows: Sequence[Row], texts: Iterable[str], stand_for: Sequence[str] = ()) -> str:
    """One line that says what the texts of a table mean, only of what stands there."""
    texts = list(texts)
    parts = ["[..]: 95% intervals"] if any("[" in text for text in texts) else []
    parts += filter(None, (without_interval(rows, texts),))
    guessed = {f"{row['chance']:.3f}" for row in rows if by_chance(row)}
    if any(text.startswith(FEW) for text in texts):
        parts.append(f"{FEW}: chance ({', '.join(sorted(guessed))}) is inside")
    parts += [text for text in (legend(texts),) if text]
    return "; ".join((*parts, *stand_for))
