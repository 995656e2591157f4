"""What can be found wrong with one cell: its rows against each other, scores against documents."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.cells.cell import ROWS, Cell
from dyndepth.cells.identity import Row

SAME = 1e-6
"""Relative difference of a sum over documents from what is stored that is put down to rounding."""


@dataclass(frozen=True)
class Finding:
    """One thing found: ``stored`` is what the run says, ``found`` what it should say or what came
    out. ``cell`` is a hash, or the name of a file; a note is no ``failure``."""

    cell: str
    what: str
    stored: str = ""
    found: str = ""
    failure: bool = True


# --- the rows of a cell ---------------------------------------------------------------------------


def of_cell(cell: Cell) -> list[Finding]:
    """What is wrong with the rows of one cell, one by one and against each other."""
    if cell.status == "error":
        note = Finding(cell.key, "failed when it was run", cell.error, failure=False)
        if not cell.evaluated:
            return [note]
        return [note, *_checked(cell)]
    if not cell.evaluated:
        return [Finding(cell.key, "has status done and no scores")]
    return _checked(cell)


def _checked(cell: Cell) -> list[Finding]:
    try:
        return [
            Finding(cell.key, what, text_of(stored), text_of(found))
            for part in (_finite, _documents, _flops, _drafts, _shares)
            for what, stored, found in part(cell)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as fault:
        return [Finding(cell.key, "rows cannot be read", found=f"{type(fault).__name__}: {fault}")]


def text_of(value: Any) -> str:
    """A value as a finding shows it."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


Told = tuple[str, Any, Any]
"""What is wrong, what is stored, and what should be."""


def _finite(cell: Cell) -> Iterator[Told]:
    """Numbers that are none."""
    for name in ROWS:
        for row in getattr(cell, name):
            for key, value in row.items():
                texts = name == "samples" and key in ("outcomes", "loglikelihoods") and value
                content = json.loads(value) if texts else value
                entries = content.values() if isinstance(content, dict) else content
                numbers = entries if texts else [value]
                lost = any(isinstance(x, float) and not math.isfinite(x) for x in numbers)
                if lost or (name == "accuracy" and key == "value" and no_number(value)):
                    yield (
                        f"{name}: {key} of {row.get('task', 'the cell')} is not finite",
                        value,
                        "a number",
                    )


def no_number(value: Any) -> bool:
    """True of what no metric's value can be."""
    return isinstance(value, bool) or not isinstance(value, int | float)


def by_task(cell: Cell) -> dict[str, list[Row]]:
    """A cell's documents by task."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in cell.samples:
        found[row["task"]].append(row)
    return found


def _documents(cell: Cell) -> Iterator[Told]:
    """Which documents were scored, and how many."""
    samples = by_task(cell)
    tasks = list(cell.identity["tasks"])
    for name in ("accuracy", "samples", "compute"):
        named = list(dict.fromkeys(row["task"] for row in getattr(cell, name)))
        if set(named) != set(tasks):
            yield f"tasks of its {name}", ",".join(named), ",".join(tasks)
    for task, rows in samples.items():
        count, most = len(rows), cell.identity["limit"].get(task)
        if len({row["doc_id"] for row in rows}) != count:
            yield f"{task}: documents occur twice", count, len({row["doc_id"] for row in rows})
        if most is not None and count > most:
            yield f"{task}: more documents than its limit", count, most
        mains = [json.loads(row["outcomes"])[row["metric"]] for row in rows]
        pairs = zip(rows, mains, strict=True)
        apart = [(row, main) for row, main in pairs if row["outcome"] != main]
        if apart:
            row, main = apart[0]
            more = f" (and of {len(apart) - 1} more)" if len(apart) > 1 else ""
            yield f"outcome of {task}/{row['doc_id']}{more}", row["outcome"], main
    for row in cell.accuracy:
        key = f"{row['metric']},{row['filter']}"
        count = sum(key in json.loads(each["outcomes"]) for each in samples[row["task"]])
        if row["n"] != count:
            yield f"accuracy: n of {row['task']} {row['metric']}", row["n"], count


def _flops(cell: Cell) -> Iterator[Told]:
    """FLOPs of a task against those of its documents and of its phases."""
    samples = by_task(cell)
    for task in dict.fromkeys(row["task"] for row in cell.compute):
        phases = {row["phase"]: row for row in cell.compute if row["task"] == task}
        row, rows = phases["all"], samples[task]
        parts = [phases[name] for name in ("prompt", "generation") if name in phases]
        found: dict[str, float] = {}
        if parts:
            found["tokens"] = sum(part["tokens"] for part in parts)
        for kind in ("block", "total"):
            spent, ratio = f"{kind}_flops_per_token", f"{kind}_speedup"
            if all(f"dense_{kind}_flops" in each for each in rows) and rows:
                executed = sum(each[f"{kind}_flops"] for each in rows)
                dense = sum(each[f"dense_{kind}_flops"] for each in rows)
                found["tokens"] = sum(each["tokens"] for each in rows)
                found[spent] = executed / found["tokens"]
                if executed:
                    found[ratio] = dense / executed
            causes = ["attention", "mlp"]
            causes += ["kv_projection", "router", "readout", "lm_head"] if kind == "total" else []
            if all(cause in row for cause in causes):
                whole = sum(row[cause] for cause in causes)
                # Of cells from before there were drafts, none was billed.
                whole += (row.get("draft") or 0.0) if kind == "total" else 0.0
                if not math.isclose(row[spent], whole, rel_tol=SAME):
                    yield f"compute: {spent} of {task} against its causes", row[spent], whole
        for key, value in found.items():
            if not math.isclose(row[key], value, rel_tol=SAME):
                yield f"compute: {key} of {task} against its documents", row[key], value


def _drafts(cell: Cell) -> Iterator[Told]:
    """What was drafted against what was accepted and written."""
    for row in cell.compute:
        if row.get("drafted") is None:
            continue
        names = ("drafted", "accepted", "verifications", "written")
        drafted, accepted, passes, written = (row[key] for key in names)
        place = f"of {row['task']}"
        if not 0 <= accepted <= drafted:
            yield f"compute: accepted {place} against what was drafted", accepted, drafted
        if not passes <= written <= accepted + passes:
            most = f"{passes} to {accepted + passes}"
            yield f"compute: written {place} against what was accepted", written, most
        if written > row["tokens"]:
            yield f"compute: written {place} against its tokens", written, row["tokens"]


def _shares(cell: Cell) -> Iterator[Told]:
    """Fractions and ratios that follow from others of their row."""
    for row in cell.routing:
        if not 0 <= row["executed"] <= 1 + SAME:
            place = f"block {row['layer']} {row['sublayer']} in {row['phase']}"
            yield f"routing: executed of {place}", row["executed"], "0 to 1"
    for row in cell.timing:
        place = f"{row['phase']} {row['batch']}x{row['length']}"
        wall = row["wall_speedup"]
        if {"wall_speedup_low", "wall_speedup_high"} <= set(row):
            low, high = row["wall_speedup_low"], row["wall_speedup_high"]
            if None not in (wall, low, high) and not low <= wall <= high:
                yield f"timing: wall_speedup of {place}", wall, f"{low:.6g} to {high:.6g}"
        if row.get("wall_efficiency") is not None:
            ratio = wall / row["total_speedup"]
            if not math.isclose(row["wall_efficiency"], ratio, rel_tol=SAME):
                yield f"timing: wall_efficiency of {place}", row["wall_efficiency"], ratio
        for side in ("dense", "method"):
            time = "ttft_ms" if row["phase"] == "prefill" else "tpot_ms"
            told, median = row.get(f"{side}_{time}"), row.get(f"{side}_median_s")
            if told is None or median is None:
                continue
            if not math.isclose(told, 1000 * median, rel_tol=SAME):
                yield f"timing: {side}_{time} of {place}", told, 1000 * median


Score = tuple[float, float | None]
"""A metric's value over documents, and its standard error."""


def means(cells: Sequence[Cell]) -> Iterator[Finding]:
    """Scores that are not the mean over the cell's own documents.

    What kind of mean a metric is (of outcomes or of their logarithms; weighted or not) is not
    stored; it is taken to be the one that fits most cells. A metric that none fits is noted.
    """
    scores: dict[tuple[str, str], list[tuple[Cell, Row, dict[str, Score]]]] = defaultdict(list)
    for cell in cells:
        try:
            samples = by_task(cell)
            for row in cell.accuracy:
                key = f"{row['metric']},{row['filter']}"
                fits = _means(samples[row["task"]], key)
                if fits and not no_number(row["value"]):
                    scores[row["task"], key].append((cell, row, fits))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # told by of_cell
    for (task, key), entries in scores.items():
        counts = Counter(
            kind for _, row, fits in entries for kind in fits if _near(row["value"], fits[kind][0])
        )
        what = f"of {task} {key.partition(',')[0]} against its documents"
        if not counts and len(entries) > 1:
            yield Finding("run", f"is no mean over documents: {key} of {task}", failure=False)
            continue
        kind = counts.most_common(1)[0][0] if counts else next(iter(entries[0][2]))
        for cell, row, fits in entries:
            value, error = fits.get(kind, (math.nan, None))
            if not _near(row["value"], value):
                yield Finding(
                    cell.key, f"accuracy: value {what}", text_of(row["value"]), text_of(value)
                )
            elif (
                row["stderr"] is not None and error is not None and not _near(row["stderr"], error)
            ):
                yield Finding(
                    cell.key, f"accuracy: stderr {what}", text_of(row["stderr"]), text_of(error)
                )


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME, abs_tol=1e-9)


def _means(rows: Sequence[Row], key: str) -> dict[str, Score]:
    """Means of the outcomes ``key`` over documents, by kind; none where a document has no value.

    A document's weight is 1, that of its main metric, or what its likelihood and its perplexity say
    together (words, for a perplexity by word).
    """
    values = [json.loads(row["outcomes"]).get(key) for row in rows]
    if not values or any(map(no_number, values)):
        return {}
    weights: dict[str, list[float]] = {"plain": [1.0] * len(rows)}
    if all("weight" in row for row in rows):
        weights["weighted"] = [row["weight"] for row in rows]
    found = {kind: _mean(values, each) for kind, each in weights.items()}
    if min(values) > 0:
        logs = [math.log(value) for value in values]
        likelihoods = [json.loads(row.get("loglikelihoods") or "[]") for row in rows]
        if all(len(each) == 1 for each in likelihoods) and all(logs):
            weights["by size"] = [
                -each[0] / log for each, log in zip(likelihoods, logs, strict=True)
            ]
        for kind, each in weights.items():
            value, error = _mean(logs, each)
            # A perplexity may be beyond all numbers; then it is not stored either.
            whole = math.exp(value) if value < 700 else math.inf
            found[f"{kind}, of logarithms"] = whole, None if error is None else error * whole
    return {kind: score for kind, score in found.items() if math.isfinite(score[0])}


def _mean(values: Sequence[float], weights: Sequence[float]) -> Score:
    """Weighted mean and its linearised standard error (Cochran 1977, eq. 6.4)."""
    whole, n = math.fsum(weights), len(values)
    if not whole:
        return math.nan, None
    value = math.fsum(x * w for x, w in zip(values, weights, strict=True)) / whole
    if n < 2:
        return value, None
    squares = math.fsum((w * (x - value)) ** 2 for x, w in zip(values, weights, strict=True))
    return value, math.sqrt(squares / (n - 1) * n) / abs(whole)
