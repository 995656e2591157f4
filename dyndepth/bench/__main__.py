"""How near the runtime comes to the arithmetic limit: ``python -m dyndepth.bench``.

Each line is one kind of skipped work on one shape, timed in interleaved rounds with the stock
model, the gates being given and not computed. ``flop_ideal`` is the speedup that the executed FLOPs
allow, ``byte_ideal`` the one that the bytes of weights touched allow (in decode a weight is read if
any sequence of the batch executes its sublayer); efficiency = speedup / flop_ideal. ``peak_ratio``
is the peak memory over the stock model's, of one more, untimed run, what lay allocated before it
(weights, a cache) not counted. ``masked_reference`` computes everything and multiplies, as
published references do. ``--check`` compares with the goals of ``dyndepth.bench.goals``.

The part ``routes`` is in ``dyndepth.bench.plans``: many static plans scored together and one by
one; the part ``evaluation`` in ``dyndepth.bench.evaluation``: the dense model against lm-eval's own
model class; the part ``sweep`` in ``dyndepth.bench.sweep``: what a sweep costs beside its model;
the part ``lossless`` in ``dyndepth.bench.lossless``: drafts that the whole model verifies. Of a
model with random weights (``--model shape:NAME``) there are the parts ``shapes`` and ``lossless``
alone, on random tokens. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from dyndepth.bench.goals import GOALS, GPU_GOALS, LOSSLESS_GOALS, Goal
from dyndepth.bench.lines import MORE_WORKS, WORKS, Lines
from dyndepth.bench.shapes import PHASES, passes, shapes
from dyndepth.cells.identity import plain
from dyndepth.common.commands import CHOICES, HELP, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED, check_file, path_of
from dyndepth.models.shapes import is_shape, shape_for

PARTS = ("shapes", "routes", "evaluation", "sweep", "lossless")
UNSCORED = ("shapes", "lossless")
"""Parts that need no text."""
DTYPES = ("float32", "bfloat16")
SKIPPING = ("both", "generation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a goal is missed with ``--check fail``, 2 for wrong input."""
    return run("bench", _bench, arguments)


def _parser() -> Parser:
    parser = Parser("bench", "How near the runtime comes to the arithmetic limit.")
    parser.model(dtype=False, shapes=True, spread=False)
    parser.whole("repeats", 1, "rounds a shape", 9)
    parser.whole("seconds", 1, "of the part shapes: after them no other phase is begun")
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FILE",
        help="JSON with the lines of the part shapes, written after each phase; phases that are in "
        "it are not measured again",
    )
    documents = "documents that routes, evaluation and sweep score"
    parser.whole("limit", 1, documents, 100, dest="documents")
    for flag, name, choices, default in (
        ("parts", "part", PARTS, PARTS),
        ("works", "work", WORKS + MORE_WORKS, WORKS),
        ("passes", "phase", PHASES, ()),
        ("dtype", "dtype", DTYPES, DTYPES),
        ("skipping", "where", SKIPPING, SKIPPING[:1]),
    ):
        said = "all" if default is choices else " ".join(default) or "by device"
        parser.add_argument(
            f"--{flag}",
            dest={"passes": "phases", "dtype": "dtypes"}.get(flag, flag),
            nargs="+",
            default=list(default),
            choices=list(choices),
            metavar=name,
            help=f"of {', '.join(choices)} (default: {said})",
        )
    parser.add_argument(
        "--drafts",
        metavar="METHODS",
        help="methods that speculate, for the part lossless, such as one,other(length=4) (default: "
        "all that are registered and need no training)",
    )
    parser.add_argument(
        "--mode",
        choices=CHOICES["mode"],
        help=f"{HELP['mode']} (default: both on a GPU, else eager)",
    )
    # What the model allows, unless it is said.
    parser.set_defaults(parts=None)
    parser.add_argument(
        "--check",
        nargs="?",
        const="print",
        choices=("print", "fail"),
        help="say which goals of the parts shapes and lossless are met, set for the embedded model "
        f"on one thread of a CPU, and for {shape_for('bench')} in bfloat16 on one GPU; 'fail': "
        "exit status 1 if one is missed by more than noise",
    )
    return parser


def _bench(given: list[str]) -> int:
    options = _parser().parse_args(given)
    reached = bench(options)
    return 1 if options.check == "fail" and not reached else 0


def bench(options: argparse.Namespace) -> bool:
    """Run the chosen lines and print them. True if no goal that was checked is missed."""
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.models.loading import checked_config, load_tokenizer, named, one_device
    from dyndepth.timing.levels import modes_of
    from dyndepth.timing.random_tokens import RandomTokens

    options.device = one_device(options.device, "the bench")
    options.parts = _parts(options)
    options.modes = modes_of(options.mode, "full", options.device.partition(":")[0])
    if "shapes" in options.parts:
        passes(options)
    if options.output_path is not None:
        options.output_path = check_file("output_path", options.output_path, "JSON")
    if options.check and not set(UNSCORED) & set(options.parts):
        raise UserError(f"--check compares {' and '.join(UNSCORED)}; add it to --parts")
    if options.drafts:
        from dyndepth.bench.rivals import speculating

        if "lossless" not in options.parts:
            raise UserError("--drafts is for the part lossless; add it to --parts")
        speculating(options.drafts)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        steady_allocator()
    corpus: Any
    if is_shape(options.model):
        corpus = RandomTokens(checked_config(*named(vars(options))))
        print(f"{options.model} has random weights and no tokenizer: it reads random tokens")
    else:
        corpus = load_corpus(EMBEDDED, load_tokenizer(*named(vars(options))))
    print(f"threads {torch.get_num_threads()}, device {options.device}, torch {torch.__version__}")
    found: dict[str, Any] = {}
    if "shapes" in options.parts:
        record = shapes(corpus, options)
        found["bench"] = record.lines
        found |= {"left": record.left} if record.left else {}
    if "routes" in options.parts:
        from dyndepth.bench.plans import routes

        found["routes"] = routes(corpus, options)
    if "evaluation" in options.parts:
        from dyndepth.bench.evaluation import evaluation

        found["evaluation"] = evaluation(options)
    if "sweep" in options.parts:
        from dyndepth.bench.sweep import sweep

        found["sweep"] = sweep(options)
    if "lossless" in options.parts:
        from dyndepth.bench.lossless import lossless

        found["lossless"] = lossless(corpus, options)
    goals = GOALS if options.device == "cpu" else GPU_GOALS
    reached = True
    for lines, own in ((found.get("bench"), goals), (found.get("lossless"), LOSSLESS_GOALS)):
        if options.check and lines:
            reached = _reached(lines, own) and reached
    print(json.dumps(plain(found), allow_nan=False))
    return reached


def _parts(options: argparse.Namespace) -> list[str]:
    """The parts asked for, or all that the model allows. Raises UserError for others, and for goals
    on a model of random weights."""
    if not is_shape(options.model):
        return list(options.parts or PARTS)
    parts = list(options.parts or PARTS[:1])
    scoring = [part for part in parts if part not in UNSCORED]
    if scoring:
        raise UserError(
            f"{options.model} has random weights and no tokenizer, and to measure "
            f"{' and '.join(scoring)} is to score text; give --parts {' '.join(UNSCORED)}"
        )
    if options.drafts:
        raise UserError(f"{options.model} has no text for --drafts to be compared on; leave it out")
    if options.check and options.device == "cpu":
        raise UserError(
            "the goals of --check on a CPU are set for the embedded model, not for "
            f"{options.model}; leave it out"
        )
    return parts


def _reached(lines: Lines, goals: Sequence[Goal]) -> bool:
    """Print each goal beside what was measured; whether none is missed by more than noise."""
    from collections import Counter

    from dyndepth.bench.goals import MET, MISSED, UNCERTAIN, check

    checks = list(check(lines, goals))
    for each in checks:
        print(each)
    counts = Counter(each.verdict for each in checks)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (MET, UNCERTAIN, MISSED))
    print(f"goals: {said}")
    return not counts[MISSED]


if __name__ == "__main__":
    sys.exit(main())
