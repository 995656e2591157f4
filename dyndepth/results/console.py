"""Leaderboards and comparisons as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dyndepth.cells.identity import Row
from dyndepth.cells.naming import apart, label
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.common.commands import print_table
from dyndepth.results.leaderboard import APART, is_control
from dyndepth.results.noise import LEGEND, headed, told_of

MARKS = {
    "better": "better",
    "worse": "worse",
    "no difference shown": "not shown",
    "reference": "dense",
    "not comparable": "-",
}

_SETTING = (
    *("model_fingerprint", "tokenizer_fingerprint", "dtype", "device", "attn_implementation"),
    *("limit", "sample_seed"),
    *("num_fewshot", "batch_size", "harness_code", "torch", "transformers", "lm_eval", "dyndepth"),
)
"""Columns of the leading ones that tell settings apart."""

Column = tuple[str, Callable[[Row], str]]


def show_comparison(tables: dict[str, list[Row]]) -> None:
    """Print every table of ``comparison.compared``: one a setting, task and metric."""
    kept = "kept: value / dense's; P: no competitor is as good at as few FLOPs"
    _each(tables["comparison"], "against dense", _COMPARISON, kept)
    area = "area: mean value over the range measured; SDR: points lost a percent of speedup"
    _each(tables["curves"], "whole curves", _CURVES, area)
    rank = "rank: among methods of one recovery that reach the budget, bounds apart"
    rows = sorted(tables["equal_flops"], key=_by_rank)
    _each(rows, "at equal FLOPs", _EQUAL_FLOPS, rank)


def _by_rank(row: Row) -> tuple[float, str, float]:
    return row["reference_speedup"], row["recovery"], row.get("rank", math.inf)


def _each(rows: Sequence[Row], what: str, columns: Sequence[Column], caption: str) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        if row.get("task"):
            shared = row.get("setting") or str([row[key] for key in _SETTING])
            key = row["model"], shared, row["task"], row["metric"], row.get("flops")
            groups.setdefault(key, []).append(row)
    several = len({key[:2] for key in groups}) > 1
    for (model, _, task, metric, flops), own in groups.items():
        better = "more is better" if own[0]["higher_is_better"] else "less is better"
        documents = max((row["n"] for row in own if row.get("n")), default=0)
        where = f", {model} {own[0]['dtype']} {own[0]['device']}" if several else ""
        note = f"{better}, {documents} documents; [..] are 95% intervals\n{caption}"
        table = Table(
            title=escape(f"{task} {metric}, {what}{f' ({flops})' if flops else ''}{where}"),
            title_justify="left",
            caption=escape(note),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("method", overflow="fold")
        for heading, _ in columns:
            left = heading == "verdict"
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in own:
            name = label(row) + (" (bound)" if row["bound"] else "")
            table.add_row(*map(escape, [name, *(text(row) for _, text in columns)]))
        print_table(table)
        _reasons(own)


def _reasons(rows: Iterable[Row]) -> None:
    """Say below a table what its empty entries mean."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("reason"):
            found.setdefault(row["reason"], []).append(label(row))
    for reason, who in found.items():
        print(f"  {', '.join(dict.fromkeys(who))}: {reason}")


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def _spread(key: str, low: str, high: str, form: str = "{:.3f}") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if row.get(key) is None:
            return ""
        value = form.format(row[key])
        if row.get(low) is None:
            return value
        return f"{value} [{form.format(row[low])}, {form.format(row[high])}]"

    return text


def _verdict(row: Row) -> str:
    text = MARKS[row["verdict"]]
    return f"{text} P" if row.get("pareto") else text


def _target(row: Row) -> str:
    seed = f" seed {row['seed']}" if row["seed"] else ""
    return f"{row['target_speedup']:g}x{seed}"


def _p(row: Row) -> str:
    value: Any = row.get("p_holm")
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


_COMPARISON: tuple[Column, ...] = (
    ("target", _target),
    ("FLOPs", _number("block_fraction", "{:.3f}")),
    ("value", _number("value", "{:.3f}")),
    ("- dense", _spread("difference", "low", "high", "{:+.3f}")),
    ("kept", _number("retained", "{:.2f}")),
    ("p Holm", _p),
    ("verdict", _verdict),
)

_CURVES: tuple[Column, ...] = (
    ("points", _number("points", "{}")),
    ("FLOPs", lambda row: _range(row)),
    ("area", _number("area", "{:.3f}")),
    ("SDR", _spread("sdr", "sdr_low", "sdr_high", "{:.2f}")),
    (
        "- hardest other",
        _spread("area_difference", "area_difference_low", "area_difference_high", "{:+.3f}"),
    ),
    ("verdict", _verdict),
)

_EQUAL_FLOPS: tuple[Column, ...] = (
    ("budget", _number("reference_speedup", "{:g}x")),
    ("value", _number("value", "{:.3f}")),
    ("- dense", _number("difference", "{:+.3f}")),
    ("rank", lambda row: f"{row['rank']}/{row['competitors']}" if row.get("rank") else ""),
    (
        "- best other",
        _spread(
            "competitor_difference",
            "competitor_difference_low",
            "competitor_difference_high",
            "{:+.3f}",
        ),
    ),
    ("p Holm", _p),
    ("verdict", _verdict),
)


def _range(row: Row) -> str:
    if row.get("fraction_low") is None:
        return ""
    return f"{row['fraction_low']:.2f}-{row['fraction_high']:.2f}"


def show_leaderboard(rows: Sequence[Row], title: str = "Leaderboard") -> None:
    """Print leaderboard rows as a table. A row of a bound, a control or a failure says so by its
    name; rows of several settings say what theirs has apart."""
    from rich.markup import escape
    from rich.table import Table

    caption = f"[..] are 95% intervals; prefill and decode are wall-clock, {LEGEND}"
    table = Table(title=title, caption=escape(caption), caption_justify="left")
    several = len({row["model"] for row in rows}) > 1
    settings = [
        ", ".join(word for word in words if word != row["model"])
        for row, words in zip(rows, apart(rows), strict=True)
    ]
    headings = ["model"] if several else []
    headings += ["setting"] if any(settings) else []
    recovered = any(row["recovery"] != NONE for row in rows)
    headings += ["method", "parameters", "phases", "target", "seed"]
    headings += ["recovery"] if recovered else []
    headings += ["mean acc", "% of dense"]
    walls = headed(rows)
    headings += ["bits/byte", "ROUGE-L", "block", "total", *walls.values()]
    numeric = set(headings) - {"model", "setting", "method", "parameters", "phases", "recovery"}
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left")
    for row, words in zip(rows, settings, strict=True):
        name = str(row["method"])
        name += " (bound)" if row["bound"] else " (control)" if is_control(row) else ""
        name += " FAILED" if row["status"] == "error" else ""
        texts = [str(row["model"])] if several else []
        texts += [words] if any(settings) else []
        texts += [name, str(row["parameters"]), str(row["phases"])]
        texts += [f"{row['target_speedup']:g}x", str(row["seed"])]
        texts += [shortened(str(row["recovery"]))] if recovered else []
        texts.append(_interval(row, "mean_acc", 1, 3))
        texts.append(_interval(row, "retained", 100, 0))
        texts += [_figure(row.get(key), "{:.3f}") for key in APART]
        texts += [_figure(row.get(f"{kind}_speedup"), "{:.2f}x") for kind in ("block", "total")]
        texts += [told_of(row, key) for key in walls]
        table.add_row(*map(escape, texts))
    print_table(table)


def _interval(row: Row, key: str, scale: float, digits: int) -> str:
    if row.get(key) is None:
        return ""
    value, low, high = (row[name] * scale for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _figure(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
