"""The command line ``python -m dyndepth.recovered``: adapters trained under methods' gates.

They are kept in the cache and, with --ship, put where the methods ship them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from dyndepth.cells.recipe import ALL, parse_recovery
from dyndepth.common.commands import HELP, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED
from dyndepth.fitting.recovery.kept import recover_cached, ship


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if training failed, 2 for wrong input, 130 after Ctrl-C."""
    return run("recovered", _recovered, arguments, "interrupted; what was trained is kept")


def _recovered(given: list[str]) -> None:
    """Recover methods, print a line of JSON each and, with --ship, put them where they ship."""
    parser = Parser("recovered", "Recover methods by adapters.")
    parser.model()
    add = parser.add_argument
    add(
        "--methods",
        required=True,
        nargs="+",
        metavar="METHODS",
        help=HELP["methods"].replace("compare", "recover"),
    )
    add(
        "--speedups",
        nargs="+",
        metavar="SPEEDUPS",
        default=["1.25,1.5,2.0"],
        help=f"{HELP['speedups']} (default: 1.25,1.5,2.0)",
    )
    add("--recovery", default="lora", help='"lora(rank=8, steps=100)", joint, ... (default: lora)')
    parser.shared("corpus", EMBEDDED)
    parser.whole("seed", 0, "of everything random", 0)
    add("--ship", action="store_true", help="copy the adapters into the methods' own folders")
    options = parser.parse_args(given)
    options.command = f"python -m dyndepth.recovered {shlex.join(given)}"
    _recover_all(options)


def _recover_all(options: argparse.Namespace) -> None:
    from dyndepth.common.registry import parse_methods
    from dyndepth.fitting.recovery.adapters import CARD
    from dyndepth.models.loading import layer_count, load_tokenizer, loaded, longest_window, named
    from dyndepth.sweep.grid import plans
    from dyndepth.sweep.settings import settings

    recipe = parse_recovery(options.recovery)
    if recipe is None:
        raise UserError("--recovery none recovers nothing; give lora or joint")
    chosen = settings(
        {
            "methods": options.methods,
            "speedups": options.speedups,
            "seed": options.seed,
            "recovery": str(recipe),
        }
    )
    # A sweep always has its yardstick; here only what was named is made.
    wanted = {name for name, _ in parse_methods(chosen.methods)}
    which = named(vars(options))
    found = plans(chosen, layer_count(*which), longest_window(*which))
    cells = [plan for plan in found if plan.method in wanted]

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus

    steady_allocator()
    corpus = load_corpus(options.corpus, load_tokenizer(*which))
    model = loaded(vars(options))
    for plan in cells:
        method, adapter = recover_cached(plan.build(), model, corpus, recipe)
        if options.ship:
            kind = recipe.kind if recipe.modules == ALL else f"{recipe.kind}-{recipe.modules}"
            name = f"{method.target_speedup:g}-seed{method.seed}-{kind}"
            folder = ship(method, adapter, name)
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            text = json.dumps(card | {"command": options.command}, indent=1) + "\n"
            (folder / CARD).write_text(text, encoding="utf-8")
        print(json.dumps(adapter.card), flush=True)


if __name__ == "__main__":
    sys.exit(main())
