"""Numbers of committed tables as text, and ``Numbers``, by which sentences quote them.

A function that writes sentences gets a ``Numbers`` and puts what that finds into f-strings::

    f"Dense has {numbers.of('leaderboard', 'bits_per_byte', label='dense')} bits per byte."
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dyndepth.cells.naming import label
from dyndepth.common.errors import UserError
from dyndepth.common.files import read_text
from dyndepth.results.fields import unquoted
from dyndepth.results.noise import loaded, told, told_of

Record = dict[str, str]
"""A row of a CSV file: column -> text, empty where the value is missing."""

BY_FLOPS = ("curves", "equal_flops")
"""Tables with rows for block FLOPs, which are quoted unless told otherwise, and for all FLOPs."""


def read(path: Path) -> list[Record]:
    """The rows of a CSV file.

    Raises:
        UserError: the file cannot be read.
    """
    return [dict(row) for row in _shared(path)]


def _shared(path: Path) -> list[Record]:
    """``read``, for those who change no row: one list for each text of a file."""
    try:
        return _parsed(read_text(path))
    except OSError as fault:
        raise UserError(f"{path} cannot be read: {fault}") from None


@lru_cache(maxsize=16)
def _parsed(text: str) -> list[Record]:
    """The rows of a CSV text; sentences quote a number each, of the same few tables."""
    return [
        {key: unquoted(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]


def number(text: str | None, form: str = "{:.3f}") -> str:
    """The number that a field holds, formatted; empty for an empty field."""
    return form.format(float(text)) if text else ""


def spread(row: Record, value: str, low: str, high: str, form: str = "{:.3f}") -> str:
    """``value [low, high]`` from the columns of these names; without interval where there is none,
    empty where there is no value."""
    if not row.get(value):
        return ""
    ends = [number(row.get(end), form) for end in (low, high)]
    interval = f" [{', '.join(ends)}]" if all(ends) else ""
    return number(row[value], form) + interval


def _wall(row: Record, show: str, form: str) -> str:
    """A wall speedup of timing.csv or leaderboard.csv with its noise, as a sentence has it."""
    if show != "wall_speedup":
        key = show.removeprefix("wall_").removesuffix("_speedup")
        return told_of(row, key, form=form, mark=" ({})")
    ends = row.get(f"{show}_low"), row.get(f"{show}_high")
    return told(row.get(show), *ends, row.get("suspect"), loaded(row), form=form, mark=" ({})")


@dataclass(frozen=True)
class Numbers:
    """What the tables of a committed run say: the repository's ``root``, and the run's ``folder``,
    relative to it.

    Rows are chosen by ``where``, column=value. A number is compared as a number, and ``label``,
    which is no column, with the one name that a row's method has everywhere (``cells.naming``).
    """

    root: Path
    folder: Path

    def within(self, folder: str | Path) -> Numbers:
        """The same of another run."""
        return replace(self, folder=Path(folder))

    def of(self, table: str, show: str, /, *, digits: int = 3, **where: Any) -> str:
        """The column ``show`` of the one row that fits, with so many digits after the point, as
        ``value [low, high]`` where the table has an interval.

        Raises:
            UserError: not exactly one row fits, or it has no value.
        """
        where = _wanted(table, where)
        rows = self._rows(table, where)
        path = self.folder / f"{table}.csv"
        if len(rows) != 1:
            raise UserError(f"{path} has {len(rows)} rows with {where}; a sentence quotes one")
        # Of equal_flops.csv, ``low`` and ``high`` are the ends of ``value``.
        ends = ("low", "high") if show == "value" else (f"{show}_low", f"{show}_high")
        form = f"{{:.{digits}f}}"
        if show.startswith("wall_") and show.endswith("_speedup"):
            text = _wall(rows[0], show, form)
        else:
            text = spread(rows[0], show, *ends, form)
        if not text:
            raise UserError(f"{path} has no {show} where {where}")
        return text

    def count(self, table: str, /, **where: Any) -> int:
        """How many rows fit; none where there is no such table."""
        return len(self._rows(table, _wanted(table, where)))

    def _rows(self, table: str, where: dict[str, Any]) -> list[Record]:
        path = self.root / self.folder / f"{table}.csv"
        rows = _shared(path) if path.is_file() else []
        # A row's label is put together: asked last, of the few rows that fit otherwise.
        ordered = sorted(where.items(), key=lambda each: each[0] == "label")
        return [row for row in rows if all(_fits(row, *each) for each in ordered)]


def _wanted(table: str, where: dict[str, Any]) -> dict[str, Any]:
    return {"flops": "block"} | where if table in BY_FLOPS else where


def _fits(row: Record, column: str, wanted: str | float) -> bool:
    found = label(row) if column == "label" else row.get(column)
    if isinstance(wanted, str):
        return found == wanted
    return abs(float(found) - wanted) < 1e-9 if found else False
