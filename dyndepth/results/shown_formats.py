"""Leaderboard rows as a table for a paper or a program: LaTeX, Markdown, CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dyndepth.cells.identity import Row
from dyndepth.common.markup import latex_table, markdown_table
from dyndepth.results import lossless
from dyndepth.results.shown import about, board_rows, chosen, folders, headings
from dyndepth.results.tables import csv_text


def written(
    form: str,
    rows: Sequence[Row],
    runs: Mapping[str, Sequence[str]] | None = None,
    keys: Sequence[str] | None = None,
) -> str:
    """The text of ``form``, of ``FORMS``, for rows of ``leaderboard``; ``runs`` and ``keys`` as
    ``console.show_leaderboard`` has them. Raises UserError for a column that there is not."""
    return FORMS[form](rows, runs, keys)


def _latex(
    rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None, keys: Sequence[str] | None
) -> str:
    found, stand_for = board_rows(rows, folders(runs))
    found, drafted = lossless.apart(found)
    columns = chosen(found, keys)
    texts = [[each.text(row) for each in columns] for row in found]
    made = latex_table(
        headings(columns, found),
        texts,
        [each.name for each in columns],
        _caption(found, texts, stand_for),
        "tab:leaderboard",
        [(row["bound"], row["target_speedup"]) for row in found],
    )
    if not drafted:
        return made
    heads, lines = lossless.table(drafted)
    left = [not place for place in range(len(heads))]
    return f"{made}\n\n{latex_table(heads, lines, left, _drafted(heads, lines), 'tab:lossless')}"


def _markdown(
    rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None, keys: Sequence[str] | None
) -> str:
    found, stand_for = board_rows(rows, folders(runs))
    found, drafted = lossless.apart(found)
    columns = chosen(found, keys)
    texts = [[each.text(row) for each in columns] for row in found]
    table = markdown_table(headings(columns, found), texts)
    made = f"{table}\n\n{_caption(found, texts, stand_for)}"
    if not drafted:
        return made
    heads, lines = lossless.table(drafted)
    return f"{made}\n\n{markdown_table(heads, lines)}\n\n{_drafted(heads, lines)}"


def _drafted(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"{lossless.TITLE}. {lossless.caption(heads, lines)}."


def _csv(
    rows: Sequence[Row], runs: Mapping[str, Sequence[str]] | None, keys: Sequence[str] | None
) -> str:
    """Numbers as leaderboard.csv has them, of the columns that those shown tell."""
    found, _ = board_rows(rows, runs)
    names = dict.fromkeys(name for each in chosen(found, keys) for name in each.reads)
    if keys is None and lossless.apart(found)[1]:
        names |= dict.fromkeys(("lossless", *_DRAFTS))
    plain = [row | {"seeds": len(row["seeds"])} for row in found]
    return csv_text(plain, list(names)).rstrip("\n")


_DRAFTS = ("acceptance", "acceptance_by_task", "tokens_per_verify", "predicted_speedup")
"""What a CSV of rows with lossless methods among them has in addition."""

Form = Callable[
    [Sequence[Row], Mapping[str, Sequence[str]] | None, Sequence[str] | None],
    str,
]
FORMS: dict[str, Form] = {"latex": _latex, "markdown": _markdown, "csv": _csv}
"""Name of ``--format`` -> what writes it."""


def _s(count: str) -> str:
    return "" if count == "1" else "s"


def _caption(rows: Sequence[Row], texts: Sequence[Sequence[str]], stand_for: Sequence[str]) -> str:
    """What a reader of the table alone must know: model, documents, intervals, speedups."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key)))

    machine = all_of("device_name")
    limits = all_of("limit")
    counted = f"Documents by task: {limits}" if limits else f"Tasks: {all_of('tasks')}, whole"
    sentences = [
        f"Model: {all_of('model')}, {all_of('dtype')}{f' on {machine}' if machine else ''}",
        counted,
        "Speedups are relative to dense; block FLOPs are those of attention and MLP, total FLOPs "
        "all that is executed",
    ]
    if any(row.get("wall_batch") for row in rows):
        batch, length = all_of("wall_batch"), all_of("wall_length")
        shape = f"{batch} sequence{_s(batch)} of {length} token{_s(length)}"
        sentences.append(
            f"Prefill and decode are wall-clock speedups, in pairs with dense: {shape}"
        )
    if any(len(row["seeds"]) > 1 for row in rows):
        sentences.append(
            "Of several seeds the mean, its interval from the lowest end to the highest"
        )
    flat = [text for row in texts for text in row]
    if any("[" in text for text in flat):
        sentences.append("Brackets are 95% intervals over documents, of times over pairs")
    more = about(rows, flat, stand_for).removeprefix("[..]: 95% intervals").strip("; ")
    return ". ".join(filter(None, (*sentences, more))) + "."
