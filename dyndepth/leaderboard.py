"""The command line ``python -m dyndepth.leaderboard RUN...``: one table of several runs.

With --output_path it writes leaderboard.csv and, for people, leaderboard.md and leaderboard.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.cells.merging import merged
from dyndepth.common.commands import Parser, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_folder, path_of
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import NAMES, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: merge runs into one leaderboard."""
    parser = Parser(
        prog="python -m dyndepth.leaderboard",
        description="Merge runs into one leaderboard. Rows of several settings say what theirs has "
        "apart; other evaluation data or task versions are refused.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_of, metavar="RUN", help="a sweep's output path"
    )
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help=f"folder to write {', '.join(NAMES)} to",
    )
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args([underscored(word) for word in given])
        if options.output_path:
            options.output_path = check_folder("output_path", options.output_path)
        cells = merged(options.runs)
        rows = leaderboard(cells)
        written = write(cells, rows, options.output_path) if options.output_path else []
    except UserError as fault:
        print(f"dyndepth.leaderboard: {fault}", file=sys.stderr)
        return 2
    show_leaderboard(rows)
    if written:
        print(f"written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
