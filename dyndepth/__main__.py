"""``python -m dyndepth ls methods|models|tasks``: what there is to choose from."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.common.commands import Parser, print_table
from dyndepth.common.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m dyndepth",
        description="Benchmarks of dynamic depth. Sweeps: python -m dyndepth.sweep --help",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("ls", help="list what there is")
    listing.add_argument("what", choices=("methods", "models", "tasks"))
    try:
        options = parser.parse_args(arguments)
        {"methods": list_methods, "models": list_models, "tasks": list_tasks}[options.what]()
    except UserError as fault:
        print(f"dyndepth: {fault}", file=sys.stderr)
        return 2
    return 0


def list_methods() -> None:
    """Print every registered method with its declared facts and parameters."""
    from dataclasses import fields

    from dyndepth.common.registry import method_class, methods

    rows = []
    for name in methods():
        cls = method_class(name)
        parameters = ", ".join(
            f"{f.name}={f.default!r}"
            for f in fields(cls)
            if f.init and f.name not in ("target_speedup", "seed")
        )
        facts = [name, cls.granularity, "yes" if cls.needs_training else "", parameters, cls.paper]
        rows.append(facts)
    _print(("method", "granularity", "trains", "parameters", "paper"), rows)


def list_models() -> None:
    """Print the embedded model and the architectures of which any model can be loaded."""
    from dyndepth.data.wheels import EMBEDDED
    from dyndepth.models.families import supported

    rows = [[EMBEDDED, "comes with `python -m dyndepth.assets`; needs no hub and no GPU"]]
    rows += [[kind, "hub id or local path of a model of this type"] for kind in supported()]
    _print(("model", "how to get it"), rows)


def list_tasks() -> None:
    """Print the offline tasks and the named suites."""
    from dyndepth.tasks import OFFLINE, SUITES

    rows = [[name, "task", "offline"] for name in OFFLINE]
    rows += [[name, "suite", ", ".join(tasks)] for name, tasks in SUITES.items()]
    _print(("name", "kind", "what"), rows)
    print("any other lm-eval task works by its name, given a hub or --include_path")


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*headings)
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
