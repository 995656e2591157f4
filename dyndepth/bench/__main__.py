"""How near the runtime comes to the arithmetic limit: ``python -m dyndepth.bench``.

Each line is one kind of skipped work on one shape, timed in interleaved rounds with the stock
model, the gates being given and not computed. ``flop_ideal`` is the speedup that the executed FLOPs
allow, ``byte_ideal`` the one that the bytes of weights touched allow (in decode a weight is read if
any sequence of the batch executes its sublayer); efficiency = speedup / flop_ideal. ``peak_ratio``
is the peak memory over the stock model's, of one more, untimed run, what lay allocated before it
(weights, a cache) not counted. ``masked_reference`` computes everything and multiplies, as
published references do. ``--check`` compares with the goals of ``dyndepth.bench.shapes``.

The part ``routes`` is in ``dyndepth.bench.plans``: many static plans scored together and one by
one; the part ``evaluation`` in ``dyndepth.bench.evaluation``: the dense model against lm-eval's own
model class; the part ``sweep`` in ``dyndepth.bench.sweep``: what a sweep costs beside its model.
The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dyndepth.bench.shapes import MORE_WORKS, PHASES, WORKS, Lines, shapes
from dyndepth.common.commands import Parser
from dyndepth.common.errors import UserError

PARTS = ("shapes", "routes", "evaluation", "sweep")
DTYPES = ("float32", "bfloat16")
SKIPPING = ("both", "generation")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser(prog="python -m dyndepth.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="hub id, path, or 'embedded' (default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a shape (default: 9)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument(
        "--documents",
        type=int,
        default=100,
        help="that routes, evaluation and sweep score (default: 100)",
    )
    for flag, name, choices, default in (
        ("parts", "part", PARTS, PARTS),
        ("works", "work", WORKS + MORE_WORKS, WORKS),
        ("phases", "phase", PHASES, PHASES),
        ("dtypes", "dtype", DTYPES, DTYPES),
        ("skipping", "phases", SKIPPING, SKIPPING[:1]),
    ):
        said = "all" if default is choices else " ".join(default)
        parser.add_argument(
            f"--{flag}",
            nargs="+",
            default=list(default),
            choices=list(choices),
            metavar=name,
            help=f"of {', '.join(choices)} (default: {said})",
        )
    parser.add_argument(
        "--check",
        nargs="?",
        const="print",
        choices=("print", "fail"),
        help="say which goals of the part shapes are met, set for the embedded model on one "
        "thread of a CPU; 'fail': exit status 1 if one is missed by more than noise",
    )
    try:
        options = parser.parse_args(arguments)
        reached = bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if options.check == "fail" and not reached else 0


def bench(options: argparse.Namespace) -> bool:
    """Run the chosen lines and print them. True if no goal that was checked is missed."""
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.models.loading import load_tokenizer

    for name in ("repeats", "threads", "documents"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name} takes a whole number of at least 1, not {given}")
    if options.check and "shapes" not in options.parts:
        raise UserError("--check compares the part shapes; add it to --parts")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        steady_allocator()
    corpus = load_corpus("embedded", load_tokenizer(options.model))
    print(f"threads {torch.get_num_threads()}, device {options.device}, torch {torch.__version__}")
    found: dict[str, Any] = {}
    if "shapes" in options.parts:
        found["bench"] = shapes(corpus, options)
    if "routes" in options.parts:
        from dyndepth.bench.plans import routes

        found["routes"] = routes(corpus, options)
    if "evaluation" in options.parts:
        from dyndepth.bench.evaluation import evaluation

        found["evaluation"] = evaluation(options)
    if "sweep" in options.parts:
        from dyndepth.bench.sweep import sweep

        found["sweep"] = sweep(options)
    reached = not options.check or _reached(found["bench"])
    print(json.dumps(found))
    return reached


def _reached(lines: Lines) -> bool:
    """Print each goal beside what was measured; whether none is missed by more than noise."""
    from collections import Counter

    from dyndepth.bench.shapes import MET, MISSED, UNCERTAIN, check

    checks = list(check(lines))
    for each in checks:
        print(each)
    counts = Counter(each.verdict for each in checks)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (MET, UNCERTAIN, MISSED))
    print(f"goals on the embedded model, one CPU thread: {said}")
    return not counts[MISSED]


if __name__ == "__main__":
    sys.exit(main())
