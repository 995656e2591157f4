"""CSV texts that no spreadsheet runs: what begins like a formula is led by an apostrophe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from dyndepth.records import Row

T = TypeVar("T")

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that a spreadsheet would run as a formula."""


def harmless(value: T) -> T | str:
    """``value``; a text that a spreadsheet would run comes after ``'``, and a bare carriage return
    in it, which ends a row for some readers, is a space."""
    if not isinstance(value, str):
        return value
    guarded = f"'{value}" if value.startswith(FORMULA) else value
    return guarded.replace("\r", " ")


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The ``columns`` of the rows as CSV: one header, no index, 10 significant digits."""
    import pandas

    kept = [{name: harmless(row.get(name)) for name in columns} for row in rows]
    table = pandas.DataFrame(kept, columns=list(columns))
    return str(table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
