"""The cells of several runs as one list: which record of a cell stands, and what cannot be merged.

A cell that several runs hold is the same computation by its hash. One of its records may know more
than another: scores where that failed, times where that was not timed. Which runs come first makes
no difference.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell, order
from dyndepth.cells.identity import Row, plain, same_data
from dyndepth.cells.store import Store
from dyndepth.cells.times import TIMING_LEVELS
from dyndepth.common.errors import UserError

KEYS = {"accuracy": ("task", "metric", "filter"), "samples": ("task", "doc_id")}
"""Tables in which evaluated records of one cell must agree, and what a row of theirs is of."""

ROUNDING = 1e-4
"""Relative difference of numbers that two machines may give by summing in another order."""


def merged_cells(runs: Sequence[Path]) -> list[Cell]:
    """The cells of several runs, each once, in the order of the tables: of several records of one
    cell the one that was evaluated, then the one that was timed most thoroughly, then a finished
    one, then that with more times.

    Raises:
        UserError: a folder is no run, a cell's rows cannot be read, or evaluated records of one
            cell have different scores.
    """
    found: dict[str, list[tuple[Path, Cell]]] = {}
    for run in runs:
        cells = Store(run).all()
        if not cells:
            raise UserError(f"{run} holds no cells; give the --output_path of a sweep")
        check_rows(cells)
        for cell in cells:
            found.setdefault(cell.key, []).append((run, cell))
    return sorted(map(_best, found.values()), key=order)


def _best(records: Sequence[tuple[Path, Cell]]) -> Cell:
    _check(records)
    cells = [cell for _, cell in records]
    return max(cells, key=_knows) if len(cells) > 1 else cells[0]


def _knows(cell: Cell) -> tuple[bool, int, bool, int, str]:
    """Larger is better; the last entry decides between equals, whatever the order of the runs."""
    level = TIMING_LEVELS.index(cell.timing_level)
    rest = json.dumps(plain(vars(cell)), sort_keys=True)
    return cell.evaluated, level, cell.status == "done", len(cell.timing), rest


def _check(records: Sequence[tuple[Path, Cell]]) -> None:
    evaluated = [(run, cell) for run, cell in records if cell.evaluated]
    for other, theirs in evaluated[1:]:
        run, own = evaluated[0]
        for name in KEYS:
            row = _differing(name, getattr(own, name), getattr(theirs, name))
            if row:
                raise UserError(
                    f"{run} and {other} both hold cell {own.key} ({own.identity['method']}) and "
                    f"differ in its {name}, row {row}: one of them was changed or made by other "
                    "code; ask `python -m dyndepth.verify` of both and leave one out"
                )


def _differing(name: str, own: Sequence[Row], theirs: Sequence[Row]) -> str:
    """The first row that only one has or that has other values, as ``task/doc_id``; empty if
    none."""
    left, right = ({_key(name, row): row for row in rows} for rows in (own, theirs))
    for key in dict.fromkeys([*left, *right]):
        if key not in left or key not in right or not _alike(left[key], right[key]):
            return "/".join(key)
    return ""


def _key(name: str, row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in KEYS[name])


def _alike(one: Any, other: Any) -> bool:
    """Equal, numbers but for rounding; a JSON text as what it says."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, str) and isinstance(other, str) and one != other:
        left, right = _parsed(one), _parsed(other)
        return left is not None and right is not None and _alike(left, right)
    if isinstance(one, float) or isinstance(other, float):
        try:
            return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-9)
        except (TypeError, OverflowError):
            return False
    return bool(one == other)


def _parsed(text: str) -> Any:
    """A list or mapping from its JSON text; None for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raise UserError if one table would hold scores of different tasks under the same name."""
    versions: dict[str, dict[str, str]] = defaultdict(dict)
    data: dict[str, str] = {}
    for cell in cells:
        if not cell.evaluated:
            continue
        label = f"{cell.identity['method']} {cell.key}"
        data.setdefault(str(cell.identity["data_fingerprint"]), label)
        for row in cell.accuracy:
            versions[row["task"]].setdefault(str(row.get("task_version")), label)
    for task, found in versions.items():
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise UserError(
                f"task {task} has version {one} in cell {first} and {other} in cell {second}: "
                "rows of different task versions belong in separate leaderboards"
            )
    for (one, first), (other, second) in itertools.combinations(data.items(), 2):
        if not same_data(one, other):
            raise UserError(
                f"cell {first} was scored on evaluation data {one} and cell {second} on {other}: "
                "rows of different data belong in separate leaderboards"
            )


def merged(runs: Sequence[Path]) -> list[Cell]:
    """The cells of several runs, each once; see ``dyndepth.cells.merging``.

    Raises:
        UserError: a folder is no run, a cell's rows cannot be read, runs disagree on a cell's
            scores, or the runs' rows cannot stand in one table.
    """
    cells = merged_cells(runs)
    check_comparable(cells)
    return cells


def origins(runs: Sequence[Path]) -> dict[str, list[str]]:
    """The hash of every cell of several runs -> the runs that hold it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for cell in Store(run).all():
            found.setdefault(cell.key, []).append(str(run))
    return found


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
