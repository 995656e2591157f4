"""One row of several that differ in their seeds alone, for whatever shows means: terminal, CSV,
LaTeX, the page, and the documents' tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dyndepth.cells.identity import LEADING, Row
from dyndepth.results.columns import LEADERBOARD
from dyndepth.results.lossless import together as by_task
from dyndepth.results.noise import LOADED, SUSPECT, named

_ENDS: Mapping[str, Callable[..., Any]] = {"_low": min, "_high": max}
_FIXED: Mapping[str, Callable[..., Any]] = {
    "wall_repeats": min,
    "documents": min,
    "wall_load": max,
}
"""Columns of which the mean would say nothing."""
_MEASURED = frozenset(
    key
    for key, column in LEADERBOARD.columns.items()
    if column.dtype == "number" or key.endswith("_bytes")
)


def together(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Rows of a leaderboard, of several seeds, as one; in whatever order they stand.

    Of a number the mean over the seeds that have it. An interval reaches from the lowest end to
    the highest, and is there if each of those seeds has both ends. The fewest pairs and documents,
    the highest load, every doubt. What is no measurement is that of the lowest seed that has it.
    """
    rows = sorted(rows, key=lambda row: (float(row.get("seed") or 0), str(row.get("cell"))))
    return {key: _one(rows, key) for key in dict.fromkeys(key for row in rows for key in row)}


def _one(rows: Sequence[Mapping[str, Any]], key: str) -> Any:
    if key in LEADING:
        return rows[0].get(key)
    if key in (SUSPECT, LOADED):
        return ", ".join(sorted(set().union(*(named(row, key) for row in rows)))) or None
    known = [row[key] for row in rows if row.get(key) is not None]
    if not known:
        return None
    if key == "acceptance_by_task":
        return by_task(known)
    if key in _FIXED:
        return _FIXED[key](known)
    for end, widest in _ENDS.items():
        base = key.removesuffix(end)
        names = {base, f"{base}_speedup"}
        if base != key and any(names & set(row) for row in rows):
            return widest(known) if _whole(rows, base, names) else None
    measured = key in _MEASURED or any(isinstance(each, float) for each in known)
    return sum(known) / len(known) if measured else known[0]


def _whole(rows: Sequence[Mapping[str, Any]], base: str, names: Iterable[str]) -> bool:
    """Whether every row that has a value, under one of the names, has both ends of its interval."""
    return all(
        row.get(f"{base}{end}") is not None
        for row in rows
        if any(row.get(name) is not None for name in names)
        for end in _ENDS
    )
