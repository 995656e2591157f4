"""Times as tables for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.common.printing import Column, print_columns
from dyndepth.results.noise import legend, loaded, told
from dyndepth.timing.measure import Row

if TYPE_CHECKING:
    from dyndepth.timing.break_even import Curve


def show_timing(title: str, rows: Sequence[Row]) -> None:
    """The rows of ``measure`` as a table. In a narrow terminal shares of the host, times, FLOPs and
    numbers of pairs go first; a speedup keeps its interval and its noise."""

    def of(heading: str, form: Callable[[Row], str], rank: int = 0, name: bool = False) -> Column:
        return Column(heading, [form(row) for row in rows], name=name, rank=rank)

    columns = [
        of("phase", lambda row: row["phase"], name=True),
        of("mode", lambda row: row["mode"], name=True),
        of("shape", lambda row: f"{row['batch']}x{row['length']}", name=True),
        of("dense ms", lambda row: f"{1000 * row['dense_median_s']:.1f}", 4),
        of("method ms", lambda row: f"{1000 * row['method_median_s']:.1f}", 4),
        of(WALL, _told),
        of("pairs", lambda row: str(row["repeats"]), 2),
        of("FLOPs speedup", lambda row: f"{row['total_speedup']:.3f}", 1),
        of("efficiency", lambda row: f"{row['wall_efficiency']:.2f}", 3),
    ]
    if any(row["busy_speedup"] is not None for row in rows):
        columns.append(of("busy speedup", lambda row: _known(row["busy_speedup"], "{:.3f}"), 5))
        columns.append(of("host share", _host_shares, 5))
    one = rows[0]
    about = f"{_conditions(one)}; decode: time of one step"
    print_columns(columns, title, _with_legend(about, columns))


def show_break_even(curve: Curve, rows: Sequence[dict[str, Any]]) -> None:
    """The curve of one phase as a table, and what follows from it."""
    one = rows[0]
    skipping = "both sublayers" if one["sublayers"] == "both" else f"{one['sublayers']} alone"
    router = f", with a router of {one['router']}" if one["router"] else ""
    title = f"{one['phase']} {one['batch']}x{one['length']}, {skipping}{router}"
    columns = [
        Column("skipped", [f"{row['skipped_fraction']:g}" for row in rows]),
        Column("dense ms", [f"{1000 * row['dense_median_s']:.1f}" for row in rows], rank=3),
        Column("routed ms", [f"{1000 * row['routed_median_s']:.1f}" for row in rows], rank=3),
        Column(WALL, [_told(row) for row in rows]),
        Column("FLOPs speedup", [f"{row['total_speedup']:.3f}" for row in rows], rank=1),
        Column("efficiency", [f"{row['wall_efficiency']:.2f}" for row in rows], rank=2),
    ]
    about = f"{_conditions(one)}; {one['repeats']} rounds"
    print_columns(columns, f"{title}, on {one['model']}", _with_legend(about, columns))
    print(f"{title}: token routing {curve.break_even}.\n", flush=True)


WALL = "wall speedup [95% interval]"


def _conditions(row: Row) -> str:
    return (
        f"{row['device_name']}, {row['dtype']}, {row['threads']} threads, "
        f"{row['attn_implementation']}, allocator {row['allocator']}, load {row['load_average']}"
    )


def _with_legend(about: str, columns: Sequence[Column]) -> str:
    (walls,) = (each.texts for each in columns if each.heading == WALL)
    return "; ".join(filter(None, (about, legend(walls))))


def _host_shares(row: Row) -> str:
    shares = (_known(row[f"{side}_host_share"], "{:.0%}") for side in ("dense", "method"))
    return ", ".join(filter(None, shares))


def _told(row: Row) -> str:
    ends = row["wall_speedup_low"], row["wall_speedup_high"]
    return told(row["wall_speedup"], *ends, row.get("suspect"), loaded(row), form="{:.3f}")


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
