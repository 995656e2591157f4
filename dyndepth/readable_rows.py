"""Can the rows of a cell be read? What the tables are computed from, looked at cell by cell.

A cell's file may be whole and its hash right, and still hold rows that somebody edited or that
another program wrote. What is asked for here is the least that every table needs;
``python -m dyndepth.verify`` asks for much more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import starmap
from typing import Any

from dyndepth.errors import UserError
from dyndepth.records import Cell

Check = Callable[[Any], bool]


def check_rows(cells: Iterable[Cell], compared: bool = False) -> None:
    """Raises UserError, naming cell, table and key, for the first row that can't be read.

    ``compared``: as comparisons over documents read them, which takes more than a leaderboard does.
    """
    wanted = {
        name: keys | (_COMPARED.get(name, {}) if compared else {}) for name, keys in _WANTED.items()
    }
    for cell in cells:
        if not isinstance(cell.provenance, dict):
            raise _unreadable(cell, "its provenance is no mapping")
        if not isinstance(cell.error, str):
            raise _unreadable(cell, "its error is no text")
        for name, keys in wanted.items():
            for number, row in enumerate(getattr(cell, name), start=1):
                for key, fits in keys.items():
                    if key not in row:
                        raise _unreadable(cell, f"row {number} of its {name} has no {key}")
                    if not fits(row[key]):
                        raise _unreadable(
                            cell,
                            f"row {number} of its {name} has {key}={_brief(row[key])}, which is "
                            f"not {_KINDS[fits]}",
                        )


def _unreadable(cell: Cell, reason: str) -> UserError:
    return UserError(
        f"cell {cell.key} ({cell.identity['method']}) can't be read: {reason}; delete its file and "
        "sweep again, or let `python -m dyndepth.verify` say what else was changed"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    # NaN and infinity are never written: a missing value is None.
    return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _identifier(value: Any) -> bool:
    return isinstance(value, int | str)


def _truth_or_none(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _outcomes(value: Any) -> bool:
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(found, Mapping) and all(starmap(_outcome, found.items()))


def _outcome(metric: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return True
    # lm-eval may log an infinite perplexity; nothing that is averaged here may be one.
    endless = isinstance(value, float) and math.isinf(value) and "perplexity" in metric
    return endless or _number(value)


_KINDS: dict[Check, str] = {
    _text: "text",
    _number: "a number",
    _number_or_none: "a number",
    _identifier: "text or a whole number",
    _truth_or_none: "true or false",
    _outcomes: "a JSON object of (finite) numbers",
}

_WANTED: dict[str, dict[str, Check]] = {
    "accuracy": {"task": _text, "metric": _text, "value": _number_or_none},
    "compute": {"task": _text, "phase": _text, "tokens": _number}
    | dict.fromkeys(("block_flops_per_token", "total_flops_per_token"), _number_or_none)
    | dict.fromkeys(("block_speedup", "total_speedup"), _number_or_none),
    "routing": {},
    "timing": {"phase": _text, "batch": _number, "length": _number},
    "samples": {"task": _text, "doc_id": _identifier, "outcomes": _outcomes},
}
"""By table: the keys of a row that are read, and what their values must be."""

_COMPARED: dict[str, dict[str, Check]] = {
    "accuracy": {"filter": _text, "higher_is_better": _truth_or_none},
    "samples": {"doc_hash": _text, "metric": _text}
    | dict.fromkeys(("block_flops", "dense_block_flops"), _number)
    | dict.fromkeys(("total_flops", "dense_total_flops"), _number),
}
"""What is read beside that where documents are paired."""
