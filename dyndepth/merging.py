"""The cells of several runs as one list: which record of a cell stands, and what cannot be merged.

A cell that several runs hold is the same computation by its hash. One of its records may know more
than another: scores where that failed, times where that was not timed. Which runs come first makes
no difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.errors import UserError
from dyndepth.readable_rows import check_rows
from dyndepth.records import TIMING_LEVELS, Cell, Row, order, plain
from dyndepth.store import Store

KEYS = {"accuracy": ("task", "metric", "filter"), "samples": ("task", "doc_id")}
"""Tables in which evaluated records of one cell must agree, and what a row of theirs is of."""

ROUNDING = 1e-4
"""Relative difference of numbers that two machines may give by summing in another order."""


def merged_cells(runs: Sequence[Path]) -> list[Cell]:
    """The cells of several runs, each once, in the order of the tables: of several records of one
    cell the one that was evaluated, then the one that was timed most thoroughly, then a finished
    one.

    Raises:
        UserError: a folder is no run, a cell's rows cannot be read, or evaluated records of one
            cell have different scores.
    """
    found: dict[str, list[tuple[Path, Cell]]] = {}
    for run in runs:
        cells = Store(run).all()
        if not cells:
            raise UserError(f"{run} holds no cells; give the --output_path of a sweep")
        check_rows(cells)
        for cell in cells:
            found.setdefault(cell.key, []).append((run, cell))
    return sorted(map(_best, found.values()), key=order)


def _best(records: Sequence[tuple[Path, Cell]]) -> Cell:
    _check(records)
    cells = [cell for _, cell in records]
    return max(cells, key=_knows) if len(cells) > 1 else cells[0]


def _knows(cell: Cell) -> tuple[bool, int, bool, str]:
    """Larger is better; the last entry decides between equals, whatever the order of the runs."""
    level = TIMING_LEVELS.index(cell.timing_level)
    rest = json.dumps(plain(vars(cell)), sort_keys=True)
    return cell.evaluated, level, cell.status == "done", rest


def _check(records: Sequence[tuple[Path, Cell]]) -> None:
    evaluated = [(run, cell) for run, cell in records if cell.evaluated]
    for other, theirs in evaluated[1:]:
        run, own = evaluated[0]
        for name in KEYS:
            row = _differing(name, getattr(own, name), getattr(theirs, name))
            if row:
                raise UserError(
                    f"{run} and {other} both hold cell {own.key} ({own.identity['method']}) and "
                    f"differ in its {name}, row {row}: one of them was changed or made by other "
                    "code; ask `python -m dyndepth.verify` of both and leave one out"
                )


def _differing(name: str, own: Sequence[Row], theirs: Sequence[Row]) -> str:
    """The first row that only one has or that has other values, as ``task/doc_id``; empty if
    none."""
    left, right = ({_key(name, row): row for row in rows} for rows in (own, theirs))
    for key in dict.fromkeys([*left, *right]):
        if key not in left or key not in right or not _alike(left[key], right[key]):
            return "/".join(key)
    return ""


def _key(name: str, row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in KEYS[name])


def _alike(one: Any, other: Any) -> bool:
    """Equal, numbers but for rounding; a JSON text as what it says."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, str) and isinstance(other, str) and one != other:
        left, right = _parsed(one), _parsed(other)
        return left is not None and right is not None and _alike(left, right)
    if isinstance(one, float) or isinstance(other, float):
        try:
            return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-9)
        except (TypeError, OverflowError):
            return False
    return bool(one == other)


def _parsed(text: str) -> Any:
    """A list or mapping from its JSON text; None for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None
