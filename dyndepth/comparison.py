"""The command line ``python -m dyndepth.comparison RUN...``: methods on the same documents.

With --output_path it writes comparison.csv, curves.csv and equal_flops.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import check_rows, merged
from dyndepth.common.commands import Parser, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import check_folder, path_of
from dyndepth.results.comparison import compared, left_out, texts
from dyndepth.results.curve_tables import BUDGETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: compare the cells of runs."""
    parser = Parser(
        prog="python -m dyndepth.comparison",
        description="Compare cells with dense, and methods at equal FLOPs, on the same documents.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_of, metavar="RUN", help="a sweep's output path"
    )
    parser.add_argument(
        "--at",
        nargs="+",
        type=float,
        default=BUDGETS,
        metavar="SPEEDUP",
        help="reference budgets, dense / executed FLOPs (default: 1.1 1.25 1.5 1.9)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these alone (default: all)")
    parser.add_argument(
        "--output_path", type=path_of, help="folder to write the three CSV files to"
    )
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args([underscored(word) for word in given])
        if options.output_path:
            options.output_path = check_folder("output_path", options.output_path)
        cells = merged(options.runs)
        check_rows(cells, compared=True)
        tables = compared(cells, options.tasks, options.at)
        apart = left_out(cells, options.tasks)
    except UserError as fault:
        print(f"dyndepth.comparison: {fault}", file=sys.stderr)
        return 2
    from dyndepth.results.console import show_comparison

    show_comparison(tables)
    if apart:
        print(f"left out, no means over single documents: {', '.join(apart)}")
    failed = [cell for cell in cells if not cell.evaluated]
    for cell in failed:
        print(f"failed: {cell.identity['method']} {cell.key}: {cell.error}")
    if options.output_path:
        for name, text in texts(tables).items():
            write_atomically(options.output_path / name, text)
        print(f"written to {options.output_path}: {', '.join(texts(tables))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
