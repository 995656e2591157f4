"""Leaderboards and comparisons as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dyndepth.cells.identity import CHAT, Row
from dyndepth.cells.naming import apart, label
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.common.commands import print_table
from dyndepth.common.printing import Column, narrow, print_columns
from dyndepth.results.leaderboard import APART, is_control
from dyndepth.results.noise import headed, legend, told_of
from dyndepth.results.serving import show_serving

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
    *CHAT,
    *("num_fewshot", "batch_size", "harness_code", "torch", "transformers", "lm_eval", "dyndepth"),
)
"""Columns of the leading ones that tell settings apart."""

Told = tuple[str, Callable[[Row], str]]


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


def _each(rows: Sequence[Row], what: str, columns: Sequence[Told], caption: str) -> None:
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


_COMPARISON: tuple[Told, ...] = (
    ("target", _target),
    ("FLOPs", _number("block_fraction", "{:.3f}")),
    ("value", _number("value", "{:.3f}")),
    ("- dense", _spread("difference", "low", "high", "{:+.3f}")),
    ("kept", _number("retained", "{:.2f}")),
    ("p Holm", _p),
    ("verdict", _verdict),
)

_CURVES: tuple[Told, ...] = (
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

_EQUAL_FLOPS: tuple[Told, ...] = (
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
    name; rows of several settings say what theirs has apart. In a narrow terminal a method stands
    with its parameters in one column, and what matters least is left out; a time never."""
    settings = [
        ", ".join(word for word in words if word != row["model"])
        for row, words in zip(rows, apart(rows), strict=True)
    ]

    def of(heading: str, form: Callable[[Row], str], rank: int = 0, name: bool = False) -> Column:
        return Column(heading, [form(row) for row in rows], name=name, rank=rank)

    columns = []
    if len({row["model"] for row in rows}) > 1:
        columns.append(of("model", lambda row: str(row["model"]), name=True))
    if any(settings):
        columns.append(Column("setting", settings, name=True))
    together = narrow(TOGETHER)
    columns.append(of("method", _short if together else _name, name=True))
    if not together:
        columns.append(of("parameters", lambda row: str(row["parameters"]), name=True))
    columns += [
        of("phases", lambda row: str(row["phases"]), _unless_apart(rows, "phases", 9), name=True),
        of("target", lambda row: f"{row['target_speedup']:g}x"),
        of("seed", lambda row: str(row["seed"]), _unless_apart(rows, "seed", 9)),
    ]
    if any(row["recovery"] != NONE for row in rows) and not together:
        columns.append(of("recovery", lambda row: shortened(str(row["recovery"])), name=True))
    columns += [
        of("mean acc", lambda row: _interval(row, "mean_acc", 1, 3), 3),
        of("% of dense", lambda row: _interval(row, "retained", 100, 0), 5),
        *(of(head, _number(key, "{:.3f}"), 4) for head, key in zip(_APART, APART, strict=True)),
        of("block", _number("block_speedup", "{:.2f}x"), 2),
        of("total", _number("total_speedup", "{:.2f}x"), 6),
    ]
    walls = [
        Column(text, [told_of(row, key) for row in rows]) for key, text in headed(rows).items()
    ]
    meant = legend(text for each in walls for text in each.texts)
    caption = "[..] are 95% intervals; prefill and decode are wall-clock"
    print_columns([*columns, *walls], title, "; ".join(filter(None, (caption, meant))))
    show_serving(rows, lambda row: f"{_short(row)} {row['target_speedup']:g}x")


_APART = ("bits/byte", "ROUGE-L")
"""Headings of ``APART``."""


def _unless_apart(rows: Sequence[Row], key: str, rank: int) -> int:
    """``rank``, or a lower one where rows differ in ``key``: they are told apart by it."""
    return rank if len({str(row[key]) for row in rows}) == 1 else 1


TOGETHER = 120
"""Columns of a terminal below which a method's name, parameters and recovery are one text."""


def _name(row: Row) -> str:
    return str(row["method"]) + _kind(row)


def _short(row: Row) -> str:
    return label(row) + _kind(row)


def _kind(row: Row) -> str:
    kind = " (bound)" if row["bound"] else " (control)" if is_control(row) else ""
    return kind + (" FAILED" if row["status"] == "error" else "")


def _interval(row: Row, key: str, scale: float, digits: int) -> str:
    if row.get(key) is None:
        return ""
    value, low, high = (row[name] * scale for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
