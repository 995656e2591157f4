"""The command line ``python -m dyndepth.rerun RUN [CELL...]``: how cells are computed again."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from dyndepth.common.commands import HELP, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.sweep.rerun import (
    OUTPUT,
    OWN,
    PLACEHOLDERS,
    chosen,
    command,
    commands,
    made_with,
    missing,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("rerun", _rerun, arguments)


def _rerun(given: list[str]) -> None:
    parser = Parser("rerun", "Print the command that computes a run's cells again.")
    parser.add_argument("run", type=path_of, metavar="RUN", help=HELP["run"])
    parser.add_argument(
        "cells",
        nargs="*",
        default=[],
        metavar="CELL",
        help="hashes, or how they begin (default: all cells)",
    )
    parser.add_argument("--output_path", default=OUTPUT, help=argparse.SUPPRESS)
    parser.add_argument("--merged", action="store_true", help="as few commands as will do")
    _print(parser.parse_args(given))


def _print(options: argparse.Namespace) -> None:
    from dyndepth.cells.store import Store
    from dyndepth.common.digests import harness_code
    from dyndepth.common.provenance import git_commit, versions

    cells = Store(options.run).all()
    if not cells:
        raise UserError(f"{options.run} holds no cells; give the --output_path of a sweep")
    cells = chosen(cells, options.cells)
    here = {**versions(), "harness_code": harness_code(), "git_commit": git_commit()}
    print(f"# here: {made_with(here)}")
    if options.merged:
        for each in dict.fromkeys(made_with(cell.identity) for cell in cells):
            print(f"# made with: {each}")
        print("\n".join(commands(cell.identity for cell in cells)))
        return
    for cell in cells:
        print(f"# cell {cell.key}, made with: {made_with(cell.identity)}")
        for flag in missing(cell.identity, {}):
            used = OWN[flag].format(**cell.identity)
            print(f"# it used {used}: name them in place of {PLACEHOLDERS[flag]}")
        if cell.provenance.get("remote_code"):
            print("# its model ran code of its own: add --trust_remote_code if you trust that")
        print(shlex.join(command(cell.identity, output_path=options.output_path)))


if __name__ == "__main__":
    sys.exit(main())
