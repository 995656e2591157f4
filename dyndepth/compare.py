"""The command line ``python -m dyndepth.compare RUN...``: methods on the same documents.

With --output_path it writes comparison.csv, curves.csv and equal_flops.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import check_rows, merged
from dyndepth.common.commands import Parser, run
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import check_folder, path_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("compare", _comparison, arguments)


def _comparison(given: list[str]) -> None:
    parser = Parser(
        "compare",
        "Compare cells with dense, and methods at equal FLOPs, on the same documents.",
    )
    parser.runs()
    parser.add_argument(
        "--at",
        nargs="+",
        type=float,
        metavar="SPEEDUP",
        help="reference budgets, dense / executed FLOPs (default: 1.1 1.25 1.5 1.9)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these alone (default: all)")
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help="folder to write the three CSV files to",
    )
    options = parser.parse_args(given)

    # numpy and scipy come late: --help must be instant.
    from dyndepth.results.comparison import compared, left_out, texts
    from dyndepth.results.console import show_comparison
    from dyndepth.results.curve_tables import BUDGETS

    if options.output_path:
        options.output_path = check_folder("output_path", options.output_path)
    cells = merged(options.runs)
    check_rows(cells, compared=True)
    tables = compared(cells, options.tasks, options.at or BUDGETS)
    apart = left_out(cells, options.tasks)
    show_comparison(tables)
    if apart:
        print(f"left out, no means over single documents: {', '.join(apart)}")
    for cell in cells:
        if not cell.evaluated:
            print(f"failed: {cell.identity['method']} {cell.key}: {cell.error}")
    if options.output_path:
        for name, text in texts(tables).items():
            write_atomically(options.output_path / name, text)
        print(f"written to {options.output_path}: {', '.join(texts(tables))}")


if __name__ == "__main__":
    sys.exit(main())
