"""Where the cells of a study execute: attention against MLPs, early against late in a document.

Traces are recorded by ``dyndepth.routes`` on evaluation passages, one file a cell under the run's
``routes/``. Without them, attention and MLPs are still compared block by block from the cells.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.common.errors import UserError
from dyndepth.method import SUBLAYERS
from dyndepth.results.statistics.curves import Vector
from dyndepth.results.statistics.differences import Difference, paired
from dyndepth.routes.trace import Routes
from dyndepth.sweep.settings import Settings

DOCUMENTS = 32
LENGTH = 512
"""Passages that are recorded for each cell, and tokens after which they are cut."""
PROMPT = 1
"""Tokens of a passage that count as prompt: it is scored from its first token on."""
BINS = 8
"""Ranges of positions in positions.csv."""

Groups = Mapping[float, Sequence[Cell]]
"""Target speedup -> cells of one method that differ in their seed alone."""


def trace_file(cell: Cell, folder: Path) -> Path:
    """Where the trace of a run's cell lies; ``python -m dyndepth.routes RUN`` writes it there."""
    return folder / "routes" / f"{cell.key}.safetensors"


def record(cells: Sequence[Cell], settings: Settings, folder: Path) -> None:
    """Record the traces of ``cells`` that are missing, on ``DOCUMENTS`` evaluation passages.

    A cell that cannot be recorded is told and left out.
    """
    from dyndepth.routes import recorded

    missing = [cell for cell in cells if not trace_file(cell, folder).is_file()]
    if not missing:
        return
    texts = recorded.documents(None, DOCUMENTS)
    options = {"prompt_length": PROMPT, "length": LENGTH}
    bench = recorded.Loaded(options)

    def trace(cell: Cell, job: Any) -> None:
        job.record(bench, texts, options).save(trace_file(cell, folder))

    again(missing, settings, "routes", trace)


def again(
    cells: Sequence[Cell], settings: Settings, what: str, run: Callable[[Cell, Any], None]
) -> None:
    """Have ``run`` measure ``what`` of each cell, given it and a ``recorded.Recording`` of it.

    A cell that cannot be rebuilt is told and left out.
    """
    from dyndepth.routes import recorded

    started = time.monotonic()
    for index, cell in enumerate(cells, start=1):
        label = f"{cell.identity['method']} at {cell.identity['target_speedup']:g}x"
        elapsed = f"{time.monotonic() - started:.0f} s"
        print(f"[{index}/{len(cells)}] {what} of {label} ({elapsed})", flush=True)
        job = recorded.Recording(label, cell.key, settings, identity=cell.identity)
        try:
            run(cell, job)
        except UserError as fault:
            print(f"{what} of {label} left out: {fault}", file=sys.stderr, flush=True)


def sublayers(label: str, groups: Groups, folder: Path) -> Iterator[tuple[Row, Difference]]:
    """Attention minus MLPs by executed fraction of tokens, one row a target.

    Over documents where every cell has its trace, else over blocks (over all tasks).
    """
    for target, cells in groups.items():
        traces = _traces(cells, folder)
        weights = None
        if traces:
            executed = np.mean([_by_document(trace) for trace in traces], axis=0)
            weights = np.array(traces[0].lengths, dtype=np.float64)
        else:
            executed = np.mean([_by_layer(cell) for cell in cells], axis=0)
        sides = [f"{label}: {name}" for name in SUBLAYERS]
        row = _row(target, cells, *sides) | {"unit": "documents" if traces else "layers"}
        row["task"] = "wikipedia passages" if traces else "all"
        yield row, paired(executed[:, 0], executed[:, 1], weights)


def positions(label: str, groups: Groups, folder: Path) -> Iterator[tuple[Row, Difference | str]]:
    """Second half of each document minus its first, by executed fraction; a row a kind."""
    for target, cells in groups.items():
        traces = _traces(cells, folder)
        halves = np.mean([_by_half(trace) for trace in traces], axis=0) if traces else None
        for index, name in enumerate(SUBLAYERS):
            sides = [f"{label}: {name}, {half} half" for half in ("second", "first")]
            row = _row(target, cells, *sides) | {"unit": "documents", "task": "wikipedia passages"}
            if halves is None:
                yield row, f"no routes recorded of {label}; run the study without --only_report"
                continue
            weights = np.array(traces[0].lengths, dtype=np.float64)
            # A document of one token has no halves.
            kept = weights > 1
            yield row, paired(halves[kept, 1, index], halves[kept, 0, index], weights[kept])


def position_table(cells: Sequence[Cell], folder: Path) -> list[Row]:
    """Rows of positions.csv: cell x range of positions x kind of sublayer, over all blocks."""
    found: list[Row] = []
    keys = ("method", "parameters", "target_speedup", "seed")
    for cell in cells:
        for trace in _traces([cell], folder):
            about = {"cell": cell.key} | {key: cell.identity[key] for key in keys}
            table = trace.by_position(BINS).to_dict("records")
            found += [about | {str(key): value for key, value in row.items()} for row in table]
    return found


def _row(target: float, cells: Sequence[Cell], a: str, b: str) -> Row:
    keys, seeds = " ".join(cell.key for cell in cells), len(cells)
    row: Row = {"metric": "executed", "target_speedup": target, "a": a, "b": b}
    return row | {"cells_a": keys, "cells_b": keys, "seeds_a": seeds, "seeds_b": seeds}


def _traces(cells: Sequence[Cell], folder: Path) -> list[Routes]:
    """The traces of all cells, on the same documents; empty if one is missing."""
    files = [trace_file(cell, folder) for cell in cells]
    if not all(file.is_file() for file in files):
        return []
    traces = [Routes.load(file) for file in files]
    if len({(trace.documents, trace.lengths) for trace in traces}) != 1:
        raise UserError(
            f"the traces {', '.join(map(str, files))} are of different documents; remove them and "
            "run the study again"
        )
    return traces


def _by_layer(cell: Cell) -> Vector:
    """Executed fraction of tokens over all tasks, ``[layers, (attention, mlp)]``."""
    rows = {(r["layer"], r["sublayer"]): r["executed"] for r in cell.routing if r["phase"] == "all"}
    layers = 1 + max(layer for layer, _ in rows)
    return np.array([[rows[layer, kind] for kind in SUBLAYERS] for layer in range(layers)])


def _by_document(trace: Routes) -> Vector:
    """Executed fraction over tokens and blocks, ``[documents, (attention, mlp)]``."""
    return np.array([_gates(trace, document).mean(0) for document in trace.documents])


def _by_half(trace: Routes) -> Vector:
    """The same of each half of a document, ``[documents, (first, second), (attention, mlp)]``."""
    found = np.zeros((len(trace.documents), 2, len(SUBLAYERS)))
    for index, document in enumerate(trace.documents):
        gates = _gates(trace, document)
        middle = len(gates) // 2
        if middle:
            found[index] = gates[:middle].mean(0), gates[middle:].mean(0)
    return found


def _gates(trace: Routes, document: str) -> Vector:
    """Executed fraction over blocks, ``[tokens, (attention, mlp)]``."""
    return trace.gates[trace.document(document)].mean(1)
