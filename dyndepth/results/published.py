"""What papers report of the methods: read from ``published.csv`` beside the methods.

The package that a method's module lies in may hold such a file, this suite's own and those of other
distributions alike. Its rows are shown beside measured ones and never enter an average.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from importlib import resources
from typing import Any

from dyndepth.cells.identity import Row
from dyndepth.cells.naming import changed
from dyndepth.cells.recipe import KINDS, NONE
from dyndepth.common.errors import UserError
from dyndepth.common.files import read_text
from dyndepth.common.registry import methods
from dyndepth.common.spec import split

FILE = "published.csv"

COLUMNS = {
    "method": "name of the method in this suite",
    "parameters": "parameters (and phases) of this suite's method that come nearest, or empty",
    "recovery": "how the weights were adapted for the method: empty or none for not at all, lora, "
    "joint, or full (all weights trained, which no recovery of this suite does)",
    "model": "model of the paper",
    "speedup": "budget of the row as a ratio to dense, at least 1; exactly 1 where it is lossless",
    "unit_of_speedup": "what the ratio counts: layers, nominal (the paper's own), or wall ...; "
    "lossless where the method writes what dense writes, so that its value is a speedup",
    "task": "task or benchmark",
    "metric": "metric and its unit",
    "dense_value": "the paper's dense value, or empty",
    "value": "the paper's value of the method",
    "source": "the document that the value was read in: arXiv number and table",
    "hand": "first: the source is the paper that proposes what was measured; second: it is another "
    "one, whose authors ran the method themselves or quote its value",
    "note": "what a reader must know",
}
"""Columns of the file and what they hold."""

RECOVERIES = ("", NONE, *KINDS, "full")
"""What the column ``recovery`` may say."""

HANDS = {"first": "first-hand", "second": "second-hand"}
"""What the column ``hand`` may say, and how people are told."""
HANDED = (
    "First-hand: the source is the paper that proposes what was measured. Second-hand: it is "
    "another paper, whose authors ran the method themselves or quote its value."
)
"""What that means."""

LOSSLESS = "lossless"
"""The unit of rows whose value is a speedup: the method drafts, and the whole model verifies. Such
a value may be below 1."""

NUMBERS = {"speedup": False, "dense_value": True, "value": False}
"""Columns that hold numbers, and whether they may be empty."""


def published() -> list[Row]:
    """Rows of every installed ``published.csv``, numbers as floats, an empty one None.

    Raises UserError for a file with other columns, or a number that cannot be read.
    """
    packages = sorted({entry.module.rpartition(".")[0] for entry in methods().values()})
    return [row for package in packages if package for row in rows_of(package)]


def rows_of(package: str) -> list[Row]:
    """Rows of the ``published.csv`` of one package; none where it has no such file."""
    try:
        file = resources.files(package) / FILE
    except (ModuleNotFoundError, TypeError):
        return []
    if not file.is_file():
        return []
    return parse(read_text(file, f"{FILE} of {package}"), f"{FILE} of {package}")


def parse(text: str, origin: str) -> list[Row]:
    """The rows of a file's text. Raises UserError, naming ``origin`` and the line."""
    reader = csv.DictReader(io.StringIO(text))
    if list(reader.fieldnames or ()) != list(COLUMNS):
        raise UserError(f"{origin} must have the columns {', '.join(COLUMNS)}")
    found = []
    for row in reader:
        place = f"{origin}, line {reader.line_num}"
        if None in row or None in row.values() or not row["method"] or not row["source"]:
            raise UserError(f"{place}: a row needs every column, and a method and a source")
        if row["recovery"] not in RECOVERIES:
            raise UserError(
                f"{place}: recovery must be empty or one of {', '.join(RECOVERIES[1:])}, not "
                f"{row['recovery']!r}"
            )
        if row["hand"] not in HANDS:
            raise UserError(f"{place}: hand must be first or second, not {row['hand']!r}")
        numbers = {key: _number(row[key], key, place) for key in NUMBERS}
        if numbers["speedup"] is not None and numbers["speedup"] < 1:
            raise UserError(f"{place}: speedup must be at least 1, not {row['speedup']}")
        if row["unit_of_speedup"] == LOSSLESS and numbers["speedup"] != 1:
            raise UserError(
                f"{place}: what is lossless has the budget 1, not {row['speedup']}; the speedup "
                "that was measured is its value"
            )
        found.append({**row, **numbers})
    return found


def nearest(row: Row, measured: Iterable[Row]) -> Row | None:
    """The measured leaderboard row that a paper's row is set beside; None if none fits.

    A lossless row has none beside it: the paper's value is a speedup, and ours has no score to
    compare with it. Another's is of the same method, recovered in the same way or not at all, and
    has the parameters that the paper's row names. What that leaves unsaid means the method's
    default: rows with other settings stand back where there is one without. Of those left, the
    achieved block FLOPs speedup
    that is nearest (as a ratio) to the paper's budget, then the fewest settings off the default.
    """
    if row.get("unit_of_speedup") == LOSSLESS:
        return None
    wanted = set(settings(row["parameters"]))
    named = {entry.partition("=")[0].strip() for entry in wanted}
    found = []
    for place, one in enumerate(measured):
        if one["method"] != row["method"] or not (one.get("block_speedup") or 0) > 0:
            continue
        if kind_of(one.get("recovery")) != kind_of(row.get("recovery")):
            continue
        if not wanted <= {*settings(one["parameters"]), phases_of(one)}:
            continue
        other = [entry for entry in changed(one) if entry.partition("=")[0].strip() not in named]
        # Speedups that differ by rounding alone are the same one.
        apart = round(abs(math.log(one["block_speedup"] / row["speedup"])), 6)
        found.append((bool(other), apart, len(other), place, one))
    return min(found, key=lambda each: each[:4])[4] if found else None


def known_well(row: Row) -> bool:
    """Whether a leaderboard row has a score with an interval: what is of a few documents alone is
    set beside no paper."""
    return any(row.get(f"{key}_low") not in (None, "") for key in ("mean_acc", "bits_per_byte"))


def kind_of(recovery: Any) -> str:
    """``lora`` of ``lora(rank=8)``; ``none`` of nothing."""
    return str(recovery or NONE).partition("(")[0].strip()


def phases_of(row: Row) -> str:
    """A row's phases, as a parameter is written."""
    return f"phases='{row['phases']}'"


def settings(parameters: Any) -> list[str]:
    """The entries of a parameters text, as ``["rule='even'", "keep=1"]``."""
    try:
        return [part.strip() for part in split(str(parameters or ""))]
    except UserError:
        return [str(parameters)]


def _number(text: str, column: str, place: str) -> float | None:
    if not text and NUMBERS[column]:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: {column} must be a number, not {text!r}")
    return number
