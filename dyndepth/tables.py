"""The command line ``python -m dyndepth.tables RUN``: a run's tables written again from its
cells."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import check_rows
from dyndepth.cells.store import Store
from dyndepth.common.commands import Parser
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.results.tables import write_tables


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
