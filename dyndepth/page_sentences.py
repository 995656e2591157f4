"""The block ``sentences`` of a page: text whose numbers are looked up in the committed tables.

Its options hold ``sentences``, a list of ``text`` with ``{0}``, ``{1}``, … and ``values``, one for
each. A value is a mapping: ``table`` and what its one row has in some columns (``label`` for the
method as the pages' tables call it), and what of it is shown: ``show``, a column, followed by its
interval where there is one, in ``form`` (default ``{:.3f}``); or ``count: true``, how many rows
there are. What a value leaves out is taken from ``defaults``, unless it says null.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.naming import label
from dyndepth.common.errors import UserError
from dyndepth.markdown import Record, spread

if TYPE_CHECKING:
    from dyndepth.page_blocks import Source


OWN = frozenset({"folder", "table", "show", "form", "count"})
"""Keys of a value that are no columns to choose rows by."""
BY_FLOPS = ("curves", "equal_flops")
"""Tables with rows for block FLOPs, which are quoted unless told otherwise, and for all FLOPs."""


def sentences(source: Source, options: dict[str, Any]) -> str:
    """A list, one item a sentence. See the module's docstring.

    Raises:
        UserError: a value that not exactly one row has, or that is empty.
    """
    if not (source.root / source.results / "leaderboard.csv").is_file():
        return source.missing()
    defaults = options.get("defaults", {})
    lines = []
    for sentence in options["sentences"]:
        found = [value(source, defaults | asked) for asked in sentence.get("values", [])]
        lines.append(f"- {sentence['text'].strip().format(*found)}")
    return "\n".join(lines)


def value(source: Source, asked: dict[str, Any]) -> str:
    """What ``asked`` describes, as text."""
    folder = Path(asked.get("folder", source.results))
    table = folder / f"{asked['table']}.csv"
    wanted = {key: each for key, each in asked.items() if key not in OWN and each is not None}
    if table.stem in BY_FLOPS:
        wanted.setdefault("flops", "block")
    rows = [row for row in source.rows(folder, table.name) if _fits(row, wanted)]
    if asked.get("count"):
        return str(len(rows))
    if len(rows) != 1:
        raise UserError(f"{table} has {len(rows)} rows with {wanted}; a sentence quotes one")
    show = asked["show"]
    text = _shown(rows[0], show, asked.get("form", "{:.3f}"))
    if not text:
        raise UserError(f"{table} has no {show} where {wanted}")
    return text


def _shown(row: Record, show: str, form: str) -> str:
    # Of equal_flops.csv, ``low`` and ``high`` are the ends of ``value``.
    ends = ("low", "high") if show == "value" else (f"{show}_low", f"{show}_high")
    return spread(row, show, *ends, form)


def _fits(row: Record, wanted: dict[str, Any]) -> bool:
    for column, each in wanted.items():
        found = label(row) if column == "label" else row.get(column)
        if isinstance(each, int | float) and not isinstance(each, bool):
            if not found or abs(float(found) - each) > 1e-9:
                return False
        elif found != str(each):
            return False
    return True
