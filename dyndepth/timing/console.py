"""Times as tables for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.results.noise import LEGEND, told
from dyndepth.timing.measure import Row

if TYPE_CHECKING:
    from dyndepth.timing.break_even import Curve


def show_timing(title: str, rows: Sequence[Row]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dyndepth.common.commands import print_table

    one = rows[0]
    table = Table(
        title=title,
        caption=(
            f"{one['device_name']}, {one['dtype']}, {one['threads']} threads, "
            f"{one['attn_implementation']}, allocator {one['allocator']}, "
            f"load {one['load_average']}; decode: time of one step; {LEGEND}"
        ),
    )
    headings = ["phase", "mode", "batch", "length", "dense ms", "method ms"]
    headings += ["wall speedup [95% interval]", "pairs", "FLOPs speedup", "efficiency"]
    on_gpu = any(row["busy_speedup"] is not None for row in rows)
    headings += ["busy speedup", "host share"] if on_gpu else []
    for heading in headings:
        left = heading in ("phase", "mode")
        table.add_column(escape(heading), justify="left" if left else "right")
    for row in rows:
        texts = [
            row["phase"],
            row["mode"],
            str(row["batch"]),
            str(row["length"]),
            f"{1000 * row['dense_median_s']:.1f}",
            f"{1000 * row['method_median_s']:.1f}",
            _told(row),
            str(row["repeats"]),
            f"{row['total_speedup']:.3f}",
            f"{row['wall_efficiency']:.2f}",
        ]
        if on_gpu:
            texts.append(_known(row["busy_speedup"], "{:.3f}"))
            shares = (_known(row[f"{side}_host_share"], "{:.0%}") for side in ("dense", "method"))
            texts.append(", ".join(filter(None, shares)))
        table.add_row(*map(escape, texts))
    print_table(table)


def show_break_even(curve: Curve, rows: Sequence[dict[str, Any]]) -> None:
    """The curve of one phase as a table, and what follows from it."""
    from rich.markup import escape
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
            f"load {one['load_average']}; {one['repeats']} rounds; {LEGEND}"
        ),
    )
    headings = ("skipped", "dense ms", "routed ms", "wall speedup [95% interval]")
    for heading in (*headings, "FLOPs speedup", "efficiency"):
        table.add_column(escape(heading), justify="right")
    for row in rows:
        table.add_row(
            f"{row['skipped_fraction']:g}",
            f"{1000 * row['dense_median_s']:.1f}",
            f"{1000 * row['routed_median_s']:.1f}",
            escape(_told(row)),
            f"{row['total_speedup']:.3f}",
            f"{row['wall_efficiency']:.2f}",
        )
    print_table(table)
    print(f"{title}: token routing {curve.break_even}.\n", flush=True)


def _told(row: Row) -> str:
    ends = row["wall_speedup_low"], row["wall_speedup_high"]
    return told(row["wall_speedup"], *ends, bool(row.get("suspect")), form="{:.3f}")


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, numbers with 10 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
