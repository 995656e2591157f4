"""How methods stand against the best other one at each budget: the first page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dyndepth.cells.cell import DENSE
from dyndepth.cells.identity import Row
from dyndepth.cells.naming import label
from dyndepth.common.errors import UserError
from dyndepth.common.printing import Column, print_columns
from dyndepth.common.registry import is_shipped
from dyndepth.common.spec import split
from dyndepth.results.curve_tables import NO_COMPETITOR
from dyndepth.results.statistics.peers import full_name

MAIN = ("bits_per_byte", "acc", "rougeL")
"""Metrics that stand for a task, the first that it has; tasks of the first of them lead."""
ENOUGH = 3
"""Methods of the suite on the page where none was asked for."""
UNSURE = "not shown: the interval holds 0, or p is above 0.05 after Holm's correction"
VERDICTS = {"better": "better", "worse": "worse", "no difference shown": "not shown"}


NOTHING = "nothing to compare: no task has scores on single documents of a method and dense"
LISTED = "they write what dense writes and save no FLOPs; `dyndepth leaderboard RUN` lists them"


def asked(rows: Sequence[Row], methods: str | None, lossless: Sequence[str] = ()) -> list[str]:
    """Names (``naming.label``) of the curves in equal_flops' ``rows`` that ``methods`` names, as
    ``one,other(layer=3)``: a method's name alone means its curve by default, or else all of its
    curves. ``lossless``: names of the lossless methods, which have none.

    Raises:
        UserError: there is none of that name.
    """
    there = {label(row): str(row["method"]) for row in rows}
    found: dict[str, None] = {}
    for name in split(methods or ""):
        fits = [one for one in there if one == name.strip()]
        fits = fits or [one for one, method in there.items() if method == name.strip()]
        if not fits and any(name.strip() in (one, one.partition("(")[0]) for one in lossless):
            raise UserError(f"{name.strip()} is lossless, and such are not compared: {LISTED}")
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
    apart: Mapping[str, Sequence[str]] | None = None,
    lossless: Sequence[str] = (),
) -> None:
    """Print the page. For each of ``names`` every task; without names one task each: first the
    user's own methods (those that do not come with the suite), then the best of the others, none
    of ``controls`` (names of methods), no bound, and nothing that failed. ``lossless``: names of
    methods that are left out, which the last line tells.

    ``rows`` are those of equal_flops.csv; ``letters``: cell -> letter of its setting; ``apart``:
    cell -> what its setting has apart (``naming.apart``).
    """
    of_blocks = [row for row in rows if row.get("task") and row["flops"] == "block"]
    scores = _main(of_blocks)
    curves: dict[Key, list[Row]] = {}
    for row in of_blocks:
        if (row["task"], row["metric"]) in scores:
            curves.setdefault((row["setting"], label(row), row["recovery"]), []).append(row)
    # What failed has its own line, below the page.
    curves = {key: own for key, own in curves.items() if own[0]["cells"]}
    if not curves:
        print(NOTHING if not lossless else "nothing to compare: all methods but dense are lossless")
    else:
        _show(of_blocks, curves, scores, names, controls, letters, apart)
    if lossless:
        print(f"left out, as lossless: {', '.join(lossless)}: {LISTED}")


def _show(
    of_blocks: Sequence[Row],
    curves: Mapping[Key, list[Row]],
    scores: Sequence[tuple[str, str]],
    names: Sequence[str],
    controls: frozenset[str],
    letters: Mapping[str, str] | None,
    apart: Mapping[str, Sequence[str]] | None,
) -> None:
    known = _labels(of_blocks)
    if names:
        chosen = {key: own for key, own in curves.items() if key[1] in names}
    else:
        chosen = _first(curves, scores, controls)
    for key, own in chosen.items():
        there = [score for score in scores if any(_score(row) == score for row in own)]
        name = ", ".join(filter(None, (key[1], _of(letters, own))))
        there = there if names else there[:1]
        if not any(row.get("value") is not None for row in own if _score(row) in there):
            print(f"{name}: {'; '.join(_reasons(own))}\n")
            continue
        _print_one(name, own, there, known)
        alone = _alone(name, key, own, curves, controls, letters or {}, apart or {})
        print(f"{alone}\n" if alone else "")
    if not names:
        able = {key[1]: None for key, own in curves.items() if _competes(own, controls)}
        more = [name for name in able if name not in {key[1] for key in chosen}]
        if more:
            methods = "methods" if len(more) > 1 else "method"
            print(f"{len(more)} more {methods}: {', '.join(more)}")
        print("all tasks of a method: --methods NAME")


Key = tuple[str, str, str]
"""Setting, name and recovery of a curve."""


def _first(
    curves: Mapping[Key, list[Row]],
    scores: Sequence[tuple[str, str]],
    controls: frozenset[str],
) -> dict[Key, list[Row]]:
    """The curves of the first page: the user's own, and the best of the others by the first score;
    where there is nothing else, whatever was measured."""
    able = {key: own for key, own in curves.items() if _competes(own, controls)} or curves
    by_rank = sorted(able.items(), key=lambda item: _place(item[1], scores[0]))
    owned = [item for item in by_rank if not is_shipped(str(item[1][0]["method"]))]
    rest = [item for item in by_rank if is_shipped(str(item[1][0]["method"]))]
    rest = [(key, own) for key, own in rest if any(row.get("value") is not None for row in own)]
    return dict([*owned, *rest[:ENOUGH]])


def _competes(own: Sequence[Row], controls: frozenset[str]) -> bool:
    return not own[0]["bound"] and own[0]["method"] not in controls


def _score(row: Row) -> tuple[str, str]:
    return row["task"], row["metric"]


def _cell(own: Sequence[Row]) -> str:
    return str(own[0]["cells"]).partition(" ")[0]


def _of(letters: Mapping[str, str] | None, own: Sequence[Row]) -> str:
    return (letters or {}).get(_cell(own), "")


def _alone(
    name: str,
    key: Key,
    own: Sequence[Row],
    curves: Mapping[Key, list[Row]],
    controls: frozenset[str],
    letters: Mapping[str, str],
    apart: Mapping[str, Sequence[str]],
) -> str:
    """Why a curve has no other beside it, and what to do; empty if it has one or its values have
    another reason to be missing."""
    values = [row for row in own if row.get("value") is not None]
    if not values or any(row.get("competitor") for row in values):
        return ""
    others = [rows for rows in curves.values() if rows is not own and not rows[0]["bound"]]
    if beside := [rows for rows in others if rows[0]["setting"] == key[0]]:
        if any(rows[0]["recovery"] == key[2] for rows in beside):
            return f"{name} stands alone: no other reaches these budgets; --at takes others"
        return f"{name} stands alone: no other was run with its recovery"
    real = [rows for rows in others if _competes(rows, controls)] or others
    real.sort(key=lambda rows: not is_shipped(str(rows[0]["method"])))
    partner = next(
        (str(r[0]["method"]) for r in real if r[0]["method"] != own[0]["method"]), "NAME"
    )
    remedy = (
        f"`dyndepth sweep --methods '{own[0]['method']},{partner}'` with the same flags scores "
        "both alike"
    )
    if not others:
        return f"{name} stands alone: no other method was run in its setting; {remedy}"
    mine, theirs = (list(apart.get(_cell(rows), ())) for rows in (own, real[0]))
    sides = [", ".join(word for word in a if word not in b) or "the rest" for a, b in
             ((mine, theirs), (theirs, mine))]  # fmt: skip
    where = ", ".join(filter(None, (label(real[0][0]), _of(letters, real[0]))))
    return (
        f"{name} stands alone: it was scored with {sides[0]}, the others with {sides[1]} "
        f"({where}), and only what was scored alike is paired; {remedy}"
    )


def _print_one(
    name: str,
    own: Sequence[Row],
    scores: Sequence[tuple[str, str]],
    known: Mapping[tuple[str, str], str],
) -> None:
    rows = [row for score in scores for row in own if _score(row) == score]
    documents = max((row["n"] for row in rows if row.get("n")), default=0)
    tasks = [f"{row['task']} {row['metric']} ({_better(row)})" for row in rows]
    columns = [
        Column("budget", [f"{row['reference_speedup']:g}x" for row in rows]),
        Column("value", [_told(row, "value") for row in rows]),
    ]
    if paired := any(row.get("competitor") for row in rows):
        columns += [
            Column("best other", [_other(row, known) for row in rows], name=True),
            Column("its value", [_told(row, "competitor_value") for row in rows], rank=1),
            Column("difference", [_difference(row, "competitor_difference") for row in rows]),
            Column("verdict", [_verdict(row) for row in rows]),
        ]
    else:
        columns += [
            Column("dense", [_told(row, "dense_value") for row in rows]),
            Column("difference", [_difference(row, "difference") for row in rows]),
        ]
    verdicts = [text for each in columns for text in each.texts]
    unsure = [UNSURE] if "not shown" in verdicts else []
    said = (f"{documents} documents at most", "[..]: 95% intervals", *unsure, *_reasons(rows))
    other = "the best other at equal block FLOPs" if paired else DENSE
    print_columns(columns, f"{name} against {other}", "; ".join(said), tasks, parted=True)


def _reasons(rows: Sequence[Row]) -> list[str]:
    """What the empty entries of a table mean, each once; budgets beyond a curve's ends in x."""
    found: dict[str, None] = {}
    for row in rows:
        if row.get("value") is None and row.get("fraction_low"):
            found[_measured(row)] = None
        elif row.get("reason") and row["reason"] != NO_COMPETITOR:
            found[str(row["reason"])] = None
    return list(found)


def _measured(row: Row) -> str:
    """The budgets that a curve covers, which ``row``'s is outside of."""
    ends = [1 / row["fraction_high"], 1 / row["fraction_low"]]
    budget = row["reference_speedup"]
    # Two digits, unless they would put the budget inside.
    digits = 2 if round(ends[0], 2) > budget or round(ends[1], 2) < budget else 4
    low, high = (f"{end:.{digits}f}x" for end in ends)
    return f"measured up to {high}" if row["fraction_high"] == 1 else f"measured {low} to {high}"


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


def _difference(row: Row, key: str) -> str:
    value, low, high = (row.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _verdict(row: Row) -> str:
    if row.get("value") is None:
        return "not measured"
    return VERDICTS.get(str(row["verdict"]), "-")


def _better(row: Row) -> str:
    return "more is better" if row["higher_is_better"] else "less is better"
