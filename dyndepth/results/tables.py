"""The tidy tables, as a pure function of the cells: equal cells give equal bytes.

Order of rows and columns is fixed (by ``schema``), and so is the way a number is written (10
significant digits). Every row leads with its cell's hash and identity. pandas, R and a spreadsheet
read the CSV alike: a text stays a text, and what a spreadsheet would run as a formula, or what any
of them would take for a number or a date (a hash may have no letter in it, ``5.24.0`` is a day
somewhere), is led by an apostrophe. Truth values are TRUE and FALSE, which all three know.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.identity import LEADING, Row
from dyndepth.common.files import write_atomically
from dyndepth.results.columns import TIMING
from dyndepth.results.fields import harmless
from dyndepth.results.leaderboard import OF_ACCURACY, by_task, leaderboard
from dyndepth.results.schema import TABLES, validate


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The ``columns`` of the rows as CSV: one header, no index, 10 significant digits; a missing
    value is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([entry(row.get(name)) for name in columns] for row in rows)
    return buffer.getvalue()


def entry(value: Any) -> str:
    """One field of a CSV file; None and NaN are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    return harmless(value) if isinstance(value, str) else number(value)


def number(value: Any) -> str:
    """A number with 10 significant digits; anything else as Python writes it."""
    return format(value, ".10g") if isinstance(value, float) else str(value)


NAMES = tuple(TABLES)
"""The files of a run, in the order in which they are written."""

CHECKED = ("accuracy.csv", "compute.csv", "timing.csv", "leaderboard.csv")
"""Tables that are validated each time they are written. The others have many times the rows and are
written many times in a sweep: ``schema.validate_folder`` and the verification check them."""


def write_tables(cells: Sequence[Cell], path: Path) -> list[Path]:
    """Write the six tables of ``cells`` (in ``cell.order``) under ``path``; return where.

    Raises UserError, before anything is written, if a value of a table in ``CHECKED`` cannot be.
    """
    leading = [identity_columns(cell) for cell in cells]
    rows = {
        "accuracy.csv": accuracy(cells, leading),
        "leaderboard.csv": leaderboard(cells, leading),
        **{f"{name}.csv": _rows(cells, leading, name) for name in ("compute", "timing")},
        **{f"{name}.parquet": _rows(cells, leading, name) for name in ("routing", "samples")},
    }
    for name in CHECKED:
        validate(name, rows[name])
    for name in NAMES:
        write = as_parquet if name.endswith(".parquet") else as_csv
        write_atomically(path / name, write(rows[name], TABLES[name].own))
    return [path / name for name in NAMES]


def accuracy(cells: Iterable[Cell], leading: Iterable[Row]) -> list[Row]:
    """Rows of accuracy.csv; a cell without results has one row that says so in ``status``.

    ``leading`` are the columns that lead the rows of each cell.
    """
    rows = []
    for cell, first in zip(cells, leading, strict=True):
        guessed = by_task(cell)
        for row in cell.accuracy or [{}]:
            of_accuracy = row.get("metric") in OF_ACCURACY
            chance = guessed.get(row["task"]) if of_accuracy else None
            rows.append({**first, "status": cell.status, **row, "chance": chance or None})
    return rows


def _rows(cells: Iterable[Cell], leading: Iterable[Row], name: str) -> list[Row]:
    today = TIMING.today if name == "timing" else dict
    found = []
    for cell, first in zip(cells, leading, strict=True):
        found += [{**first, **today(row)} for row in getattr(cell, name)]
    return found


def columns_of(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """``LEADING``, then ``columns``, then whatever else the rows have, in alphabetical order."""
    known = [*LEADING, *columns]
    return known + sorted({key for row in rows for key in row} - set(known))


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as CSV text as ``csv_text`` gives it, every column of ``columns_of``."""
    return csv_text(rows, columns_of(rows, columns))


def as_parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """The rows as a Parquet file; a column of mixed types is kept as text."""
    import pyarrow
    import pyarrow.parquet

    names = columns_of(rows, columns)
    arrays = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays.append(pyarrow.array(values))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            arrays.append(pyarrow.array([None if v is None else number(v) for v in values]))
    buffer = io.BytesIO()
    table = pyarrow.table(arrays, names=names)
    pyarrow.parquet.write_table(table, buffer, compression="zstd", compression_level=15)
    return buffer.getvalue()
