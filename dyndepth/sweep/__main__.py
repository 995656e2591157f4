"""The command line ``python -m dyndepth.sweep``: score, count and time methods at several
speedups."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from dyndepth.common.commands import INTERRUPTED
from dyndepth.common.errors import RunFailed, UserError
from dyndepth.sweep.run import sweep
from dyndepth.sweep.settings import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell failed, 2 for wrong input, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    # A scheduler's polite kill is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = read(words)
        debug = settings.debug
        return sweep(settings)
    except (UserError, RunFailed) as fault:
        if debug:
            traceback.print_exc()
        print(f"dyndepth.sweep: {fault}", file=sys.stderr)
        return 2 if isinstance(fault, UserError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes where it stopped", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
