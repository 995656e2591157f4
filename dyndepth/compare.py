"""The command line ``python -m dyndepth.compare RUN...``: methods on the same documents.

The first page says how methods stand against the best other one at each budget; --all prints the
rest. With --output_path it writes comparison.csv, curves.csv and equal_flops.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import check_rows, merged, origins
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
        metavar="SPEEDUPS",
        help="reference budgets, dense / executed FLOPs (default: 1.1 1.25 1.5 1.9)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASKS", help="these alone (default: all)")
    parser.add_argument(
        "--methods",
        metavar="METHODS",
        help="those whose standing is printed on every task, as 'one,other(layer=3)' (default: "
        "your own and the suite's best three, on the first task)",
    )
    parser.add_argument("--all", action="store_true", help="print every table after the first page")
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help="folder to write the three CSV files to",
    )
    options = parser.parse_args(given)

    # numpy and scipy come late: --help must be instant.
    from dyndepth.cells.cell import identity_columns
    from dyndepth.cells.naming import apart, label, lettered
    from dyndepth.results.comparison import compared, left_out, texts
    from dyndepth.results.console import show_comparison
    from dyndepth.results.curve_tables import BUDGETS
    from dyndepth.results.leaderboard import CONTROL
    from dyndepth.results.standing import asked, show_standing

    if options.output_path:
        options.output_path = check_folder("output_path", options.output_path)
    cells = merged(options.runs)
    check_rows(cells, compared=True)
    tables = compared(cells, options.tasks, options.at or BUDGETS)
    columns = [identity_columns(cell) for cell in cells]
    lossless = list(dict.fromkeys(label(row) for row in columns if row["lossless"]))
    names = asked(tables["equal_flops"], options.methods, lossless)
    if options.output_path:
        # Before anything is printed: a pipe may end early.
        for name, text in texts(tables).items():
            write_atomically(options.output_path / name, text)
    runs = origins(options.runs) if len(options.runs) > 1 else None
    settings, stand_for = lettered(columns, runs)
    letters = {cell.key: letter for cell, letter in zip(cells, settings, strict=True)}
    controls = {
        str(cell.identity["method"]) for cell in cells if cell.provenance.get("paper") == CONTROL
    }
    words = {cell.key: said for cell, said in zip(cells, apart(columns), strict=True)}
    show_standing(tables["equal_flops"], names, frozenset(controls), letters, words, lossless)
    for text in stand_for:
        print(text)
    if options.all:
        print()
        show_comparison(tables)
    missing = left_out(cells, options.tasks)
    if missing:
        print(f"left out, no means over single documents: {', '.join(missing)}")
    for cell in cells:
        if not cell.evaluated:
            print(f"failed: {cell.identity['method']} {cell.key}: {cell.error}")
    if options.output_path:
        print(f"written to {options.output_path}: {', '.join(texts(tables))}")
    if not options.all:
        print("the rest (each cell against dense, whole curves, every budget): --all")


if __name__ == "__main__":
    sys.exit(main())
