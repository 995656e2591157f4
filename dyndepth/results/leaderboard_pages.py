"""The leaderboard for people: its data, as Markdown and as one HTML file that works offline.

``board`` turns cells and their leaderboard rows into plain data: one entry a method's parameters in
a setting, averaged over its seeds. ``html`` and ``markdown`` only write that down; the
page draws it in the browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import LEADING, UNHASHED, Row
from dyndepth.cells.naming import changed, lettered, recovered, titled
from dyndepth.cells.recipe import NONE
from dyndepth.common.files import write_atomically
from dyndepth.common.markup import markdown_table, plain
from dyndepth.results.conditions import conditions
from dyndepth.results.lossless import apart, as_html
from dyndepth.results.lossless import as_markdown as drafts_as_markdown
from dyndepth.results.lossless import on_page as on_drafts
from dyndepth.results.noise import LOADED, SUSPECT, headed, legend, named, noise, told
from dyndepth.results.published import HANDED, HANDS, known_well, nearest, published
from dyndepth.results.schema import TABLES, validate
from dyndepth.results.seeds import together
from dyndepth.results.serving import as_markdown, on_page
from dyndepth.results.shown import FEW, board_rows, folders, holds, interval, without_interval
from dyndepth.results.tables import as_csv

TEMPLATE = "leaderboard.html"
_PLACE = "__BOARD__"
_APART = "<!-- lossless -->\n"

SCORES = (
    ("mean_acc", "mean accuracy", 1, 3, True),
    ("retained", "accuracy retained, % of dense", 100, 1, True),
    ("bits_per_byte", "bits per byte", 1, 3, False),
    ("rouge_l", "ROUGE-L", 1, 3, True),
)
"""Scores over all tasks: column, label, factor for people, digits, whether larger is better."""

SEEDS = (
    "Where a setting ran with several seeds, its row is their mean, and the interval reaches from "
    "the lowest to the highest end of the seeds' intervals."
)
BOUNDS = "Bounds choose by the answers: they say what is possible and compete with nobody."
CONTROLS = "Controls are no methods of a paper: they say what a method is worth beside them."
PAPERS = (
    "As the sources state them, for other models, tasks and budgets than those measured here; they "
    "enter no average. Beside each stands the setting of the same method measured at the nearest "
    f"block FLOPs speedup, recovered in the same way or not at all. {HANDED}"
)

DOUBTS = (SUSPECT, LOADED)

_BY_SEED = frozenset({"cell", "seed"}) | UNHASHED - {"model"}

Board = dict[str, Any]
Spread = list[Any]
"""[value, low, high], the ends of the 95% interval None where there is none."""


def board(
    cells: Sequence[Cell], rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None = None
) -> Board:
    """Plain data (JSON types only) of the page: ``scores``, ``entries``, ``failed``,
    ``walls``, ``published``, ``serving``, ``conditions``, ``chance``, ``runs``, ``texts``; of
    lossless methods, which are no entries, a table ``lossless``, if there are any.

    ``rows`` are those of ``leaderboard(cells)``, in the same order. An interval is ``[value, low,
    high]``, its ends None where there is none; an entry's ``noise`` is what ``noise.noise`` says of
    its wall speedups. A cell that failed has no entry unless it has
    scores. Entries of one setting stand together; ``setting`` is its letter where there are
    several, and ``runs`` says what each letter stands for (``naming.lettered``; the argument: cell
    -> where it was read).
    """
    groups: dict[tuple[Any, ...], list[tuple[Cell, Row]]] = {}
    letters, stand_for = lettered(rows, folders(runs))
    words = {row["cell"]: found for row, found in zip(rows, letters, strict=True)}
    for cell, row in zip(cells, rows, strict=True):
        if cell.evaluated and not row.get("lossless"):
            key = tuple(row[name] for name in LEADING if name not in _BY_SEED)
            groups.setdefault(key, []).append((cell, row))
    scores = _scores(cells, rows)
    entries = [_entry(members, scores, words, rows) for members in groups.values()]
    entries.sort(key=lambda entry: (len(entry["setting"]), entry["setting"]))
    for entry in entries:
        _, *ends = entry["scores"].get("mean_acc", (None, None, None))
        entry["guessed"] = holds(entry["chance"], *ends)
    failed = [
        _labels(row, words)
        | {"seed": row["seed"], "cell": row["cell"], "error": str(row.get("error") or "")}
        for row in rows
        if row["status"] == "error"
    ]
    guesses = dict.fromkeys((e["setting"], e["chance"]) for e in entries if e["chance"] is not None)
    drafted = on_drafts(apart(board_rows(rows, folders(runs))[0])[1])
    return {
        "scores": list(scores.values()),
        "walls": [{"key": key, "label": text} for key, text in headed(rows).items()],
        "entries": entries,
        "failed": failed,
        "published": _published(rows, words),
        "serving": on_page(rows, letters),
        "conditions": conditions(rows),
        "chance": _chance(list(guesses), any(entry["guessed"] for entry in entries)),
        "few": without_interval(rows),
        "runs": stand_for,
        "texts": {"seeds": SEEDS, "bounds": BOUNDS, "controls": CONTROLS, "papers": PAPERS}
        | {"walls": f"Beside wall-clock: {legend()}."},
        **({"lossless": drafted} if drafted else {}),
    }


def _entry(
    members: Sequence[tuple[Cell, Row]],
    scores: dict[str, Row],
    words: dict[str, str],
    rows: Sequence[Row],
) -> Row:
    """The entry of cells that differ in their seeds alone; ``rows`` are those of all cells."""
    from dyndepth.cells.cell import is_dense
    from dyndepth.results.leaderboard import is_control

    members = sorted(members, key=lambda member: member[1]["seed"])
    own = [row for _, row in members]
    row = together(own)
    by_task = together([_by_task(cell) for cell, _ in members])
    found = {
        key: _spread(row if any(key == fixed for fixed, *_ in SCORES) else by_task, key)
        for key in scores
    }
    walls = {key: _wall(row, key) for key in headed(rows)}
    return _labels(own[0], words) | {
        "seeds": [row["seed"] for row in own],
        "cells": [row["cell"] for row in own],
        "bound": bool(row["bound"]),
        "control": is_control(row),
        "dense": is_dense(members[0][0]),
        "chance": row.get("chance"),
        "scores": {key: value for key, value in found.items() if value is not None},
        "pairs": row.get("wall_repeats"),
        "load": row.get("wall_load"),
        "block": _spread(row, "block_speedup"),
        "total": _spread(row, "total_speedup"),
        **walls,
        "noise": {
            key: noise(*spread, *(key in named(row, one) for one in DOUBTS))
            for key, spread in walls.items()
            if spread is not None
        },
    }


def _chance(found: Sequence[tuple[str, float]], marked: bool) -> str:
    """What guesses score, in a few words; by setting where that differs, and what ``FEW`` says
    where it stands. Empty if unknown."""
    values = {f"{value:.3f}": setting for setting, value in reversed(found)}
    if len(values) < 2:
        text = "".join(f"chance: {value}" for value in values)
    else:
        text = "chance: " + ", ".join(f"{value:.3f} ({setting})" for setting, value in found)
    return f"{text}; {FEW}: it is inside of the interval" if marked else text


def html(found: Board) -> str:
    """The page as one file: no request leaves it."""
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Nothing in the data may end the element that holds it.
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    template = resources.files("dyndepth.results").joinpath(TEMPLATE).read_text(encoding="utf-8")
    template = template.replace(_APART, as_html(found.get("lossless", {})), 1)
    return template.replace(_PLACE, text, 1)


# --- the data -------------------------------------------------------------------------------------


def _labels(row: Row, words: dict[str, str]) -> Row:
    """Names of a row; ``words`` has the letter of its setting, by cell."""
    recovery, model, letter = recovered(row), str(row["model"]), words[row["cell"]]
    parts = [*changed(row), f"+ {recovery}" if recovery != NONE else ""]
    return {
        "model": model,
        "setting": letter,
        "label": ", ".join(filter(None, (titled(row), letter))),
        "method": str(row["method"]),
        "name": titled(row),
        "variant": ", ".join(filter(None, parts)),
        "parameters": str(row["parameters"] or ""),
        "phases": str(row["phases"]),
        "recovery": recovery,
        "dtype": str(row["dtype"]),
        "target": float(row["target_speedup"]),
    }


def _scores(cells: Iterable[Cell], rows: Sequence[Row]) -> dict[str, Row]:
    """The scores that some cell has, by key: those over all tasks first."""
    found: dict[str, Row] = {}
    for key, title, factor, digits, higher in SCORES:
        if any(row.get(key) is not None for row in rows):
            found[key] = {"key": key, "label": title, "factor": factor, "digits": digits}
            found[key] |= {"higher": higher, "task": "all tasks"}
    for cell in cells:
        for row in cell.accuracy:
            key = _key(row)
            if row["value"] is not None and key not in found:
                found[key] = {"key": key, "label": f"{row['task']}: {_metric(row)}", "factor": 1}
                better = row.get("higher_is_better") is not False
                found[key] |= {"digits": 3, "higher": better, "task": row["task"]}
    return found


def _key(row: Row) -> str:
    return f"{row['task']}/{row['metric']},{row.get('filter', NONE)}"


def _metric(row: Row) -> str:
    plain = row.get("filter", NONE) == NONE
    return str(row["metric"]) if plain else f"{row['metric']} ({row['filter']})"


def _by_task(cell: Cell) -> Row:
    """Value by task and metric, and its interval (``_low``, ``_high``) by the standard error; none
    of few documents."""
    from dyndepth.results.leaderboard import Z95
    from dyndepth.results.statistics.intervals import LEAST

    found: Row = {}
    for row in cell.accuracy:
        value, error = row["value"], row.get("stderr")
        if value is None or value != value:
            continue
        found[_key(row)] = float(value)
        if error is not None and error == error and (row.get("n") or 0) >= LEAST:
            # What is not negative has no negative end either, and what is a share none above 1; the
            # normal law does not know it.
            low, high = value - Z95 * error, value + Z95 * error
            low = max(0.0, low) if value >= 0 else low
            high = min(1.0, high) if _is_share(cell, row) else high
            found |= {f"{_key(row)}_low": low, f"{_key(row)}_high": high}
    return found


def _is_share(cell: Cell, row: Row) -> bool:
    """True for a metric that lies between 0 and 1 on every document, and is better the larger:
    an accuracy, an F1 or ROUGE, but no bits per byte."""
    if row.get("higher_is_better") is False or row["value"] > 1:
        return False
    key = f"{row['metric']},{row.get('filter', NONE)}"
    outcomes = (
        json.loads(sample["outcomes"]).get(key)
        for sample in cell.samples
        if sample["task"] == row["task"]
    )
    known = [value for value in outcomes if value is not None]
    return bool(known) and all(0 <= value <= 1 for value in known)


def _spread(row: Row, key: str) -> Spread | None:
    # A share of dense's score is told with its interval or not at all.
    if row.get(key) is None or (key == "retained" and row.get("retained_low") is None):
        return None
    return [row[key], row.get(f"{key}_low"), row.get(f"{key}_high")]


def _wall(row: Row, key: str) -> Spread | None:
    value = row.get(f"wall_{key}_speedup")
    if value is None:
        return None
    return [value, row.get(f"wall_{key}_low"), row.get(f"wall_{key}_high")]


def _published(rows: Sequence[Row], words: dict[str, str]) -> list[Row]:
    """Papers' rows of the methods on the board, each with the nearest measured setting."""
    scored = [row for row in rows if row.get("mean_acc") is not None or row.get("bits_per_byte")]
    present = {str(row["method"]) for row in scored}
    measured = list(filter(known_well, scored))
    found = []
    for row in published():
        if row["method"] not in present:
            continue
        near = nearest(row, measured)
        beside = None
        if near is not None:
            beside = _labels(near, words) | {
                "block": near["block_speedup"],
                **{key: _spread(near, key) for key, *_ in SCORES},
            }
        found.append({**row, "hand_told": HANDS[row["hand"]], "measured": beside})
    return found


NAMES = ("leaderboard.csv", "leaderboard.md", "leaderboard.html")
"""What the command writes."""


def texts(
    cells: Sequence[Cell], rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """The table for programs, a page for people and one for browsers, by file name, of ``NAMES``.

    Raises UserError if a value cannot be in the table.
    """

    validate(NAMES[0], rows)
    found = board(cells, rows, runs)
    return dict(
        zip(NAMES, (as_csv(rows, TABLES[NAMES[0]].own), markdown(found), html(found)), strict=True)
    )


def write(
    cells: Sequence[Cell],
    rows: Sequence[Row],
    folder: Path,
    runs: Mapping[str, Sequence[str]] | None = None,
) -> list[Path]:
    """Write all of ``texts`` and return where. Raises as it does, before anything is written."""
    for name, text in texts(cells, rows, runs).items():
        write_atomically(folder / name, text)
    return [folder / name for name in NAMES]


PAGES = ("leaderboard.md", "leaderboard.html")
"""What a run may have for people."""


def markdown(found: Board) -> str:
    """Markdown of what ``board`` gives: competitors and controls, bounds, failed
    cells, what papers report, conditions."""
    fixed = [score for score in found["scores"] if any(score["key"] == key for key, *_ in SCORES)]
    competitors = [entry for entry in found["entries"] if not entry["bound"]]
    bounds = [entry for entry in found["entries"] if entry["bound"]]
    lines = ["# Leaderboard", ""]
    drafted = len(found.get("lossless", {}).get("rows", ()))
    lines += [_sentence(competitors, bounds, found["failed"], drafted), ""]
    lines += _entries(competitors, fixed, found["walls"])
    if found["runs"]:
        lines += ["", "Settings:", "", *(f"- {plain(text)}" for text in found["runs"])]
    if any(entry["noise"] for entry in found["entries"]):
        lines += ["", found["texts"]["walls"]]
    if found["few"]:
        lines += ["", f"{found['few'][0].upper()}{found['few'][1:]}."]
    if found["chance"] and any(score["key"] == "mean_acc" for score in fixed):
        lines += ["", f"Mean accuracy by {found['chance']}."]
    if any(len(entry["seeds"]) > 1 for entry in found["entries"]):
        lines += ["", SEEDS]
    if any(entry["control"] for entry in competitors):
        lines += ["", CONTROLS]
    if bounds:
        lines += ["", "## Bounds", "", BOUNDS, "", *_entries(bounds, fixed, found["walls"])]
    lines += drafts_as_markdown(found.get("lossless", {}))
    lines += as_markdown(found["serving"])
    if found["failed"]:
        failed = [
            [one["label"], f"{one['target']:g}x", str(one["seed"]), one["cell"], one["error"]]
            for one in found["failed"]
        ]
        heads = ("method", "target", "seed", "cell", "error")
        lines += ["", "## Failed cells", "", markdown_table(heads, failed)]
    if found["published"]:
        lines += ["", "## Reported by papers", "", PAPERS, "", *_papers(found["published"])]
    lines += ["", "## Conditions", ""]
    lines += [f"- {key}: {plain('; '.join(values))}" for key, values in found["conditions"].items()]
    return "\n".join(lines) + "\n"


def _entries(entries: Sequence[Row], scores: Sequence[Row], walls: Sequence[Row]) -> list[str]:
    several = len({entry["model"] for entry in entries}) > 1
    heads = ["model"] if several else []
    heads += ["method", "target", "seeds", *(score["label"] for score in scores)]
    heads += ["block FLOPs", "total FLOPs", *(wall["label"] for wall in walls)]
    timed = any(entry["pairs"] is not None for entry in entries)
    heads += ["pairs", "load"] if timed else []
    rows = []
    for entry in entries:
        texts = [entry["model"]] if several else []
        name = ", ".join(filter(None, (entry["name"], entry["setting"])))
        name += " (control)" if entry["control"] else ""
        texts += [name, f"{entry['target']:g}x", str(len(entry["seeds"]))]
        for score in scores:
            guessed = score["key"] == "mean_acc" and entry["guessed"]
            text = _interval(entry["scores"].get(score["key"]), score["factor"], score["digits"])
            texts.append(FEW * guessed + text)
        texts += [_interval(entry[key], 1, 2, "x") for key in ("block", "total")]
        texts += [_told(entry, wall["key"]) for wall in walls]
        texts += [_plain(entry["pairs"]), _plain(entry["load"])] if timed else []
        rows.append(texts)
    return [markdown_table(heads, rows)]


def _told(entry: Row, key: str) -> str:
    value, low, high = entry[key] or (None, None, None)
    doubts = (word in entry["noise"].get(key, "") for word in ("suspect", "loaded"))
    return told(value, low, high, *doubts)


def _papers(rows: Sequence[Row]) -> list[str]:
    heads = ["method", "model", "budget", "task", "metric", "dense", "reported", "measured nearest"]
    heads += ["hand", "source", "note"]
    lines = []
    for row in rows:
        near = row["measured"]
        beside = ""
        if near is not None:
            kept = _interval(near["retained"], 100, 0, "% of dense's accuracy")
            bits = _interval(near["bits_per_byte"], 1, 3, " bits per byte")
            beside = (
                f"{near['label']} at {near['block']:.2f}x: {', '.join(filter(None, (kept, bits)))}"
            )
        recovery = row.get("recovery") or ""
        method = " ".join(filter(None, (row["method"], row["parameters"])))
        method += f" + {recovery}" if recovery not in ("", "none") else ""
        texts = [method, row["model"], f"{row['speedup']:g}x {row['unit_of_speedup']}"]
        texts += [row["task"], row["metric"], _plain(row["dense_value"]), _plain(row["value"])]
        lines.append([*texts, beside, HANDS[row["hand"]], row["source"], row["note"]])
    return [markdown_table(heads, lines)]


def _sentence(
    competitors: Sequence[Row], bounds: Sequence[Row], failed: Sequence[Row], drafted: int
) -> str:
    controls = [entry for entry in competitors if entry["control"]]
    exact = f"{drafted} of lossless methods, " if drafted else ""
    methods = len({entry["method"] for entry in competitors if not entry["control"]})
    return (
        f"{methods} methods in {len(competitors) - len(controls)} settings, {len(controls)} "
        f"settings of controls, {len(bounds)} of bounds, {exact}{len(failed)} failed cells. "
        "Intervals are 95%; speedups are ratios to dense: achieved block and total FLOPs, and "
        "measured time in prefill and decode."
    )


def _interval(
    found: Sequence[float | None] | None, factor: float, digits: int, unit: str = ""
) -> str:
    return "" if found is None else interval(*found, scale=factor, digits=digits, unit=unit)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
