"""The sweep: score, count and time every cell of a grid, and keep what was done.

``python -m dyndepth.sweep --methods ...``: everything is checked before anything is written; each
cell is on the disk as soon as it is scored; the same command again computes what is missing.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dyndepth.errors import UserError
from dyndepth.grid import Plan, limits, plans
from dyndepth.options import EMBEDDED, Settings, read
from dyndepth.records import ROWS, Cell, Row
from dyndepth.store import Store

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Bench(Protocol):
    """What computes cells: a ``workbench.Workbench``, or a stand-in in tests."""

    def identity(self, plan: Plan) -> Row: ...
    def provenance(self, plan: Plan) -> Row: ...
    def evaluate(self, plan: Plan) -> Any: ...
    def measure(self, plan: Plan, samples: list[Row]) -> list[Row]: ...


@dataclass
class Tally:
    """What became of the cells of one sweep: their hashes, and counts by outcome."""

    keys: list[str] = field(default_factory=list)
    done: int = 0
    reused: int = 0
    failed: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell failed, 2 for wrong input, 130 after Ctrl-C."""
    debug = False
    # A scheduler's polite kill is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = read(sys.argv[1:] if arguments is None else arguments)
        debug = settings.debug
        return sweep(settings)
    except UserError as fault:
        if debug:
            traceback.print_exc()
        print(f"dyndepth.sweep: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes where it stopped", file=sys.stderr)
        return INTERRUPTED


def sweep(settings: Settings) -> int:
    """Run the sweep that ``settings`` describe; see ``main`` for the status returned.

    Raises:
        UserError: wrong input; nothing was written.
    """
    started = time.monotonic()
    store = Store(settings.output_path)
    store.check_model(settings.model)
    store.check_free()
    quiet_libraries(settings.debug)

    from dyndepth.models import layer_count
    from dyndepth.tasks import resolve
    from dyndepth.workbench import Workbench, supported_config

    layers = layer_count(settings.model, settings.revision, settings.trust_remote_code)
    if settings.model != EMBEDDED:
        supported_config(settings)
    cells = plans(settings, layers)
    tasks = resolve(settings.tasks, settings.include_path)
    announce(settings, cells, tasks)
    if settings.dry_run:
        from dyndepth.estimate import print_estimate

        print_estimate(settings, cells, tasks)
        return 0

    print(f"loading {settings.model}", flush=True)
    bench = Workbench(settings, tasks)
    store.check_model(settings.model, bench.fingerprint)
    with store.locked():
        store.sweep_up()
        return finish(run(cells, bench, store, settings), cells, store, started)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run(cells: Sequence[Plan], bench: Bench, store: Store, settings: Settings) -> Tally | None:
    """Compute what is missing of ``cells``; the tables are written anew after each.

    Returns None if it was interrupted; then the tables hold what was finished.
    """
    from dyndepth.tables import write_tables

    tally = Tally()
    started = time.monotonic()
    try:
        for index, plan in enumerate(cells, start=1):
            identity = bench.identity(plan)
            recorded = None if settings.resume == "never" else store.read(identity)
            todo = needed(recorded, settings)
            elapsed = f"{time.monotonic() - started:.0f} s"
            label = f"[{index}/{len(cells)}] {plan.describe()}"
            if recorded is not None and todo == "nothing":
                print(f"{label}: kept ({recorded.status})", flush=True)
                tally.reused += recorded.status == "done"
                tally.failed += recorded.status == "error"
                tally.keys.append(recorded.key)
                continue
            print(f"{label}: {'timing' if todo == 'timing' else 'running'} ({elapsed})", flush=True)
            kept = recorded if todo == "timing" else None
            cell = compute(plan, bench, store, settings, identity, kept)
            tally.done += cell.status == "done"
            tally.failed += cell.status == "error"
            tally.keys.append(cell.key)
            if cell.status == "error":
                print(f"{label}: failed: {cell.error}", file=sys.stderr, flush=True)
                if settings.debug:
                    print(cell.traceback, file=sys.stderr, flush=True)
            write_tables(store.all(), store.path)
        write_tables(store.all(), store.path)
    except KeyboardInterrupt:
        write_tables(store.all(), store.path)
        print(
            f"\ninterrupted with {tally.done + tally.reused} of {len(cells)} cells finished; "
            "the same command resumes where it stopped",
            file=sys.stderr,
            flush=True,
        )
        return None
    return tally


def needed(recorded: Cell | None, settings: Settings) -> str:
    """What remains to be done of a cell: ``everything``, ``timing`` or ``nothing``."""
    if recorded is None:
        return "everything"
    if settings.resume == "always" and recorded.status == "error":
        return "nothing"
    return recorded.lacks(settings.timing)


def compute(
    plan: Plan,
    bench: Bench,
    store: Store,
    settings: Settings,
    identity: Row,
    recorded: Cell | None,
) -> Cell:
    """Score one cell (unless ``recorded`` holds its scores), time it, and record both.

    The scores are on the disk before the timing starts. A failure becomes the cell's error.
    """
    cell = recorded or Cell(identity)
    started = time.monotonic()
    try:
        if recorded is None:
            evaluation = bench.evaluate(plan)
            for name in ROWS:
                if name != "timing":
                    setattr(cell, name, getattr(evaluation, name))
            cell.provenance = bench.provenance(plan) | {
                "evaluation_seconds": round(time.monotonic() - started, 3)
            }
            cell = store.write(cell)
        if settings.timing != "off":
            started = time.monotonic()
            cell.timing = bench.measure(plan, cell.samples)
            cell.timing_level = settings.timing
            cell.provenance["timing_seconds"] = round(time.monotonic() - started, 3)
        cell.status, cell.error, cell.traceback = "done", "", ""
    except Exception as fault:  # noqa: BLE001 - whatever a method does, the sweep goes on
        cell.status, cell.error = "error", in_one_line(fault)
        cell.traceback = traceback.format_exc()
        free_memory()
    return store.write(cell)


def in_one_line(fault: Exception) -> str:
    """An exception as a cell's error text."""
    text = " ".join(str(fault).split())
    return text if isinstance(fault, UserError) else f"{type(fault).__name__}: {text}"


def free_memory() -> None:
    """Give back what a failed cell may still hold on the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def announce(settings: Settings, cells: Sequence[Plan], tasks: Sequence[str]) -> None:
    """Say what is about to be done and how sharp the result will be."""
    from dyndepth.intervals import expected_margin

    print(f"{len(cells)} cells on {settings.model}; documents, and the most that the 95% margin")
    print("of an accuracy over them can be (differences to dense are paired and sharper):")
    for task, documents in limits(settings, tasks).items():
        margin = f"±{100 * expected_margin(documents):.1f} points" if documents else ""
        print(f"  {task}: {documents or 'all'} {margin}".rstrip())
    sys.stdout.flush()


def finish(tally: Tally | None, cells: Sequence[Plan], store: Store, started: float) -> int:
    """Show the leaderboard and where the tables lie; the last line is one JSON document."""
    from dyndepth.leaderboard import check_comparable, leaderboard, show
    from dyndepth.tables import NAMES

    if tally is None:
        return INTERRUPTED
    recorded = store.all()
    try:
        check_comparable(recorded)
    except UserError as fault:
        print(f"warning: {store.path}: {fault}", file=sys.stderr)
    keys = set(tally.keys)
    show([row for row in leaderboard(recorded) if row["cell"] in keys])
    print(f"tables: {', '.join(str(store.path / name) for name in NAMES)}")
    summary = {
        "output_path": str(store.path),
        "cells": len(cells),
        "done": tally.done,
        "reused": tally.reused,
        "failed": tally.failed,
        "seconds": round(time.monotonic() - started, 1),
        "leaderboard": str(store.path / "leaderboard.csv"),
    }
    print(json.dumps({"sweep": summary}), flush=True)
    return 1 if tally.failed else 0


def quiet_libraries(debug: bool) -> None:
    """Keep the libraries' chatter out of the progress lines, unless --debug asks for it."""
    # Forking after the tokenizers' threads started would deadlock; the library warns at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lm-eval", "lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
