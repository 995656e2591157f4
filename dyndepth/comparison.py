"""Every cell against dense on the same documents, methods as wholes, and methods at equal FLOPs.

``python -m dyndepth.comparison RUN...`` prints three kinds of tables and writes comparison.csv,
curves.csv and equal_flops.csv with ``--output_path``. Accuracies are tested by McNemar's exact
test, all else by paired bootstrap over documents; Holm's correction runs over all rows of a table
that have the same metric and count the same FLOPs. The tables are a pure function of the cells,
whatever their order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from dyndepth import sheets
from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import LEADING, Row
from dyndepth.cells.merging import check_rows, merged
from dyndepth.common.commands import Parser, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import check_folder, path_of
from dyndepth.comparison_columns import COMPARISON, CURVES, EQUAL_FLOPS

BUDGETS = (1.1, 1.25, 1.5, 1.9)
"""Reference budgets of equal_flops.csv by default: dense / executed FLOPs. The last is below
2: methods end within some percent of their target, and nothing is read off beyond a curve's end."""


def compared(
    cells: Iterable[Cell],
    tasks: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
) -> dict[str, list[Row]]:
    """The rows of ``comparison``, ``curves`` and ``equal_flops``, for ``tasks`` or all.

    Raises:
        UserError: the cells are of different task versions or data; none scored a task of
            ``tasks``; or a budget is below 1.
    """
    # numpy comes late: --help must be instant.
    from dyndepth.curve_tables import curves, equal_flops
    from dyndepth.dense_tables import against_dense

    cells = list(cells)
    scored = {row["task"] for cell in cells for row in cell.accuracy}
    unknown = [task for task in tasks or () if task not in scored]
    if unknown:
        raise UserError(
            f"no cell has the task {unknown[0]}; scored were {', '.join(sorted(scored))}"
        )
    return {
        "comparison": against_dense(cells, tasks),
        "curves": curves(cells, tasks),
        "equal_flops": equal_flops(cells, tasks, budgets),
    }


def texts(tables: dict[str, list[Row]]) -> dict[str, str]:
    """The CSV text of every table of ``compared`` by its file name; equal rows, equal bytes."""
    from dyndepth.tables import as_csv

    own = tuple(name for name in COMPARISON if name not in LEADING)
    return {
        "comparison.csv": as_csv(tables["comparison"], own),
        "curves.csv": sheets.as_csv(tables["curves"], tuple(CURVES)),
        "equal_flops.csv": sheets.as_csv(tables["equal_flops"], tuple(EQUAL_FLOPS)),
    }


def left_out(cells: Iterable[Cell], tasks: Sequence[str] | None = None) -> list[str]:
    """``task metric`` of all scores that cannot be paired: no means over single documents."""
    from dyndepth.peers import peers

    found: dict[str, None] = {}
    for each in peers(cells):
        kept = each.comparable(tasks)
        missing = [score for score in each.scores(tasks) if score not in kept]
        found |= dict.fromkeys(f"{score.task} {score.metric}" for score in missing)
    return list(found)


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
    from dyndepth.comparison_show import show

    show(tables)
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
