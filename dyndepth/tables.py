"""The command line ``python -m dyndepth.tables RUN``: a run's tables written again from its
cells."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import check_rows
from dyndepth.cells.store import Store
from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import UserError
from dyndepth.results.tables import write_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("tables", _tables, arguments)


def _tables(given: list[str]) -> None:
    parser = Parser("tables", "Write the tables of runs anew from their cells.")
    parser.runs()
    parser.add_argument(
        "--pack",
        action="store_true",
        help="also compress the files of the cells, for a run that is to be kept; a sweep goes on "
        "with packed cells as with others",
    )
    options = parser.parse_args(given)
    for folder in options.runs:
        store = Store(folder)
        cells = store.all()
        if not cells:
            raise UserError(f"{folder} holds no cells; give the --output_path of a sweep")
        check_rows(cells)
        with store.locked():
            if options.pack:
                store.pack()
            for path in write_tables(cells, folder):
                print(path)


if __name__ == "__main__":
    sys.exit(main())
