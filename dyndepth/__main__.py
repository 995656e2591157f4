"""The command ``dyndepth``: every command of the suite by its name.

``dyndepth sweep ...`` and ``python -m dyndepth.sweep ...`` are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from dyndepth.common.commands import Parser, run
from dyndepth.common.completion import asked, finished_words, offer, script
from dyndepth.common.pipes import outlive_readers
from dyndepth.common.spec import nearest

COMMANDS = {
    "assets": "bring the embedded model and data",
    "ls": "list methods, models and tasks",
    "sweep": "score, count and time methods at several speedups",
    "fit": "fit one method to a model",
    "recovered": "train adapters under a method's gates",
    "importance": "rank a model's blocks or sublayers",
    "timing": "time one method; with break-even or limits: when skipping pays",
    "generate": "write a text under any method, and say what it took",
    "routes": "record which sublayers each token runs",
    "studies": "run a study's sweeps and test its claims",
    "leaderboard": "merge runs into one table and page",
    "compare": "compare methods on the same documents, at equal FLOPs",
    "plots": "draw every figure that a run allows",
    "verify": "check a run against itself, and compute cells again",
    "rerun": "print the command that computes a cell again",
    "tables": "write a run's tables anew",
    "export": "write a method's model as a checkpoint that others load",
    "bench": "measure what the suite itself costs",
    "gpu": "ten minutes of a GPU: what holds there, and how fast",
    "pages": "write the generated parts of the documentation",
}
"""Every command with a line for people, in the order in which they are met."""

HEADINGS = {
    "assets": "Start",
    "sweep": "Measure",
    "leaderboard": "Look",
    "verify": "Check and publish",
    "bench": "Maintain",
}
"""What stands in the list before a command."""

COMPLETION = "completion"
"""The command that has no door of its own: it prints what a shell needs to complete the others."""

SHELLS = ("bash", "zsh", "fish")

ROOMS = {"generate": "writing"}
"""Commands whose room has another name: ``dyndepth.generate`` is a function."""

FORMER = {"comparison": "compare"}
"""Names that commands had, and still obey."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status of the command that is named first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    outlive_readers()
    if asked():
        given = finished_words()
        if not given or FORMER.get(given[0], given[0]) not in COMMANDS:
            offer(_parser(), 0, {})
    if not given or given[0] in ("-h", "--help"):
        print(_listed())
        return 0 if given else 2
    name, rest = FORMER.get(given[0], given[0]), given[1:]
    if name == "--version":
        from dyndepth import __version__

        print(__version__)
        return 0
    if name == COMPLETION:
        return run(COMPLETION, _completion, rest)
    if name not in COMMANDS:
        near = nearest(name, [*COMMANDS, COMPLETION])
        sentence = f"there is no command {name!r}; {near}--help lists them"
        print(f"dyndepth: {sentence}", file=sys.stderr)
        return 2
    place = f"dyndepth.{ROOMS.get(name, name)}"
    door = import_module(place)
    if hasattr(door, "__path__"):
        door = import_module(f"{place}.__main__")
    return int(door.main(rest))


def _completion(given: list[str]) -> None:
    built = Parser(
        COMPLETION,
        "Print what a shell needs to complete commands, flags, their choices, methods and paths.",
        'Put eval "$(dyndepth completion bash)" into ~/.bashrc, or zsh into ~/.zshrc.',
    )
    built.add_argument("shell", choices=SHELLS, help="which")
    print(script(built.parse_args(given).shell), end="")


def _parser() -> argparse.ArgumentParser:
    """The first word of a command line, for a shell that completes it."""
    built = argparse.ArgumentParser("dyndepth")
    built.add_argument("--version", action="store_true")
    commands = built.add_subparsers()
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    own = commands.add_parser(COMPLETION, help="complete commands in a shell")
    own.add_argument("shell", choices=SHELLS)
    return built


def _listed() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for name, text in COMMANDS.items():
        if name in HEADINGS:
            lines += ["", f"{HEADINGS[name]}:"]
        lines.append(f"  {name:{width}}  {text}")
    return "\n".join(
        [
            "usage: dyndepth COMMAND ...  or  dyndepth --help | --version",
            "",
            "Benchmarks of dynamic depth for decoder-only language models.",
            *lines,
            "",
            "`dyndepth COMMAND --help` says more; `python -m dyndepth.COMMAND` is the same.",
            'In bash, `eval "$(dyndepth completion bash)"` completes all of this.',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
