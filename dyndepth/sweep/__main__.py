"""The command line ``python -m dyndepth.sweep``: score, count and time methods at several
speedups."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from dyndepth.common.commands import run
from dyndepth.sweep.run import sweep
from dyndepth.sweep.settings import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell failed, 2 for wrong input, 130 after Ctrl-C."""
    # A scheduler's polite kill is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, _interrupt)
    resumes = "interrupted; the same command resumes where it stopped"
    return run("sweep", _sweep, arguments, resumes)


def _sweep(given: list[str]) -> int:
    settings = read(given)
    if settings.debug and "--debug" not in given:
        given.append("--debug")  # the file of --config asked for it
    return sweep(settings)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
