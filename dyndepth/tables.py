"""The tidy tables, as a pure function of the cells: equal cells give equal bytes.

Order of rows and columns is fixed, and so is the way a number is written (10 significant digits).
Every row leads with its cell's hash and identity.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dyndepth.records import LEADING, Cell, Row, identity_columns
from dyndepth.store import write_atomically

ACCURACY = (
    "status",
    "task",
    "metric",
    "filter",
    "value",
    "stderr",
    "n",
    "higher_is_better",
    "task_version",
)
COMPUTE = (
    "task",
    "phase",
    "tokens",
    "block_flops_per_token",
    "total_flops_per_token",
    "block_speedup",
    "total_speedup",
    "attention",
    "mlp",
    "kv_projection",
    "router",
    "readout",
    "lm_head",
    "padding",
)
ROUTING = ("task", "phase", "layer", "sublayer", "executed")
TIMING = ("phase", "batch", "length")
SAMPLES = ("task", "doc_id", "doc_hash", "metric", "outcome")
"""Columns of each table after the identity; others that a row has follow in alphabetical order."""

NAMES = (
    "accuracy.csv",
    "compute.csv",
    "timing.csv",
    "routing.csv",
    "samples.parquet",
    "leaderboard.csv",
)


def write_tables(cells: Sequence[Cell], path: Path) -> list[Path]:
    """Write the six tables of ``cells`` (in ``records.order``) under ``path``; return where."""
    # The leaderboard is a table too, and it is written with this module's functions.
    from dyndepth.leaderboard import COLUMNS, leaderboard

    tables: dict[str, str | bytes] = {
        "accuracy.csv": as_csv(accuracy(cells), ACCURACY),
        "compute.csv": as_csv(_rows(cells, "compute"), COMPUTE),
        "timing.csv": as_csv(_rows(cells, "timing"), TIMING),
        "routing.csv": as_csv(_rows(cells, "routing"), ROUTING),
        "samples.parquet": as_parquet(_rows(cells, "samples"), SAMPLES),
        "leaderboard.csv": as_csv(leaderboard(cells), COLUMNS),
    }
    for name in NAMES:
        write_atomically(path / name, tables[name])
    return [path / name for name in NAMES]


def accuracy(cells: Iterable[Cell]) -> list[Row]:
    """Rows of accuracy.csv; a cell without results has one row that says so in ``status``."""
    rows = []
    for cell in cells:
        for row in cell.accuracy or [{}]:
            rows.append({**identity_columns(cell), "status": cell.status, **row})
    return rows


def _rows(cells: Iterable[Cell], name: str) -> list[Row]:
    return [{**identity_columns(cell), **row} for cell in cells for row in getattr(cell, name)]


def columns_of(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """``LEADING``, then ``columns``, then whatever else the rows have, in alphabetical order."""
    known = [*LEADING, *columns]
    return known + sorted({key for row in rows for key in row} - set(known))


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as CSV text; a missing value is an empty field."""
    buffer = io.StringIO()
    names = columns_of(rows, columns)
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_text(row.get(name)) for name in names] for row in rows)
    return buffer.getvalue()


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, ".10g") if isinstance(value, float) else str(value)


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
            arrays.append(pyarrow.array([None if v is None else _text(v) for v in values]))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), buffer)
    return buffer.getvalue()
