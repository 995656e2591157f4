"""Tables as CSV that pandas, R and a spreadsheet read alike.

A text stays a text: what a spreadsheet would run as a formula, or what any of them would take for a
number or a date (a hash may have no letter in it, ``5.24.0`` is a day somewhere), is led by an
apostrophe. Truth values are TRUE and FALSE, which all three know.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from dyndepth.cells.identity import Row

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that a spreadsheet would run as a formula."""

NUMBER = re.compile(r"\.?\d[\d.,:/ -]*([eE][+-]?\d+)?|inf(inity)?|nan|true|false", re.IGNORECASE)
"""A text that some reader would take for a number, a date, a time or a truth value."""


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The ``columns`` of the rows as CSV: one header, no index, 10 significant digits; a missing
    value is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([entry(row.get(name)) for name in columns] for row in rows)
    return buffer.getvalue()


def entry(value: Any) -> str:
    """One field of a CSV file; None and NaN are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    return harmless(value) if isinstance(value, str) else number(value)


def number(value: Any) -> str:
    """A number with 10 significant digits; anything else as Python writes it."""
    return format(value, ".10g") if isinstance(value, float) else str(value)


def harmless(text: str) -> str:
    """``text``; after ``'`` if a reader would not take it for a text. A bare carriage return in it,
    which ends a row for some readers, is a space."""
    taken = text.startswith(FORMULA) or NUMBER.fullmatch(text.strip())
    return (f"'{text}" if taken else text).replace("\r", " ")
