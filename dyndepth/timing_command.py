"""The command line ``python -m dyndepth.timing``: one method on one model, as a table and JSON.

With ``break-even`` as its first word it is that of ``dyndepth.break_even_command``, with ``limits``
that of ``dyndepth.limits_command``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyndepth import break_even_command, limits_command
from dyndepth.common.commands import CHOICES, Parser
from dyndepth.common.errors import UserError
from dyndepth.data.capacity import check_length
from dyndepth.timing import LEVELS, Row, check_shapes, measure

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one method; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for command in (break_even_command, limits_command):
        if given[:1] == [command.NAME]:
            return command.main(given[1:])
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
        epilog=f"`python -m dyndepth.timing {break_even_command.NAME} --help`: from which skipped "
        f"fraction on routing pays; `{limits_command.NAME} --help`: when tokens are gathered.",
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
    from dyndepth.fits import fit_cached
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
    _show(f"{method!r} on {options.model}", rows)
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


def _show(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    one = rows[0]
    table = Table(
        title=title,
        caption=(
            f"{one['device_name']}, {one['dtype']}, {one['threads']} threads, "
            f"{one['attn_implementation']}, allocator {one['allocator']}, "
            f"load {one['load_average']}; decode: time of one step"
        ),
    )
    headings = "phase", "batch", "length", "dense ms", "method ms", "wall speedup", "95% interval"
    for heading in (*headings, "pairs", "FLOPs speedup", "efficiency", ""):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in rows:
        table.add_row(
            row["phase"],
            str(row["batch"]),
            str(row["length"]),
            f"{1000 * row['dense_median_s']:.1f}",
            f"{1000 * row['method_median_s']:.1f}",
            f"{row['wall_speedup']:.3f}",
            f"{row['wall_speedup_low']:.3f} to {row['wall_speedup_high']:.3f}",
            str(row["repeats"]),
            f"{row['total_speedup']:.3f}",
            f"{row['wall_efficiency']:.2f}",
            "suspect" if row["suspect"] else "",
        )
    Console().print(table)
