"""The command line ``python -m dyndepth.leaderboard RUN...``: one table of several runs.

With --output_path it writes leaderboard.csv and, for people, leaderboard.md and leaderboard.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import merged
from dyndepth.common.commands import Parser, run
from dyndepth.common.paths import check_folder, path_of
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import NAMES, write


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
    options = parser.parse_args(given)
    if options.output_path:
        options.output_path = check_folder("output_path", options.output_path)
    cells = merged(options.runs)
    rows = leaderboard(cells)
    written = write(cells, rows, options.output_path) if options.output_path else []
    show_leaderboard(rows)
    if written:
        print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
