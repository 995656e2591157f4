"""What a sweep costs beside its model: many trivial cells, and the executors against each other.

A part of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dyndepth.cells.cell import DENSE, CellSpec, cell_identity
from dyndepth.cells.identity import IDENTITY, Row
from dyndepth.cells.store import Store
from dyndepth.common.registry import method_class, methods
from dyndepth.results.tables import write_tables
from dyndepth.sweep.driver import Driver
from dyndepth.sweep.executors import Inline
from dyndepth.sweep.progress.people import Lines
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import Worker

CELLS = 2000
DOCUMENTS = 10
EXECUTORS = ("inline", "processes", "ray")
WORKERS = 2


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements, a printed line each. See ``overhead`` and ``executors``."""
    found = {"overhead": overhead(), "executors": executors(options)}
    for name, line in found.items():
        print(f"sweep, {name}: {json.dumps(line)}")
    return found


class _Bench:
    """Computes nothing: the cells of a model with one task of ``DOCUMENTS`` documents."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.memory: list[int] = []

    @property
    def shared_identity(self) -> Row:
        """The same for all cells."""
        known = {"model": "none", "tasks": ["one"], "limit": {"one": DOCUMENTS}, "num_fewshot": 0}
        return {key: known.get(key, "x") for key in IDENTITY if key not in _OWN}

    def identity(self, plan: CellSpec) -> Row:
        return cell_identity(plan, self.shared_identity)

    def provenance(self, plan: CellSpec) -> Row:
        return {"threads": 1}

    def evaluate(self, plan: CellSpec) -> SimpleNamespace:
        self.memory.append(_resident())
        hits = [(plan.seed >> document) % 2 for document in range(DOCUMENTS)]
        shared = {"task": "one", "metric": "acc", "filter": "none", "task_version": "1"}
        spent = {"block_flops": 1.0, "total_flops": 2.0, "dense_block_flops": 2.0}
        samples = [
            {"task": "one", "doc_id": number, "doc_hash": str(number), "metric": "acc,none"}
            | {"outcome": hit, "outcomes": json.dumps({"acc,none": hit}), **spent}
            for number, hit in enumerate(hits)
        ]
        value = sum(hits) / DOCUMENTS
        accuracy = {"value": value, "stderr": 0.1, "n": DOCUMENTS, "higher_is_better": True}
        compute = {"task": "one", "phase": "all", "tokens": 100, "block_flops_per_token": 1.0}
        compute |= {"total_flops_per_token": 2.0, "block_speedup": 2.0, "total_speedup": 1.5}
        place = {"task": "all", "phase": "all", "layer": 0, "sublayer": "mlp", "executed": 0.5}
        return SimpleNamespace(
            accuracy=[shared | accuracy], compute=[compute], routing=[place], samples=samples
        )

    def measure(self, *_: Any) -> list[Row]:
        return []


_OWN: tuple[str, ...] = ("method", "parameters", "phases", "target_speedup", "seed", "recovery")
_OWN += ("fit_version", "method_code")


def overhead(cells: int = CELLS) -> dict[str, float]:
    """``cells`` cells that cost nothing to compute.

    ``ms_a_cell``: milliseconds a cell, everything included but the last tables; ``tables_s``: the
    six tables from all cells on the disk; ``mb_grown``: growth of the process's memory from the
    first quarter of the cells to the last, medians, in MB.
    """
    bench = _Bench()
    plans = [CellSpec(DENSE, seed=seed) for seed in range(cells)]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(output_path=Path(folder), timing="off")
        store = Store(folder)
        executor = Inline(lambda: Worker(bench, settings))
        executor.start()
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            listener = Lines()
            listener.start(cells, settings)
            Driver(plans, executor, store, settings, listener, bench.identity).run()
        swept = time.perf_counter() - started
        started = time.perf_counter()
        write_tables(store.all(), store.path)
        tables = time.perf_counter() - started
    quarter = max(1, cells // 4)
    early, late = (sorted(part)[len(part) // 2] for part in _ends(bench.memory, quarter))
    return {
        "cells": cells,
        "ms_a_cell": round(1e3 * (swept - tables) / cells, 2),
        "tables_s": round(tables, 2),
        "mb_grown": round((late - early) / 2**20, 1),
    }


def _ends(values: list[int], length: int) -> tuple[list[int], list[int]]:
    return values[:length], values[-length:]


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def executors(options: argparse.Namespace) -> dict[str, Any]:
    """The same sweep by each executor, ``WORKERS`` workers of one thread, in alternating rounds.

    ``throughput``: cells a second over those of ``inline``, the median over the rounds; loading the
    second worker's model is part of it. ``ray_ms_a_cell``: what Ray adds to a cell over processes,
    None where it is not installed. Fits are in the cache by then: a first sweep makes them.
    """
    there = [name for name in EXECUTORS if name != "ray" or find_spec("ray")]
    seconds: dict[str, list[float]] = {name: [] for name in there}
    with tempfile.TemporaryDirectory() as folder:
        cells = _sweep(options, "inline", Path(folder) / "first")["cells"]
        for turn in range(options.repeats):
            for name in there if turn % 2 else reversed(there):
                found = _sweep(options, name, Path(folder) / f"{name}-{turn}")
                seconds[name].append(found["seconds"])
    ratios = {
        name: [one / other for one, other in zip(seconds["inline"], own, strict=True)]
        for name, own in seconds.items()
    }
    added = None
    if "ray" in seconds:
        pairs = zip(seconds["ray"], seconds["processes"], strict=True)
        added = round(1e3 * _median([ray - other for ray, other in pairs]) / cells, 1)
    return {
        "cells": cells,
        "rounds": options.repeats,
        "throughput": {name: round(_median(values), 2) for name, values in ratios.items()},
        "throughputs": {name: [round(v, 2) for v in values] for name, values in ratios.items()},
        "ray_ms_a_cell": added,
    }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _of_the_model(options: argparse.Namespace) -> Iterator[str]:
    """The flags of the model that were given, beside its name and device."""
    for flag in ("revision", "attn_implementation"):
        if getattr(options, flag) is not None:
            yield from (f"--{flag}", getattr(options, flag))
    if options.trust_remote_code:
        yield "--trust_remote_code"


def _sweep(options: argparse.Namespace, executor: str, folder: Path) -> Row:
    """The summary of a sweep in a process of its own."""
    chosen = [
        name
        for name in methods()
        if name != DENSE
        and not method_class(name).needs_training
        and not method_class(name).uses_labels
        and not method_class(name).speculates
    ]
    command = [sys.executable, "-m", "dyndepth.sweep", "--methods", ",".join(chosen)]
    command += ["--model", options.model, "--device", options.device, "--timing", "off"]
    command += ["--speedups", "1.25,1.5,2", "--tasks", "socialiqa", "--output_path", str(folder)]
    command += ["--limit", str(options.documents), "--executor", executor]
    command += ["--workers", str(WORKERS), "--cpus_per_cell", "1"]
    command += [*_of_the_model(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # nosec B603  # our own command line, no shell
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    summary: Row = json.loads(done.stdout.splitlines()[-1])["sweep"]
    return summary
