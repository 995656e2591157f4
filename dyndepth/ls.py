"""The command line ``python -m dyndepth.ls methods|models|shapes|tasks``: what can be chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.common.commands import Parser, run
from dyndepth.common.printing import Column, print_columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("ls", _ls, arguments)


def _ls(given: list[str]) -> None:
    kinds = {
        "methods": list_methods,
        "models": list_models,
        "shapes": list_shapes,
        "tasks": list_tasks,
    }
    parser = Parser("ls", "List what there is to choose from.")
    what = "of which kind (default: methods)"
    parser.add_argument("what", nargs="?", choices=list(kinds), default="methods", help=what)
    kinds[parser.parse_args(given).what]()


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
        kind = "lossless" if cls.speculates else "bound" if cls.uses_labels else ""
        trains = "yes" if cls.needs_training else ""
        rows.append([name, kind, cls.granularity, trains, parameters, cls.paper])
    _print(("method", "kind", "granularity", "trains", "parameters", "paper"), rows)


def list_models() -> None:
    """Print the embedded model and the architectures of which any model can be loaded."""
    from dyndepth.common.paths import EMBEDDED
    from dyndepth.models.families import supported

    rows = [[EMBEDDED, "comes with `python -m dyndepth.assets`; needs no hub and no GPU"]]
    rows += [[kind, "hub id or local path of a model of this type"] for kind in supported()]
    _print(("model", "how to get it"), rows)


def list_shapes() -> None:
    """Print the shapes of public models, which are made with random weights to be timed."""
    from dyndepth.models.shapes import SHAPE, shapes

    headings = ("model", "blocks", "hidden", "vocabulary", "as in")
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    rows = [
        [SHAPE + name, *(str(one["config"][size]) for size in sizes), one["source"]]
        for name, one in shapes().items()
    ]
    _print(headings, rows)
    print(f"any other by the path of its configuration, as in {SHAPE}folder/config.json")


def list_tasks() -> None:
    """Print the offline tasks and the named suites."""
    from dyndepth.tasks import OFFLINE, SUITES

    rows = [[name, "task", "offline"] for name in OFFLINE]
    rows += [[name, "suite", ", ".join(tasks)] for name, tasks in SUITES.items()]
    _print(("name", "kind", "what"), rows)
    print("any other lm-eval task works by its name, given a hub or --include_path")


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    texts = zip(headings, zip(*rows, strict=True), strict=True)
    print_columns([Column(each, own, name=True) for each, own in texts], "")


if __name__ == "__main__":
    sys.exit(main())
