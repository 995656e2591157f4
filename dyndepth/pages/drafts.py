"""Generated blocks on drafts: what of them was accepted in a study's run, and what that would come
to on models of public shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dyndepth.cells.naming import label
from dyndepth.pages.markdown import table
from dyndepth.results.numbers import number

if TYPE_CHECKING:
    from dyndepth.pages.blocks import Source
    from dyndepth.results.numbers import Record

ALL = "all"


def acceptances(source: Source, options: dict[str, Any]) -> str:
    """What of each draft is accepted: a row a draft and target. Option ``folder``."""
    rows = source.rows(options["folder"], "acceptance.csv")
    if not rows:
        return _missing(options["folder"])
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != ALL]
    lines = []
    for own in _by_cell(rows):
        whole = own[ALL]
        lines.append(
            (
                f"`{label(whole)}`",
                f"{float(whole['target_speedup']):g}x",
                number(whole["draft_share"], "{:.2f}"),
                *(number(own[task]["accepted_share"], "{:.2f}") for task in tasks),
                number(whole["chance"], "{:.2f}"),
                number(whole["tokens_per_verify"], "{:.2f}"),
                f"{_identical(whole)} of {whole['documents']}",
            )
        )
    headings = ("draft", "target", "share of depth", *(f"accepted, {task}" for task in tasks))
    return table((*headings, "of judged", "tokens a verification", "texts as dense's"), lines)


def predictions(source: Source, options: dict[str, Any]) -> str:
    """What the drafts should come to on public shapes, by bytes: a row a draft, a column a shape.

    Options: ``folder``; ``target``: of the drafts.
    """
    rows = source.rows(options["folder"], "predictions.csv")
    if not rows:
        return _missing(options["folder"])
    rows = [row for row in rows if float(row["target_speedup"]) == float(options["target"])]
    shapes = {row["shape"]: row for row in rows}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        speed = number(row["best_predicted_speedup"], "{:.2f}x")
        never = row["best_length"] == "0"
        told = f"needs {number(row['break_even'], '{:.2f}')}" if never else speed
        told += "" if never else f" at {row['best_length']}"
        found.setdefault(row["cell"], {"name": f"`{label(row)}`", "chance": row["chance"]})
        found[row["cell"]][row["shape"]] = told
    lines = [
        ("LM head's share of a step's bytes", "", *_of_shapes(shapes.values(), "head_share")),
        *(
            (own["name"], number(own["chance"], "{:.2f}"), *(own[shape] for shape in shapes))
            for own in sorted(found.values(), key=lambda own: -float(own["chance"]))
        ),
    ]
    return table(("draft", "of judged", *shapes), lines)


def _of_shapes(rows: Iterable[Record], column: str) -> list[str]:
    return [number(row[column], "{:.2f}") for row in rows]


def _by_cell(rows: Iterable[Record]) -> list[dict[str, Record]]:
    """The rows of each cell by task, deepest drafts of a method first."""
    found: dict[str, dict[str, Record]] = {}
    for row in rows:
        found.setdefault(row["cell"], {})[row["task"]] = row
    place = lambda own: (label(own[ALL]), float(own[ALL]["target_speedup"]))  # noqa: E731
    return sorted(found.values(), key=place)


def _identical(row: Record) -> int:
    return round(float(row["identical"]) * int(row["documents"]))


def _missing(folder: str) -> str:
    return f"No run of it is committed in `{folder}` yet."
