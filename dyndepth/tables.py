"""The tidy tables, as a pure function of the cells: equal cells give equal bytes.

Order of rows and columns is fixed (by ``dyndepth.schema``), and so is the way a number is written
(10 significant digits). Every row leads with its cell's hash and identity. A sweep writes them; so
does ``python -m dyndepth.tables RUN``, which computes nothing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dyndepth import sheets
from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.identity import LEADING, Row
from dyndepth.cells.merging import check_rows
from dyndepth.cells.store import Store
from dyndepth.chance import OF_ACCURACY, by_task
from dyndepth.common.commands import Parser
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import path_of
from dyndepth.schema import TABLES, validate

NAMES = tuple(TABLES)
"""The files of a run, in the order in which they are written."""

CHECKED = ("accuracy.csv", "compute.csv", "timing.csv", "leaderboard.csv")
"""Tables that are validated each time they are written. The others have many times the rows and are
written many times in a sweep: ``schema.validate_folder`` and the verification check them."""


def write_tables(cells: Sequence[Cell], path: Path) -> list[Path]:
    """Write the six tables of ``cells`` (in ``records.order``) under ``path``; return where.

    Raises UserError, before anything is written, if a value of a table in ``CHECKED`` cannot be.
    """
    # The leaderboard is a table too, and it is written with this module's functions.
    from dyndepth.leaderboard import leaderboard

    rows = {
        "accuracy.csv": accuracy(cells),
        "leaderboard.csv": leaderboard(cells),
        **{f"{name}.csv": _rows(cells, name) for name in ("compute", "timing")},
        **{f"{name}.parquet": _rows(cells, name) for name in ("routing", "samples")},
    }
    for name in CHECKED:
        validate(name, rows[name])
    for name in NAMES:
        write = as_parquet if name.endswith(".parquet") else as_csv
        write_atomically(path / name, write(rows[name], TABLES[name].own))
    return [path / name for name in NAMES]


def accuracy(cells: Iterable[Cell]) -> list[Row]:
    """Rows of accuracy.csv; a cell without results has one row that says so in ``status``."""
    rows = []
    for cell in cells:
        leading = {**identity_columns(cell), "status": cell.status}
        guessed = by_task(cell)
        for row in cell.accuracy or [{}]:
            of_accuracy = row.get("metric") in OF_ACCURACY
            chance = guessed.get(row["task"]) if of_accuracy else None
            rows.append({**leading, **row, "chance": chance or None})
    return rows


def _rows(cells: Iterable[Cell], name: str) -> list[Row]:
    found = []
    for cell in cells:
        leading = identity_columns(cell)
        found += [{**leading, **row} for row in getattr(cell, name)]
    return found


def columns_of(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """``LEADING``, then ``columns``, then whatever else the rows have, in alphabetical order."""
    known = [*LEADING, *columns]
    return known + sorted({key for row in rows for key in row} - set(known))


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as CSV text (``dyndepth.sheets``), every column of ``columns_of``."""
    return sheets.as_csv(rows, columns_of(rows, columns))


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
            arrays.append(pyarrow.array([None if v is None else sheets.number(v) for v in values]))
    buffer = io.BytesIO()
    table = pyarrow.table(arrays, names=names)
    pyarrow.parquet.write_table(table, buffer, compression="zstd", compression_level=15)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the tables of runs anew from their cells."""
    parser = Parser(
        prog="python -m dyndepth.tables", description="Write a run's tables anew from its cells."
    )
    parser.add_argument(
        "runs", nargs="+", type=path_of, metavar="RUN", help="a sweep's output path"
    )
    parser.add_argument(
        "--pack",
        action="store_true",
        help="also compress the files of the cells, for a run that is to be kept; a sweep goes on "
        "with packed cells as with others",
    )
    try:
        options = parser.parse_args(arguments)
        for run in options.runs:
            store = Store(run)
            cells = store.all()
            if not cells:
                raise UserError(f"{run} holds no cells; give the --output_path of a sweep")
            check_rows(cells)
            with store.locked():
                if options.pack:
                    store.pack()
                for path in write_tables(cells, run):
                    print(path)
    except UserError as fault:
        print(f"dyndepth.tables: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
