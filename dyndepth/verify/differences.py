"""Rows computed again against stored ones: what differs, by more than rounding can explain."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.verify.findings import Finding

KEYS = {
    "samples": ("task", "doc_id"),
    "accuracy": ("task", "metric", "filter"),
    "compute": ("task", "phase"),
    "routing": ("task", "phase", "layer", "sublayer"),
}
"""Tables that are compared, and the columns that tell their rows apart."""


@dataclass(frozen=True)
class Tolerance:
    """How far recomputed values may be off.

    Attributes:
        nats, fraction: of a log-likelihood: absolute, and as a fraction of it.
            Of scores alike, by their logarithm.
        flops: relative, of FLOPs, and of fractions of tokens.
        flips: share of a task's documents whose answers may be others.
    """

    nats: float
    fraction: float
    flops: float
    flips: float

    def __str__(self) -> str:
        flips = f", {self.flips:.0%} of answers others" if self.flips else ", answers the same"
        return f"log-likelihoods within {self.nats:g} nats + {self.fraction:g} of them{flips}"


EXACT = Tolerance(1e-4, 1e-6, 1e-9, 0.0)
"""float32 on the CPU with the code that made the cell: sums in another order, nothing else."""
COARSE = Tolerance(0.25, 0.05, 0.05, 0.34)
"""Half precision, a GPU, other code, or a trained or token rule on another machine: a gate at its
threshold may flip, and another training ends elsewhere. Log-likelihoods as for timed runs."""


def differences(cell: Cell, name: str, rows: Sequence[Row], tolerance: Tolerance) -> list[Finding]:
    """What ``rows`` of the table ``name``, computed again, say otherwise than the cell's; a finding
    a column and task, of the first row that differs. Rows that were not computed are not missed."""
    keys = KEYS[name]
    stored = _keyed(getattr(cell, name), keys)
    told = []
    for row in rows:
        old = stored.get(tuple(row[key] for key in keys))
        apart = [("row", None, "a row")] if old is None else list(_columns(old, row, tolerance))
        told.append((row, apart))
    if name == "samples":
        told = _without_flips(told, stored, tolerance)
    first: dict[tuple[str, str], tuple[str, Any, Any]] = {}
    count: Counter[tuple[str, str]] = Counter()
    for row, apart in told:
        place = "/".join(str(row[key]) for key in keys)
        for column, one, other in apart:
            first.setdefault((row["task"], _name(column)), (place, one, other))
        count.update({(row["task"], _name(column)) for column, _, _ in apart})
    return [
        Finding(
            cell.key,
            f"{name}: {column} of {place}"
            + (f" (and of {count[task, column] - 1} more)" if count[task, column] > 1 else ""),
            _text(one),
            _text(other),
        )
        for (task, column), (place, one, other) in first.items()
    ]


Apart = list[tuple[str, Any, Any]]
"""Columns of a row that differ: name, stored, computed again."""


def differs(cell: Cell, row: Row, tolerance: Tolerance) -> bool:
    """True if a sample's row is not the cell's, a flip included."""
    old = _keyed(cell.samples, KEYS["samples"])[row["task"], row["doc_id"]]
    return any(True for _ in _columns(old, row, tolerance))


def _without_flips(
    told: Sequence[tuple[Row, Apart]], stored: Mapping[tuple[Any, ...], Row], tolerance: Tolerance
) -> list[tuple[Row, Apart]]:
    """``told`` without the answers that are others, in tasks where few enough are, and without what
    follows from another text. An answer is another only if what it was read off has moved."""
    seen = Counter(row["task"] for row, _ in told)
    flipped = Counter(
        row["task"] for row, apart in told if any(_name(column) in ANSWERS for column, *_ in apart)
    )
    found = []
    for row, apart in told:
        old = stored.get((row["task"], row["doc_id"]), {})
        if _moved(old, row) and flipped[row["task"]] <= tolerance.flips * seen[row["task"]]:
            text = any(column == "response" for column, *_ in apart)
            follows = ANSWERS + (WORK if text else ())
            apart = [each for each in apart if _name(each[0]) not in follows]
        found.append((row, apart))
    return found


def _moved(old: Row, new: Row) -> bool:
    """True if the log-likelihoods or the text that a document's answer was read off are others than
    what is stored, by more than sums in another order make."""
    ours, theirs = (json.loads(row.get("loglikelihoods") or "[]") for row in (old, new))
    if old.get("response") != new.get("response"):
        return True
    return any(True for _ in _likelihoods(ours, theirs, EXACT))


def _name(column: str) -> str:
    return column.partition(" ")[0]


ANSWERS = ("response", "outcome", "outcomes")
"""Columns of samples that change when an answer becomes another."""
WORK = ("tokens", "block_flops", "total_flops", "dense_block_flops", "dense_total_flops")
"""And those that follow the length of a text that is written."""
PLAIN = (
    "doc_hash",
    "metric",
    "target",
    "weight",
    "task_version",
    "higher_is_better",
    "n",
    "filter",
)
"""Columns that no rounding changes."""
LATER = ("draft",)
"""Columns that older cells lack, which then had nothing of it."""


def _columns(old: Row, new: Row, tolerance: Tolerance) -> Iterator[tuple[str, Any, Any]]:
    """Columns of a row that differ by more than the tolerance: name, stored, computed again."""
    for column in new:
        one, other = old.get(column), new[column]
        if column in LATER and column not in old and not other:
            continue
        if column == "loglikelihoods" and one and other:
            yield from _likelihoods(json.loads(one), json.loads(other), tolerance)
        elif column == "outcomes" and one and other:
            ours, theirs = json.loads(one), json.loads(other)
            for key in dict.fromkeys([*theirs, *ours]):
                if not _alike(ours.get(key), theirs.get(key), tolerance):
                    yield f"outcomes {key}", ours.get(key), theirs.get(key)
        elif column in ("outcome", "value", "stderr"):
            if not _alike(one, other, tolerance):
                yield column, one, other
        elif column in PLAIN or one is None or not (_number(one) and _number(other)):
            if one != other:
                yield column, one, other
        elif not math.isclose(float(one), float(other), rel_tol=tolerance.flops, abs_tol=1e-9):
            yield column, one, other


def _likelihoods(
    ours: Sequence[float], theirs: Sequence[float], tolerance: Tolerance
) -> Iterator[tuple[str, Any, Any]]:
    if len(ours) != len(theirs):
        yield "loglikelihoods", f"{len(ours)} choices", f"{len(theirs)} choices"
        return
    gaps = [
        abs(one - other) - (tolerance.nats + tolerance.fraction * abs(other))
        for one, other in zip(ours, theirs, strict=True)
    ]
    # What is not a number is never within.
    far = [i for i, gap in enumerate(gaps) if not gap <= 0]
    if far:
        place = max(far, key=lambda index: gaps[index])
        yield f"loglikelihoods [{place}]", ours[place], theirs[place]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alike(one: Any, other: Any, tolerance: Tolerance) -> bool:
    """True of scores that rounding can have moved apart. A perplexity is as far off, relatively, as
    its likelihood is in nats. Right and wrong are never alike."""
    if not _number(one) or not _number(other):
        return bool(one == other)
    if one > 0 and other > 0:
        apart = abs(math.log(one) - math.log(other))
        return apart <= tolerance.nats + tolerance.fraction * abs(math.log(other))
    return math.isclose(one, other, abs_tol=1e-9)


def _keyed(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    return {tuple(row[key] for key in keys): row for row in rows}


def _text(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
