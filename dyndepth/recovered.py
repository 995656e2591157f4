"""Recovered methods: taken from what comes with the project, from the cache, or trained.

A folder holds the adapter, the training curve, and under ``fit`` what the method found when it was
calibrated again under the adapted weights. ``python -m dyndepth.recovered`` makes the folders that
a method ships.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from dyndepth.cells.recipe import parse_recovery
from dyndepth.common.commands import Parser
from dyndepth.common.errors import UserError
from dyndepth.fitting.recovery.kept import recover_cached, ship


def main(arguments: list[str] | None = None) -> int:
    """Recover methods, print a line of JSON each and, with --ship, put them where they ship."""
    parser = Parser(prog="python -m dyndepth.recovered", description="Recover methods by adapters.")
    add = parser.add_argument
    add("--model", default="embedded", help="hub id, local path, or 'embedded' (default)")
    add("--methods", required=True, help='names, or "name(parameter=value, ...)"')
    add("--speedups", default="1.25,1.5,2.0", help="targets, comma-separated")
    add("--recovery", default="lora", help='"lora(rank=8, steps=100)", joint, ... (default: lora)')
    add("--corpus", default="embedded", help="text to train on: .txt, .jsonl, 'embedded'")
    add("--device", default="cpu")
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add("--seed", type=int, default=0)
    add("--ship", action="store_true", help="copy the adapters into the methods' own folders")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args(given)
        options.command = f"python -m dyndepth.recovered {shlex.join(given)}"
        _recover_all(options)
    except (UserError, FloatingPointError) as fault:
        print(f"dyndepth.recovered: {fault}", file=sys.stderr)
        return 2 if isinstance(fault, UserError) else 1
    return 0


def _recover_all(options: argparse.Namespace) -> None:
    from dyndepth.common.registry import parse_methods
    from dyndepth.fitting.recovery.adapters import CARD
    from dyndepth.models.loading import layer_count, longest_window
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
    named = {name for name, _ in parse_methods(options.methods)}
    found = plans(chosen, layer_count(options.model), longest_window(options.model))
    cells = [plan for plan in found if plan.method in named]

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.models.loading import load_model, load_tokenizer

    steady_allocator()
    corpus = load_corpus(options.corpus, load_tokenizer(options.model))
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    for plan in cells:
        method, adapter = recover_cached(plan.build(), model, corpus, recipe)
        if options.ship:
            name = f"{method.target_speedup:g}-seed{method.seed}-{recipe.kind}"
            folder = ship(method, adapter, name)
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            text = json.dumps(card | {"command": options.command}, indent=1) + "\n"
            (folder / CARD).write_text(text, encoding="utf-8")
        print(json.dumps(adapter.card), flush=True)


if __name__ == "__main__":
    sys.exit(main())
