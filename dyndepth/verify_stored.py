"""What can be wrong with a stored run, seen without a model: files, rows, versions and tables.

Every cell is looked at. A cell's rows must agree with each other, its file with the manifest, all
cells with one version of everything, and the tables with the cells.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import ROWS, Cell
from dyndepth.cells.identity import Row, today
from dyndepth.cells.recipe import NONE
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.manifest import read_manifest, sha256
from dyndepth.results.schema import TABLES

SAME = 1e-6
"""Relative difference of a sum over documents from what is stored that is put down to rounding."""

HERE = ("harness_code", "torch", "transformers", "lm_eval", "dyndepth")
"""What may differ between the cells and the program that verifies them: it is noted."""
ONE = (
    *("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "corpus_fingerprint"),
    *HERE,
)
"""Keys of the identity that must be the same in all cells of a run."""
ONE_A_METHOD = ("method_code", "fit_version")
"""And in all cells of one method, with recovery and without."""


@dataclass(frozen=True)
class Finding:
    """One thing found: ``stored`` is what the run says, ``found`` what it should say or what came
    out. ``cell`` is a hash, or the name of a file; a note is no ``failure``."""

    cell: str
    what: str
    stored: str = ""
    found: str = ""
    failure: bool = True


def check(run: Path, manifest: bool = True) -> tuple[list[Cell], list[Finding]]:
    """The readable cells of a run, and everything found. ``manifest``: compare with it.

    Raises:
        UserError: the folder is no run.
    """
    if not (run / "cells").is_dir():
        raise UserError(f"{run} is no run: it has no folder cells; give a sweep's --output_path")
    # They use what is defined here.
    from dyndepth.verify_scores import means
    from dyndepth.verify_tables import tables

    store = Store(run)
    cells, found = _read(store)
    if manifest:
        found += _against_manifest(run, store)
    found += mixed(cells)
    for cell in cells:
        found += of_cell(cell)
    found += means(cells)
    found += here(cells)
    if cells:
        found += tables(run, cells)
    return cells, found


def _read(store: Store) -> tuple[list[Cell], list[Finding]]:
    """Cells and, for each file that is none, why."""
    with redirect_stderr(io.StringIO()) as told:
        cells = store.all()
    found = []
    files = {path.name for path in store.files()}
    for line in told.getvalue().splitlines():
        named, _, why = line.partition(" cannot be read as a cell and counts as absent: ")
        name = Path(named.removeprefix("warning: ")).name
        files.discard(name)
        found.append(Finding(name, "file cannot be read as a cell", found=why))
    expected = {store.file(cell.identity).name for cell in cells}
    found += [
        Finding(name, "file of a cell has a wrong name: it was copied or renamed")
        for name in sorted(files - expected)
    ]
    return cells, found


def _against_manifest(run: Path, store: Store) -> Iterator[Finding]:
    try:
        listed = read_manifest(run)
    except UserError as fault:
        yield Finding("manifest.json", "cannot be read", found=str(fault))
        return
    if listed is None:
        yield Finding("manifest.json", "no manifest: what is missing cannot be told", failure=False)
        return
    for name in listed.files:
        # Of the tables that each run has, the comparison with the cells says so.
        if name not in TABLES and not (run / name).is_file():
            yield Finding(name, "file is missing")
    files = {path.name: path for path in store.files()}
    for key, entry in listed.cells.items():
        file = files.pop(entry["file"], None)
        if file is None:
            yield Finding(key, f"cell is missing: no file {entry['file']}")
        elif sha256(file) != entry["sha256"]:
            yield Finding(key, "file was altered: SHA-256", entry["sha256"][:16], sha256(file)[:16])
    for name in files:
        yield Finding(name, "file of a cell is not in the manifest")


# --- versions -------------------------------------------------------------------------------------


def mixed(cells: Sequence[Cell]) -> Iterator[Finding]:
    """Cells that are of another version than most of the run, or of another task version."""
    for key in ONE:
        yield from _odd(key, {cell.key: today(cell.identity[key]) for cell in cells})
    by_method: dict[tuple[str, bool], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_method[cell.identity["method"], cell.identity["recovery"] != NONE].append(cell)
    for (method, recovered), own in by_method.items():
        what = f"{method} with recovery" if recovered else method
        for key in ONE_A_METHOD:
            yield from _odd(f"{key} of {what}", {cell.key: cell.identity[key] for cell in own})
    versions: dict[str, dict[str, Any]] = defaultdict(dict)
    for cell in cells:
        for row in cell.accuracy:
            versions[str(row.get("task"))][cell.key] = row.get("task_version")
    for task, values in versions.items():
        yield from _odd(f"version of task {task}", values)


def _odd(what: str, values: dict[str, Any]) -> Iterator[Finding]:
    ranked = [value for value, _ in Counter(map(str, values.values())).most_common()]
    for value in ranked[1:]:
        own = [key for key, each in values.items() if str(each) == value]
        more = f" (and {len(own) - 1} more cells)" if len(own) > 1 else ""
        yield Finding(own[0], f"mixed versions: {what}{more}", value, f"{ranked[0]} elsewhere")


def here(cells: Sequence[Cell]) -> Iterator[Finding]:
    """Notes where the program here is another than the one that made the cells."""
    from dyndepth.common.digests import harness_code
    from dyndepth.common.provenance import versions

    now = {**versions(), "harness_code": harness_code()}
    for key in HERE:
        for value in sorted({str(cell.identity[key]) for cell in cells}):
            if value != now[key]:
                yield Finding(
                    "run", f"made with another {key} than is here", value, now[key], False
                )


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
            for part in (_finite, _documents, _flops, _shares)
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
                if not math.isclose(row[spent], whole, rel_tol=SAME):
                    yield f"compute: {spent} of {task} against its causes", row[spent], whole
        for key, value in found.items():
            if not math.isclose(row[key], value, rel_tol=SAME):
                yield f"compute: {key} of {task} against its documents", row[key], value


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
