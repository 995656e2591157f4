"""Times as tables for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.timing.measure import Row

if TYPE_CHECKING:
    from dyndepth.timing.break_even import Curve


def show_timing(title: str, rows: Sequence[Row]) -> None:
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


def show_break_even(curve: Curve, rows: Sequence[dict[str, Any]]) -> None:
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


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, numbers with 10 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
