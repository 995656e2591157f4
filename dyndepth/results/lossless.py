"""Methods that draft and verify, in a leaderboard: columns of their own, and a table that is apart.

They write what the whole model writes and save no FLOPs, so that beside others they would be a win
that is none, or a loss that is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.cells.naming import titled
from dyndepth.common.markup import markdown_table
from dyndepth.common.printing import Column, print_columns
from dyndepth.results.noise import headed, legend, told_of

DRAWN = "decode, drawn"

TITLE = "Lossless: drafted and verified"
_MEANT = (
    "These methods write what the whole model writes: part of it drafts tokens, all of it verifies "
    "them. They save no FLOPs and compete with nobody on them; what they may save is time. Draft: "
    "the speedup asked of the draft alone. Accepted: share of drafted tokens that the whole model "
    "takes, wherever the text ended. Tokens a pass: written for each pass of the whole model. "
    "Total FLOPs: dense's over all, drafts included"
)
_TIMED = {
    "decode": "Decode: measured against dense, of the likeliest tokens",
    DRAWN: "Drawn: against dense that draws its tokens, too",
}


def drafts(cell: Cell) -> Row:
    """The columns of leaderboard.csv that tell what became of a cell's drafts; none where there
    were none."""
    rows = [row for row in cell.compute if row.get("drafted") is not None]
    if not rows:
        return {}
    drafted, accepted, passes, written = (
        sum(row[key] for row in rows) for key in ("drafted", "accepted", "verifications", "written")
    )
    by_task = {row["task"]: row["accepted"] / row["drafted"] for row in rows if row["drafted"]}
    return {
        "acceptance": accepted / drafted if drafted else None,
        "acceptance_by_task": _text(by_task) or None,
        "tokens_per_verify": written / passes if passes else None,
    }


def _text(by_task: Mapping[str, float]) -> str:
    return ",".join(f"{task}={share:.4f}" for task, share in by_task.items())


def shares(text: str | None) -> dict[str, float]:
    """Accepted shares by task, of ``acceptance_by_task``."""
    pairs = (part.rpartition("=") for part in (text or "").split(",") if part)
    return {task: float(share) for task, _, share in pairs}


def together(texts: Iterable[str | None]) -> str | None:
    """``acceptance_by_task`` of several seeds: the mean of each task."""
    found: dict[str, list[float]] = {}
    for text in texts:
        for task, share in shares(text).items():
            found.setdefault(task, []).append(share)
    return _text({task: sum(own) / len(own) for task, own in found.items()}) or None


def apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows that may stand beside each other, and those of lossless methods."""
    kept = [row for row in rows if not row.get("lossless")]
    return kept, [row for row in rows if row.get("lossless")]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of lossless rows of ``shown.board_rows``, one a method, target and
    setting; the first is the name."""
    tasks = list(dict.fromkeys(task for row in rows for task in shares(_of(row, "by_task"))))
    walls = headed(rows)
    timed = {key: name for key, name in walls.items() if _any(rows, f"wall_{key}_speedup")}
    headings = ["method", "draft"]
    seeds = any(len(row["seeds"]) > 1 for row in rows)
    headings += ["seeds"] if seeds else []
    headings += ["accepted", *(f"in {task}" for task in tasks if len(tasks) > 1), "tokens a pass"]
    headings += ["total FLOPs", *timed.values()]
    drawn = _any(rows, "wall_drawn_speedup")
    predicted = _any(rows, "predicted_speedup")
    headings += [DRAWN] * drawn + ["decode predicted"] * predicted
    lines = []
    for row in rows:
        by_task = shares(_of(row, "by_task"))
        failed = " FAILED" if row["status"] == "error" else ""
        name = titled(row) + failed
        line = [", ".join(filter(None, (name, str(row["run"] or ""))))]
        line += [f"{row['target_speedup']:g}x"]
        line += [str(len(row["seeds"]))] if seeds else []
        line += [_share(row.get("acceptance"))]
        line += [_share(by_task.get(task)) for task in tasks if len(tasks) > 1]
        line += [_number(row.get("tokens_per_verify")), _number(row.get("total_speedup"), "x")]
        line += [told_of(row, key) for key in timed]
        line += [told_of(row, "drawn")] if drawn else []
        line += [_number(row.get("predicted_speedup"), "x")] if predicted else []
        lines.append(line)
    return headings, lines


def caption(headings: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """What the columns of ``table`` mean, and the words in them; only of those that are there."""
    timed = [said for key, said in _TIMED.items() if any(own.startswith(key) for own in headings)]
    words = legend(text for row in rows for text in row)
    return ". ".join((_MEANT, *timed)) + (f"; {words}" if words else "")


def _of(row: Mapping[str, Any], what: str) -> str | None:
    return row.get(f"acceptance_{what}")


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def show(rows: Sequence[Row]) -> None:
    """Print the table of lossless rows; nothing where there are none."""
    if not rows:
        return
    headings, lines = table(rows)
    columns = [
        Column(heading, texts, name=not place, rank=0 if place < 4 else 1)
        for place, (heading, *texts) in enumerate(zip(headings, *lines, strict=True))
    ]

    def said(kept: Sequence[Column]) -> str:
        return caption([each.heading for each in kept], [each.texts for each in kept])

    print_columns(columns, TITLE, said)


def on_page(rows: Sequence[Row]) -> dict[str, Any]:
    """The table as plain data of a page, ``headings`` and ``rows``; nothing where there are none.
    Cells that failed without a score are told elsewhere."""
    headings, lines = table([row for row in rows if row["documents"] or row["status"] == "done"])
    return {"headings": headings, "rows": lines} if lines else {}


def as_markdown(page: Mapping[str, Any]) -> list[str]:
    """Lines of a section of what ``on_page`` gives; none where it is nothing."""
    if not page:
        return []
    told = caption(**page)
    return ["", f"## {TITLE}", "", f"{told}.", "", markdown_table(*page.values())]


def as_html(page: Mapping[str, Any]) -> str:
    """A section of the page of what ``on_page`` gives; empty where it is nothing."""
    if not page:
        return ""
    headings, lines = page["headings"], page["rows"]
    head = "".join(f'<th scope="col" class="bare">{escape(text)}</th>' for text in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in texts)
        + "</tr>"
        for name, *texts in lines
    )
    return (
        '<section aria-labelledby="lossless-title">\n'
        f'  <h2 id="lossless-title">{escape(TITLE)}</h2>\n'
        f'  <p class="note">{escape(caption(**page))}.</p>\n'
        '  <div class="box" tabindex="0" role="region" aria-labelledby="lossless-title">\n'
        f'    <table id="lossless"><thead><tr>{head}</tr></thead><tbody>\n{body}\n'
        "    </tbody></table>\n  </div>\n</section>\n\n"
    )
