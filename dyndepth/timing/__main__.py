"""The command line ``python -m dyndepth.timing``: one method on one model, as a table and JSON.

With ``break-even`` as its first word: from which skipped fraction on token routing pays; with
``limits``: for which shares gathering tokens does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.common.commands import CHOICES, HELP, Parser, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.data.capacity import check_length
from dyndepth.data.wheels import EMBEDDED
from dyndepth.timing.console import as_csv, show_break_even, show_timing
from dyndepth.timing.limits import COUNTS, measure_limits
from dyndepth.timing.measure import LEVELS, check_shapes, measure

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one method; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, command in ((BREAK_EVEN, break_even_main), (LIMITS, limits_main)):
        if given[:1] == [name]:
            return command(given[1:])
    try:
        _run(_parser().parse_args(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m dyndepth.timing",
        description="Time a method against the stock model, in interleaved pairs.",
        epilog=f"`python -m dyndepth.timing {BREAK_EVEN} --help`: from which skipped "
        f"fraction on routing pays; `{LIMITS} --help`: when tokens are gathered.",
    )
    add = parser.add_argument
    add("--model", default="embedded", help="hub id, local path, or 'embedded' (default)")
    add("--method", required=True, help='name, or "name(parameter=value, ...)"')
    add("--speedup", type=float, help="target speedup (default: 1.5, or what the method names)")
    add("--level", choices=list(LEVELS), default="quick")
    add("--corpus", default="embedded", help="text to fit and time on: .txt, .jsonl, 'embedded'")
    add("--device", default="cpu")
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add(
        "--attn_implementation",
        "--attn-implementation",
        choices=CHOICES["attn_implementation"],
        help="the model's own choice unless given",
    )
    add("--revision", help="of a hub model")
    add("--trust_remote_code", "--trust-remote-code", action="store_true")
    add("--threads", type=int, help="default: torch's own choice")
    add("--seed", type=int, default=0)
    return parser


def _run(options: argparse.Namespace) -> None:
    """Load, fit, measure, print."""
    from dyndepth.models.loading import layer_count, longest_window

    named = (options.model, options.revision, options.trust_remote_code)
    method = _method(options, layer_count(*named))
    most = longest_window(*named)
    check_shapes(most, options.level)
    check_length(most, method.window_length, method.name)
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.fitting.fits import fit_cached
    from dyndepth.models.loading import load_model, load_tokenizer

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads takes a whole number of at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    steady_allocator()
    corpus = load_corpus(options.corpus, load_tokenizer(*named))
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    method = fit_cached(method, model, corpus)
    rows = measure(model, method, corpus, level=options.level, seed=options.seed)
    show_timing(f"{method!r} on {options.model}", rows)
    print(json.dumps({"timing": {"method": repr(method), "model": options.model, "rows": rows}}))


def _method(options: argparse.Namespace, layers: int) -> DynamicDepthMethod:
    """The method at the speedup asked for, or at a default that it can reach."""
    from dyndepth.common.registry import load_method, parse_methods

    named = any("target_speedup" in parameters for _, parameters in parse_methods(options.method))
    method = load_method(options.method, seed=options.seed)
    if method.uses_labels:
        raise UserError(
            f"{method.name} is a bound: what it runs follows from the documents that are scored, "
            "or from a look ahead that the clock would see; a sweep times those that can be timed"
        )
    reach = method.max_speedup(layers)
    speedup = options.speedup
    if speedup is None:
        speedup = method.target_speedup if named else min(1.5, reach)
    if not speedup <= reach:
        raise UserError(
            f"{method.name} reaches a speedup of {reach:.4g} on {layers} blocks, not {speedup:g}"
        )
    return load_method(options.method, seed=options.seed, target_speedup=speedup)


BREAK_EVEN = "break-even"
PHASES = ("prefill", "decode")
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
COLUMNS = {
    "phase": "prefill, or decode: one token a step over a cache of `length` tokens",
    "batch": "sequences",
    "length": "tokens of each",
    "sublayers": "where tokens skip: both, attention or mlp",
    "router": "hidden size of the router that was timed along, 0: none",
    "skipped_fraction": "of the tokens of those sublayers, over all blocks",
    "dense_median_s": "stock model, seconds of one forward (decode: of one step)",
    "routed_median_s": "under masks, likewise",
    "wall_speedup": "dense / routed time, median over rounds",
    "wall_speedup_low, wall_speedup_high": "its 95% interval",
    "repeats": "rounds",
    "total_speedup": "dense / executed FLOPs, LM head and router included",
    "wall_efficiency": "wall_speedup / total_speedup",
    "break_even": "skipped fraction at which the wall speedup crosses 1; 0: below the smallest "
    "measured, 1: beyond the largest; the same in all rows of a phase, as are the next three",
    "break_even_low, break_even_high": "its 95% interval (bootstrap over rounds)",
    "pays_from": "smallest fraction measured from which on the whole interval of the speedup lies "
    "above 1; empty if there is none",
    "model": "as given",
    "device ... gpu": "conditions: device, dtype, threads, cores, attention, allocator, load",
}


def break_even_main(arguments: Sequence[str]) -> int:
    """Measure and print; returns 0, or 2 for wrong input."""
    try:
        _run_break_even(_break_even_parser().parse_args([underscored(each) for each in arguments]))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def _break_even_parser() -> argparse.ArgumentParser:
    columns = "\n".join(f"  {name}: {text}" for name, text in COLUMNS.items())
    built = Parser(
        prog=f"python -m dyndepth.timing {BREAK_EVEN}",
        description="From which skipped fraction on does token routing pay on this machine? Random "
        "token masks, given and not computed, timed in turns with the stock model.",
        epilog=f"columns of the CSV, a row for each phase and fraction:\n{columns}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = built.add_argument
    add("--model", default=EMBEDDED, help=f"{HELP['model']} (default: {EMBEDDED})")
    add("--phases", nargs="+", choices=PHASES, default=PHASES, help="(default: both)")
    add("--batch", type=int, default=1, help="sequences (default: 1)")
    add("--length", type=int, default=512, help="tokens of the prompt (default: 512)")
    add(
        "--fractions",
        nargs="+",
        type=float,
        default=FRACTIONS,
        metavar="FRACTION",
        help=f"skipped fractions (default: {' '.join(map(str, FRACTIONS))})",
    )
    add("--sublayers", choices=("both", "attention", "mlp"), default="both", help="that skip")
    add(
        "--router",
        type=int,
        default=0,
        metavar="SIZE",
        help="hidden size of a two-layer router timed along in each block (default: 0, none)",
    )
    add("--repeats", type=int, default=15, help="rounds, 6 or more (default: 15)")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=CHOICES["dtype"], help=HELP["dtype"])
    add("--attn_implementation", choices=CHOICES["attn_implementation"])
    add("--revision", help=HELP["revision"])
    add("--trust_remote_code", action="store_true", help=HELP["trust_remote_code"])
    add("--threads", type=int, help="default: torch's own choice")
    add("--seed", type=int, default=0, help="of masks, tokens and order (default: 0)")
    add("--output_path", type=path_of, metavar="FILE", help="CSV to write")
    return built


def _run_break_even(options: argparse.Namespace) -> None:
    """Load, measure, print, write; the last line printed is one JSON document.

    Raises:
        UserError: wrong input; nothing was measured.
    """
    _check_break_even(options)
    import torch

    from dyndepth.common.files import write_atomically
    from dyndepth.common.machine import steady_allocator
    from dyndepth.models.loading import load_model
    from dyndepth.timing.break_even import Regime, measure
    from dyndepth.timing.conditions import conditions

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    if model.device.type == "cpu":
        steady_allocator()
    rows: list[dict[str, Any]] = []
    for phase in dict.fromkeys(options.phases):
        regime = Regime(phase, options.batch, options.length, options.sublayers, options.router)
        curve = measure(
            model, regime, options.fractions, repeats=options.repeats, seed=options.seed
        )
        own = [row | {"model": options.model} | conditions(model) for row in curve.rows()]
        show_break_even(curve, own)
        rows += own
    if options.output_path is not None:
        write_atomically(options.output_path, as_csv(rows))
    print(json.dumps({"break_even": {"rows": rows}}))


def _check_break_even(options: argparse.Namespace) -> None:
    """Raises UserError for the first value that cannot be."""
    least = {"batch": 1, "length": 1, "threads": 1, "repeats": 6, "router": 0, "seed": 0}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"--{name} takes a whole number of at least {bound}, not {value}")
    for fraction in options.fractions:
        if not 0 < fraction < 1:
            raise UserError(f"--fractions takes numbers between 0 and 1, not {fraction:g}")
    path = options.output_path
    if path is not None and path.is_dir():
        raise UserError(f"--output_path {str(path)!r} is a folder; name the CSV to write")
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(
                f"--output_path {str(path)!r} cannot be written: {fault.strerror}"
            ) from None


LIMITS = "limits"


def limits_main(arguments: Sequence[str]) -> int:
    """Measure, print and keep; returns 0, or 2 for wrong input."""
    built = Parser(
        prog=f"python -m dyndepth.timing {LIMITS}",
        description="Measure for which executed shares gathering the selected tokens is faster "
        "than computing all, and keep it for this device, precision and width.",
        allow_abbrev=False,
    )
    add = built.add_argument
    add("--model", default=EMBEDDED, help=f"{HELP['model']} (default: {EMBEDDED})")
    add("--tokens", type=int, default=512, help="of the forward (default: 512)")
    add("--repeats", type=int, default=15, help="rounds, 6 or more (default: 15)")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=CHOICES["dtype"], help=HELP["dtype"])
    add("--attn_implementation", choices=CHOICES["attn_implementation"])
    add("--threads", type=int, help="default: torch's own choice")
    try:
        _run_limits(built.parse_args([underscored(each) for each in arguments]))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def _run_limits(options: argparse.Namespace) -> None:
    """Load, measure, print, keep. Raises UserError for wrong input."""
    for name, least in (("tokens", max(COUNTS)), ("repeats", 6), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} takes a whole number of at least {least}, not {value}")
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.capacity import check_length
    from dyndepth.models.loading import load_model
    from dyndepth.runtime.gates import keep

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        steady_allocator()
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
    )
    check_length(model, options.tokens, "--tokens", f"it takes {max(COUNTS)} or more")
    found = measure_limits(model, options.tokens, options.repeats, say=print)
    print(f"gather attention up to {found.attention:g} and MLP up to {found.mlp:g} of the tokens,")
    print(f"in forwards of at least {found.tokens} tokens; kept in {keep(model, found)}")


if __name__ == "__main__":
    sys.exit(main())
