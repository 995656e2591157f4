"""The command line ``python -m dyndepth.timing``: one method on one model, as a table and JSON.

With ``break-even`` as its first word: from which skipped fraction on token routing pays; with
``limits``: for which shares gathering tokens does.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dyndepth.common.commands import CHOICES, HELP, MODE_DEFAULT, Parser, run
from dyndepth.common.digests import PACKAGE
from dyndepth.common.errors import UserError
from dyndepth.common.modes import EAGER
from dyndepth.common.paths import EMBEDDED, check_file, path_of
from dyndepth.data.capacity import check_length
from dyndepth.models.shapes import is_shape
from dyndepth.timing.console import as_csv, show_break_even, show_timing
from dyndepth.timing.levels import LEVELS, Level, check_shapes, level_of, modes_of, parse_shapes
from dyndepth.timing.limits import COUNTS, measure_limits
from dyndepth.timing.measure import check_recordable, in_modes, measure
from dyndepth.timing.random_tokens import RandomTokens, fit_without_text

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kinds = {BREAK_EVEN: _break_even, LIMITS: _limits}
    first = given[0].replace("_", "-") if given else ""
    if first in kinds:
        return run("timing", kinds[first], given[1:])
    return run("timing", _timing, given)


def _timing(given: list[str]) -> None:
    """Time one method; the last line printed is one JSON document."""
    if given and not given[0].startswith("-"):
        raise UserError(
            f"there is no timing {given[0]!r}; say {BREAK_EVEN} or {LIMITS}, or give flags alone"
        )
    parser = Parser(
        "timing",
        "Time a method against the stock model, in interleaved pairs.",
        f"`dyndepth timing {BREAK_EVEN} --help`: from which skipped fraction on routing pays; "
        f"`dyndepth timing {LIMITS} --help`: when tokens are gathered.",
    )
    add = parser.add_argument
    parser.method("time", required=True)
    parser.speedup(None, "1.5, or what the method names")
    add("--timing", choices=list(LEVELS), default="quick", help="how thoroughly (default: quick)")
    add("--timing_shapes", nargs="+", metavar="SHAPES", help=HELP["timing_shapes"])
    add("--compiled_dense", action="store_true", help=HELP["compiled_dense"])
    add("--mode", choices=CHOICES["mode"], help=f"{HELP['mode']} (default: {MODE_DEFAULT})")
    parser.model(shapes=True)
    parser.shared("corpus", EMBEDDED)
    parser.whole("seed", 0, "of the method, texts and order", 0)
    options = parser.parse_args(given)

    from dyndepth.models.loading import (
        SPREAD,
        layer_count,
        load_tokenizer,
        loaded,
        longest_window,
        named,
        resolve_device,
    )

    which = named(vars(options))
    method = _method(options, layer_count(*which))
    most = longest_window(*which)
    device = resolve_device(options.device).partition(":")[0]
    spread = options.device == SPREAD
    modes = modes_of(options.mode or (EAGER if spread else None), options.timing, device)
    level = _asked(options, device)
    check_shapes(most, level, device)
    check_length(most, method.window_length, method.name)

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.fitting.fits import fit_cached

    steady_allocator()
    corpus: Any
    if is_shape(options.model):
        corpus = _random_tokens(options)
        model = loaded(vars(options))
        check_recordable(model, options.mode)
        method = fit_without_text(method, model)
    else:
        corpus = load_corpus(options.corpus, load_tokenizer(*which))
        model = loaded(vars(options))
        check_recordable(model, options.mode)
        method = fit_cached(method, model, corpus)
    how: dict[str, Any] = {"level": level, "seed": options.seed}
    how["compiled_dense"] = options.compiled_dense
    with own_warnings_as_sentences():
        rows = in_modes(
            modes, options.mode, lambda mode: measure(model, method, corpus, mode=mode, **how)
        )
    show_timing(f"{method!r} on {options.model}", rows)
    if not sys.stdout.isatty():
        # For programs; in a terminal so long a line would push the table out of sight.
        print(
            json.dumps({"timing": {"method": repr(method), "model": options.model, "rows": rows}})
        )


@contextmanager
def own_warnings_as_sentences() -> Iterator[None]:
    """What the suite warns of is printed to standard error as it reads, without a line of code;
    what a library warns of as ever."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
            print(f"dyndepth.timing: {message}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _asked(options: argparse.Namespace, device: str) -> str | Level:
    """The level; with shapes of one's own it has no name."""
    if options.timing_shapes is None:
        return str(options.timing)
    shapes = parse_shapes(",".join(options.timing_shapes))
    return replace(level_of(options.timing, device), shapes=shapes)


def _random_tokens(options: argparse.Namespace) -> RandomTokens:
    """What a model of random weights reads. Raises UserError for a text of one's own."""
    from dyndepth.models.loading import checked_config, named

    if options.corpus != EMBEDDED:
        raise UserError(f"{options.model} has no tokenizer to read --corpus with; leave it out")
    print(f"{options.model} has random weights and no tokenizer: it reads random tokens")
    return RandomTokens(checked_config(*named(vars(options))))


def _method(options: argparse.Namespace, layers: int) -> DynamicDepthMethod:
    """The method at the speedup asked for, or at a default that it can reach."""
    from dyndepth.common.registry import load_method, parse_methods

    named = any("target_speedup" in parameters for _, parameters in parse_methods(options.methods))
    method = load_method(options.methods, seed=options.seed)
    if method.uses_labels:
        raise UserError(
            f"{method.name} is a bound: what it runs follows from the documents that are scored, "
            "or from a look ahead that the clock would see; a sweep times those that can be timed"
        )
    reach = method.max_speedup(layers)
    speedup = options.speedups
    if speedup is None:
        speedup = method.target_speedup if named else min(1.5, reach)
    if not speedup <= reach:
        raise UserError(
            f"{method.name} reaches a speedup of {reach:.4g} on {layers} blocks, not {speedup:g}"
        )
    return load_method(options.methods, seed=options.seed, target_speedup=speedup)


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
    "device ... timing_code": "conditions: device, dtype, threads, cores, attention, allocator, "
    "load, and a digest of the code that times",
}


def _break_even(given: list[str]) -> None:
    """Measure, print, write; the last line printed is one JSON document."""
    columns = "\n".join(f"  {name}: {text}" for name, text in COLUMNS.items())
    built = Parser(
        f"timing {BREAK_EVEN}",
        "From which skipped fraction on does token routing pay on this machine? Random token "
        "masks, given and not computed, timed in turns with the stock model.",
        f"columns of the CSV, a row for each phase and fraction:\n{columns}",
    )
    add = built.add_argument
    built.model(shapes=True)
    add("--passes", nargs="+", choices=PHASES, default=PHASES, help="to be timed (default: both)")
    built.whole("batch_size", 1, "sequences", 1)
    built.whole("length", 1, "tokens of the prompt", 512)
    built.number(
        "fractions",
        lambda fraction: 0 < fraction < 1,
        "numbers between 0 and 1",
        f"skipped fractions (default: {' '.join(map(str, FRACTIONS))})",
        FRACTIONS,
        nargs="+",
        metavar="FRACTION",
    )
    add(
        "--sublayers",
        choices=("both", "attention", "mlp"),
        default="both",
        help="that skip (default: both)",
    )
    built.whole(
        "router", 0, "hidden size of a two-layer router timed along in each block; 0: none", 0
    )
    built.whole("repeats", 6, "rounds", 15)
    built.whole("seed", 0, "of masks, tokens and order", 0)
    add("--output_path", type=path_of, metavar="FILE", help="CSV to write")
    options = built.parse_args(given)
    if options.output_path is not None:
        check_file("output_path", options.output_path, "CSV")

    from dyndepth.common.files import write_atomically
    from dyndepth.common.machine import steady_allocator
    from dyndepth.models.loading import loaded
    from dyndepth.timing.break_even import Regime
    from dyndepth.timing.break_even import measure as measure_curve
    from dyndepth.timing.conditions import conditions

    model = loaded(vars(options))
    if model.device.type == "cpu":
        steady_allocator()
    rows: list[dict[str, Any]] = []
    for phase in dict.fromkeys(options.passes):
        regime = Regime(
            phase, options.batch_size, options.length, options.sublayers, options.router
        )
        curve = measure_curve(
            model, regime, options.fractions, repeats=options.repeats, seed=options.seed
        )
        own = [row | {"model": options.model} | conditions(model) for row in curve.rows()]
        show_break_even(curve, own)
        rows += own
    if options.output_path is not None:
        write_atomically(options.output_path, as_csv(rows))
    print(json.dumps({"break_even": {"rows": rows}}))


LIMITS = "limits"


def _limits(given: list[str]) -> None:
    """Measure, print, keep."""
    built = Parser(
        f"timing {LIMITS}",
        "Measure for which executed shares gathering the selected tokens is faster than computing "
        "all, and keep it for this device, precision and width.",
    )
    built.model(shapes=True)
    built.whole("tokens", max(COUNTS), "of the forward, 256 or more", 512)
    built.whole("repeats", 6, "rounds", 15)
    options = built.parse_args(given)

    from dyndepth.common.machine import steady_allocator
    from dyndepth.models.loading import loaded
    from dyndepth.runtime.limits import keep

    model = loaded(vars(options))
    if model.device.type == "cpu":
        steady_allocator()
    check_length(model, options.tokens, "--tokens", f"it takes {max(COUNTS)} or more")
    found = measure_limits(model, options.tokens, options.repeats, say=print)
    print(f"gather attention up to {found.attention:g} and MLP up to {found.mlp:g} of the tokens,")
    print(f"in forwards of at least {found.tokens} tokens; kept in {keep(model, found)}")


if __name__ == "__main__":
    sys.exit(main())
