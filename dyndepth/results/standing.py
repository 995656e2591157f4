"""How methods stand against the best other one at each budget: the first page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dyndepth.cells.identity import Row
from dyndepth.cells.naming import label
from dyndepth.common.errors import UserError
from dyndepth.common.printing import Column, print_columns
from dyndepth.common.spec import split
from dyndepth.results.statistics.peers import full_name

MAIN = ("bits_per_byte", "acc", "rougeL")
"""Metrics that stand for a task, the first that it has; tasks of the first of them lead."""
ENOUGH = 3
"""Methods on the page where none was asked for."""
UNSURE = "not shown: the interval holds 0, or p is above 0.05 after Holm's correction"
VERDICTS = {"better": "better", "worse": "worse", "no difference shown": "not shown"}


def asked(rows: Sequence[Row], methods: str | None) -> list[str]:
    """Names (``naming.label``) of the curves in equal_flops' ``rows`` that ``methods`` names, as
    ``one,other(layer=3)``: a method's name alone means its curve by default, or else all of its
    curves.

    Raises:
        UserError: there is none of that name.
    """
    there = {label(row): str(row["method"]) for row in rows}
    found: dict[str, None] = {}
    for name in split(methods or ""):
        fits = [one for one in there if one == name.strip()]
        fits = fits or [one for one, method in there.items() if method == name.strip()]
        if not fits:
            raise UserError(
                f"there is no curve of {name.strip()!r}; --methods takes {', '.join(there)}"
            )
        found |= dict.fromkeys(fits)
    return list(found)


def show_standing(
    rows: Sequence[Row],
    names: Sequence[str],
    controls: frozenset[str] = frozenset(),
    letters: Mapping[str, str] | None = None,
) -> None:
    """Print the page. For each of ``names`` every task; without names the first task for the best
    methods, none of ``controls`` (names of methods) and no bound.

    ``rows`` are those of equal_flops.csv; ``letters``: cell -> letter of its setting.
    """
    of_blocks = [row for row in rows if row.get("task") and row["flops"] == "block"]
    scores = _main(of_blocks)
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in of_blocks:
        if (row["task"], row["metric"]) in scores:
            curves.setdefault((row["setting"], label(row), row["recovery"]), []).append(row)
    if not curves:
        print("nothing to compare: no task has scores on single documents of a method and dense")
        return
    known = _labels(of_blocks)
    chosen = {key: own for key, own in curves.items() if key[1] in names}
    if not names:
        scores = scores[:1]
        able = {
            key: own
            for key, own in curves.items()
            if not own[0]["bound"]
            and own[0]["method"] not in controls
            and any(row.get("competitor") for row in own)
        } or curves
        chosen = dict(sorted(able.items(), key=lambda item: _place(item[1], scores[0]))[:ENOUGH])
    for (_, name, _), own in chosen.items():
        letter = (letters or {}).get(str(own[0]["cells"]).partition(" ")[0], "")
        _print_one(", ".join(filter(None, (name, letter))), own, scores, known)
    if not names and len(able) > ENOUGH:
        print(
            f"{len(able) - ENOUGH} more methods, and all tasks of one: --methods NAME, of "
            f"{', '.join(dict.fromkeys(name for _, name, _ in able))}"
        )


def _print_one(
    name: str,
    own: Sequence[Row],
    scores: Sequence[tuple[str, str]],
    known: Mapping[tuple[str, str], str],
) -> None:
    rows = [row for score in scores for row in own if (row["task"], row["metric"]) == score]
    documents = max((row["n"] for row in rows if row.get("n")), default=0)
    tasks = [f"{row['task']} {row['metric']} ({_better(row)})" for row in rows]
    columns = [
        Column("budget", [f"{row['reference_speedup']:g}x" for row in rows]),
        Column("value", [_told(row, "value") for row in rows]),
        Column("best other", [_other(row, known) for row in rows], name=True),
        Column("its value", [_told(row, "competitor_value") for row in rows], rank=1),
        Column("difference", [_difference(row) for row in rows]),
        Column("verdict", [_verdict(row) for row in rows]),
    ]
    reasons = dict.fromkeys(str(row["reason"]) for row in rows if row.get("reason"))
    verdicts = [text for each in columns for text in each.texts]
    unsure = [UNSURE] if "not shown" in verdicts else []
    said = (f"{documents} documents at most", "[..]: 95% intervals", *unsure, *reasons)
    caption = "; ".join(said)
    title = f"{name} against the best other at equal block FLOPs"
    print_columns(columns, title, caption, tasks, parted=True)
    print()


def _main(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Task and metric that stand for each task, in the order of ``MAIN``."""
    there: dict[str, list[str]] = {}
    for row in rows:
        there.setdefault(row["task"], []).append(row["metric"])
    found = [
        (task, next((metric for metric in MAIN if metric in metrics), metrics[0]))
        for task, metrics in there.items()
    ]
    return sorted(found, key=lambda one: MAIN.index(one[1]) if one[1] in MAIN else len(MAIN))


def _labels(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Setting and name of a competitor as the table has it -> the short name."""
    return {(row["setting"], full_name(row)): label(row) for row in rows}


def _place(own: Sequence[Row], score: tuple[str, str]) -> tuple[float, float]:
    """The mean rank over the budgets of one score that were measured: the best first."""
    ranks = [
        float(row["rank"])
        for row in own
        if (row["task"], row["metric"]) == score and row.get("rank")
    ]
    return (sum(ranks) / len(ranks), -len(ranks)) if ranks else (float("inf"), 0)


def _other(row: Row, known: Mapping[tuple[str, str], str]) -> str:
    if not row.get("competitor"):
        return ""
    found = known.get((row["setting"], row["competitor"]), str(row["competitor"]))
    # Those of a curve have its recovery.
    return found.partition(" + ")[0]


def _told(row: Row, key: str) -> str:
    return "" if row.get(key) is None else f"{row[key]:.3f}"


def _difference(row: Row) -> str:
    value, low, high = (row.get(f"competitor_difference{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _verdict(row: Row) -> str:
    if row.get("value") is None:
        return "not measured"
    return VERDICTS.get(str(row["verdict"]), "-")


def _better(row: Row) -> str:
    return "more is better" if row["higher_is_better"] else "less is better"
