"""Leaderboards and comparisons as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dyndepth.cells.identity import CHAT, Row
from dyndepth.cells.naming import label, lettered
from dyndepth.common.printing import Column, print_columns
from dyndepth.results.lossless import apart
from dyndepth.results.lossless import show as show_drafts
from dyndepth.results.serving import show_serving
from dyndepth.results.shown import about, board_rows, by_chance, chosen, headings

MARKS = {
    "better": "better",
    "worse": "worse",
    "no difference shown": "not shown",
    "reference": "dense",
    "lossless": "lossless",
    "not comparable": "-",
}

_SETTING = (
    *("model_fingerprint", "tokenizer_fingerprint", "dtype", "device", "attn_implementation"),
    *("limit", "sample_seed"),
    *CHAT,
    *("num_fewshot", "batch_size", "harness_code", "torch", "transformers", "lm_eval", "dyndepth"),
)
"""Columns of the leading ones that tell settings apart."""

Told = tuple[str, Callable[[Row], str], int]
"""Heading, text, and ``Column.rank``."""


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
        names = [label(row) + (" (bound)" if row["bound"] else "") for row in own]
        print_columns(
            [
                Column("method", names, name=True),
                *(
                    Column(heading, [text(row) for row in own], rank=rank)
                    for heading, text, rank in columns
                ),
            ],
            f"{task} {metric}, {what}{f' ({flops})' if flops else ''}{where}",
            f"{better}, {documents} documents; [..]: 95% intervals; {caption}",
        )
        _reasons(own)
        print()


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
    ("target", _target, 0),
    ("FLOPs", _number("block_fraction", "{:.3f}"), 2),
    ("value", _number("value", "{:.3f}"), 0),
    ("- dense", _spread("difference", "low", "high", "{:+.3f}"), 0),
    ("kept", _number("retained", "{:.2f}"), 3),
    ("p Holm", _p, 1),
    ("verdict", _verdict, 0),
)

_CURVES: tuple[Told, ...] = (
    ("points", _number("points", "{}"), 2),
    ("FLOPs", lambda row: _range(row), 1),
    ("area", _number("area", "{:.3f}"), 0),
    ("SDR", _spread("sdr", "sdr_low", "sdr_high", "{:.2f}"), 3),
    (
        "- hardest other",
        _spread("area_difference", "area_difference_low", "area_difference_high", "{:+.3f}"),
        0,
    ),
    ("verdict", _verdict, 0),
)

_EQUAL_FLOPS: tuple[Told, ...] = (
    ("budget", _number("reference_speedup", "{:g}x"), 0),
    ("value", _number("value", "{:.3f}"), 0),
    ("- dense", _number("difference", "{:+.3f}"), 2),
    ("rank", lambda row: f"{row['rank']}/{row['competitors']}" if row.get("rank") else "", 1),
    (
        "- best other",
        _spread(
            "competitor_difference",
            "competitor_difference_low",
            "competitor_difference_high",
            "{:+.3f}",
        ),
        0,
    ),
    ("p Holm", _p, 3),
    ("verdict", _verdict, 0),
)


def _range(row: Row) -> str:
    if row.get("fraction_low") is None:
        return ""
    return f"{row['fraction_low']:.2f}-{row['fraction_high']:.2f}"


def show_leaderboard(
    rows: Sequence[Row],
    title: str = "Leaderboard",
    runs: Mapping[str, Sequence[str]] | None = None,
    keys: Sequence[str] | None = None,
) -> None:
    """Print leaderboard rows as a table, seeds averaged, in the order of the page. A row of a
    bound, a control or a failure says so by its name; those of lossless methods have a table of
    their own; rows of several settings have letters, which
    stand below with where they were read (``runs``: cell -> paths). A narrow terminal leaves out
    what matters least; ``keys`` are the columns to show (default: what the rows need)."""
    found, stand_for = board_rows(rows, runs)
    found, drafted = apart(found)
    shown = chosen(found, keys)
    columns = [
        Column(
            heading,
            [each.text(row) for row in found],
            name=each.name,
            rank=0 if keys else each.rank,
            dim=[each.key == "mean_acc" and by_chance(row) for row in found],
        )
        for each, heading in zip(shown, headings(shown, found), strict=True)
    ]
    groups = [(row["bound"], None if row["bound"] else row["target_speedup"]) for row in found]

    def caption(kept: Sequence[Column]) -> str:
        return about(found, [text for each in kept for text in each.texts])

    if found or not drafted:
        print_columns(columns, title, caption, groups)
    show_drafts(drafted)
    for text in stand_for:
        print(text)
    show_serving(rows, lettered(rows, runs)[0])
