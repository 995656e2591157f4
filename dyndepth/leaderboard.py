"""The command line ``python -m dyndepth.leaderboard RUN...``: one table of several runs.

With --output_path it writes leaderboard.csv and, for people, leaderboard.md and leaderboard.html;
with --format it prints the table for a paper.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import merged, origins
from dyndepth.common.commands import Parser, run
from dyndepth.common.paths import check_folder, path_of
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import NAMES, write
from dyndepth.results.shown import COLUMNS, chosen
from dyndepth.results.shown_formats import FORMS, written


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("leaderboard", _leaderboard, arguments)


def _leaderboard(given: list[str]) -> None:
    parser = Parser(
        "leaderboard",
        "Merge runs into one leaderboard. Rows of several settings say what theirs has apart; "
        "other evaluation data or task versions are refused.",
    )
    parser.runs()
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help=f"folder to write {', '.join(NAMES)} to",
    )
    parser.add_argument(
        "--format",
        choices=("terminal", *FORMS),
        default="terminal",
        help="what is printed: a table for this terminal (default), latex (booktabs), markdown or "
        "csv, all of the same rows",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMNS",
        help=f"these alone, in this order, of {', '.join(each.key for each in COLUMNS)} (default: "
        "those that have values, as far as the terminal is wide enough)",
    )
    options = parser.parse_args(given)
    if options.output_path:
        options.output_path = check_folder("output_path", options.output_path)
    cells = merged(options.runs)
    rows = leaderboard(cells)
    runs = origins(options.runs) if len(options.runs) > 1 else None
    chosen(rows, options.columns or [])
    files = write(cells, rows, options.output_path, runs) if options.output_path else []
    if options.format == "terminal":
        show_leaderboard(rows, runs=runs, keys=options.columns)
    else:
        print(written(options.format, rows, runs, options.columns))
    if files:
        to = sys.stdout if options.format == "terminal" else sys.stderr
        print(f"written: {', '.join(map(str, files))}", file=to)


if __name__ == "__main__":
    sys.exit(main())
