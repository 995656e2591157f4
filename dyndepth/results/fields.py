"""Texts in a CSV file that every reader takes for texts, and what they were."""

from __future__ import annotations

import re

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that a spreadsheet would run as a formula."""

NUMBER = re.compile(r"\.?\d[\d.,:/ -]*([eE][+-]?\d+)?|inf(inity)?|nan|true|false", re.IGNORECASE)
"""A text that some reader would take for a number, a date, a time or a truth value."""


def harmless(text: str) -> str:
    """``text``; after ``'`` if a reader would not take it for a text. A bare carriage return in it,
    which ends a row for some readers, is a space."""
    return (f"'{text}" if _taken(text) else text).replace("\r", " ")


def unquoted(text: str) -> str:
    """What ``harmless`` was given, but for carriage returns."""
    return text[1:] if text.startswith("'") and _taken(text[1:]) else text


def _taken(text: str) -> bool:
    return text.startswith(FORMULA) or NUMBER.fullmatch(text.strip()) is not None
