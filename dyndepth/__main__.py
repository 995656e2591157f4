"""The command ``dyndepth``: every command of the suite by its name.

``dyndepth sweep ...`` and ``python -m dyndepth.sweep ...`` are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dyndepth.common.spec import nearest

COMMANDS = {
    "assets": "bring the embedded model and data",
    "ls": "list methods, models and tasks",
    "sweep": "score, count and time methods at several speedups",
    "fit": "fit one method to a model",
    "recovered": "train adapters under a method's gates",
    "export": "write a method's model as a checkpoint that others load",
    "importance": "rank a model's blocks or sublayers",
    "timing": "time one method; with break-even or limits: when skipping pays",
    "routes": "record which sublayers each token runs",
    "tables": "write a run's tables anew",
    "leaderboard": "merge runs into one table and page",
    "comparison": "compare methods on the same documents, at equal FLOPs",
    "plots": "draw every figure that a run allows",
    "studies": "run a study's sweeps and test its claims",
    "rerun": "print the command that computes a cell again",
    "verify": "check a run against itself, and compute cells again",
    "bench": "measure what the suite itself costs",
    "gpu": "ten minutes of a GPU: what holds there, and how fast",
    "pages": "write the generated parts of the documentation",
}
"""Every command with a line for people, in the order in which they are met."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status of the command that is named first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_listed())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name == "--version":
        from dyndepth import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        sentence = f"there is no command {name!r}; {nearest(name, COMMANDS)}--help lists them"
        print(f"dyndepth: {sentence}", file=sys.stderr)
        return 2
    door = import_module(f"dyndepth.{name}")
    if hasattr(door, "__path__"):
        door = import_module(f"dyndepth.{name}.__main__")
    return int(door.main(rest))


def _listed() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dyndepth COMMAND ...  or  dyndepth --help | --version",
            "",
            "Benchmarks of dynamic depth for decoder-only language models.",
            "",
            *lines,
            "",
            "`dyndepth COMMAND --help` says more; `python -m dyndepth.COMMAND` is the same.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
