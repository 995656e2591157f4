"""Times as tables for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.cells.times import temperature_of
from dyndepth.common.modes import EAGER
from dyndepth.common.printing import Column, print_columns
from dyndepth.results.noise import legend, loaded, told
from dyndepth.timing.measure import Row

if TYPE_CHECKING:
    from dyndepth.timing.break_even import Curve


def show_timing(title: str, rows: Sequence[Row]) -> None:
    """The rows of ``measure`` as a table, and below it what they say of latency, throughput and
    memory. In a narrow terminal shares of the host, FLOPs and numbers of pairs go first; a speedup
    keeps its interval and its noise."""

    def of(heading: str, form: Callable[[Row], str], rank: int = 0, name: bool = False) -> Column:
        return Column(heading, [form(row) for row in rows], name=name, rank=rank)

    columns = [
        of("phase", lambda row: row["phase"], name=True),
        of("mode", lambda row: row["mode"], name=True),
        of("shape", lambda row: f"{row['batch']}x{row['length']}", name=True),
        of(WALL, _told),
        of("pairs", lambda row: str(row["repeats"]), 2),
        of("FLOPs speedup", lambda row: f"{row['total_speedup']:.3f}", 1),
        of("efficiency", lambda row: _known(row["wall_efficiency"], "{:.2f}"), 3),
    ]
    if any(map(temperature_of, rows)):
        columns.insert(3, of("T", lambda row: f"{temperature_of(row):g}", name=True))
    if any(row["busy_speedup"] is not None for row in rows):
        columns.append(of("busy speedup", lambda row: _known(row["busy_speedup"], "{:.3f}"), 5))
        columns.append(of("host share", _host_shares, 5))
    one = rows[0]
    about = f"{_conditions(one)}; decode: time of one step"
    print_columns(columns, title, _with_legend(about, columns))
    _show_drafts(rows)
    _show_serving(rows)


def _show_drafts(rows: Sequence[Row]) -> None:
    """What became of drafts, and what was to be expected of them, beside the measured speedup."""
    drafts = [row for row in rows if row.get("tokens_per_verify") is not None]
    if not drafts:
        return

    def of(heading: str, form: Callable[[Row], str], rank: int = 0, name: bool = False) -> Column:
        return Column(heading, [form(row) for row in drafts], name=name, rank=rank)

    columns = [
        of("shape", lambda row: f"{row['batch']}x{row['length']}+{row['new_tokens']}", name=True),
        of("T", lambda row: f"{temperature_of(row):g}", name=True),
        of("accepted", lambda row: _known(row["acceptance"], "{:.0%}")),
        of("tokens a round", lambda row: f"{row['tokens_per_verify']:.2f}"),
        of("draft ms", lambda row: _known(row["draft_ms"], "{:.2f}")),
        of("verify ms", lambda row: f"{row['verify_ms']:.2f}"),
        of("speedup", _told),
        of("by bytes", lambda row: _known(row["predicted_speedup"], "{:.3f}")),
        of("by times", lambda row: _known(row["predicted_by_times"], "{:.3f}"), 1),
    ]
    if len({row["mode"] for row in drafts}) > 1:
        columns.insert(1, of("mode", lambda row: row["mode"], name=True))
    fitted = drafts[0]["fit_s"]
    more = "" if fitted is None else f"; the fit took {fitted:.0f} s"
    caption = (
        "accepted: of the drafted tokens; round: a draft and its verification; draft ms: of one "
        "token; by bytes, by times: the speedup predicted from the weights that are read, and from "
        f"the two times{more}"
    )
    print_columns(columns, "Drafts, verified by the whole model", caption)


def _show_serving(rows: Sequence[Row]) -> None:
    """A line a measure and shape: dense, the method, and how many times better that is."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        mode = f" {row['mode']}" if row["mode"] != EAGER else ""
        mode += f" T={temperature:g}" if (temperature := temperature_of(row)) else ""
        shapes.setdefault(f"{row['batch']}x{row['length']}{mode}", []).append(row)
    lines = [
        (shape, *line) for shape, own in shapes.items() for line in (*_times(own), *_memory(own))
    ]
    if not lines:
        return
    heads = ("shape", "measure", "dense", "method", "ratio")
    columns = [
        Column(head, texts, name=place < 2)
        for place, (head, texts) in enumerate(zip(heads, zip(*lines, strict=True), strict=True))
    ]
    caption = (
        "tokens/s: of decode; peak: above weights; cache: at the end; MB: 10^6 bytes; [..] are 95% "
        "intervals, of a ratio that of pairs"
    )
    print_columns(columns, "Latency, throughput and memory", caption)
    for fault in dict.fromkeys(filter(None, (row.get("compiled_error") for row in rows))):
        print(f"dense under torch.compile has no times: {fault}")


_MEASURES = (
    ("prefill", "ttft_ms", "TTFT ms"),
    ("decode", "tpot_ms", "TPOT ms"),
    ("decode", "tokens_per_s", "tokens/s"),
)


def _times(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The times of one shape, those against compiled dense last."""
    for side, ratio in (("dense", _told), ("compiled", _over_compiled)):
        for phase, name, heading in _MEASURES:
            for row in rows:
                if row["phase"] == phase and row.get(f"{side}_{name}") is not None:
                    more = ", compiled dense" if side == "compiled" else ""
                    times = (_time(row, f"{each}_{name}") for each in (side, "method"))
                    yield f"{heading}{more}", *times, ratio(row)


def _memory(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The larger phase's peak, and what the last phase keeps, of one shape."""
    for name, heading in (("peak_above_bytes", "peak MB"), ("cache_bytes", "cache MB")):
        sides: list[list[Any]] = [
            [row.get(f"{side}_{name}") for row in rows] for side in ("dense", "method")
        ]
        if None not in sides[0] + sides[1]:
            last = name == "cache_bytes"
            dense, method = (float(found[-1] if last else max(found)) for found in sides)
            ratio = f"{dense / method:.3f}" if method else ""
            yield heading, f"{dense / 1e6:.2f}", f"{method / 1e6:.2f}", ratio


def _time(row: Row, name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    ends = "no interval" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"
    return f"{value:.1f} {ends}"


def _over_compiled(row: Row) -> str:
    name = "speedup_over_compiled"
    return told(*(row.get(f"{name}{end}") for end in ("", "_low", "_high")), form="{:.3f}")


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
    threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
    return (
        f"{row['device_name']}, {row['dtype']}, {threads}, "
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
