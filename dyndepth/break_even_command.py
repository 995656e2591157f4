"""The command line ``python -m dyndepth.timing break-even``: a table, a sentence, CSV and JSON."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.common.commands import CHOICES, HELP, Parser, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.options import EMBEDDED

if TYPE_CHECKING:
    from dyndepth.break_even import Curve


NAME = "break-even"
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


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns 0, or 2 for wrong input."""
    try:
        run(_parser().parse_args([underscored(each) for each in arguments]))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    columns = "\n".join(f"  {name}: {text}" for name, text in COLUMNS.items())
    built = Parser(
        prog=f"python -m dyndepth.timing {NAME}",
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


def run(options: argparse.Namespace) -> None:
    """Load, measure, print, write; the last line printed is one JSON document.

    Raises:
        UserError: wrong input; nothing was measured.
    """
    _check(options)
    import torch

    from dyndepth.break_even import Regime, measure
    from dyndepth.common.files import write_atomically
    from dyndepth.common.machine import conditions, steady_allocator
    from dyndepth.models.loading import load_model

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
        _show(curve, own)
        rows += own
    if options.output_path is not None:
        write_atomically(options.output_path, _csv(rows))
    print(json.dumps({"break_even": {"rows": rows}}))


def _check(options: argparse.Namespace) -> None:
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


def _show(curve: Curve, rows: Sequence[dict[str, Any]]) -> None:
    """The curve of one phase as a table, and what follows from it."""
    from rich.table import Table

    from dyndepth.common.commands import print_table

    one = rows[0]
    skipping = "both sublayers" if one["sublayers"] == "both" else f"{one['sublayers']} alone"
    router = f", with a router of {one['router']}" if one["router"] else ""
    title = f"{one['phase']} {one['batch']}x{one['length']}, {skipping}{router}"
    table = Table(
        title=f"{title}, on {one['model']}",
        caption=(
            f"{one['device_name']}, {one['dtype']}, {one['threads']} threads, "
            f"{one['attn_implementation']}, allocator {one['allocator']}, "
            f"load {one['load_average']}; {one['repeats']} rounds"
        ),
    )
    headings = ("skipped", "dense ms", "routed ms", "wall speedup", "95% interval")
    for heading in (*headings, "FLOPs speedup", "efficiency"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['skipped_fraction']:g}",
            f"{1000 * row['dense_median_s']:.1f}",
            f"{1000 * row['routed_median_s']:.1f}",
            f"{row['wall_speedup']:.3f}",
            f"{row['wall_speedup_low']:.3f} to {row['wall_speedup_high']:.3f}",
            f"{row['total_speedup']:.3f}",
            f"{row['wall_efficiency']:.2f}",
        )
    print_table(table)
    print(f"{title}: token routing {curve.break_even}.\n", flush=True)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, numbers with 10 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
