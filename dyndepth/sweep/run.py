"""The sweep: score, count and time every cell of a grid, and keep what was done.

Everything is checked before anything is written; each cell is on the disk as soon as it is scored;
the same settings again compute what is missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import CellSpec, cell_identity
from dyndepth.cells.identity import Row
from dyndepth.cells.store import Store
from dyndepth.common.commands import INTERRUPTED
from dyndepth.common.errors import UserError
from dyndepth.sweep.driver import Driver, Tally
from dyndepth.sweep.executors import Executor, Inline, Processes
from dyndepth.sweep.grid import Grid, grid
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import hired, quiet_libraries

if TYPE_CHECKING:
    from dyndepth.sweep.progress.interface import Listener


def sweep(settings: Settings) -> int:
    """Run the sweep that ``settings`` describe. Returns 0, 1 if a cell failed, 130 after Ctrl-C.

    Raises:
        UserError: wrong input; nothing was written.
        RunFailed: it cannot go on; what was finished is kept.
    """
    from dyndepth.sweep.progress import trackers
    from dyndepth.sweep.progress.choice import listener_for

    store = Store(settings.output_path, settings.shard)
    store.pull()
    store.check_model(settings.model)
    store.check_free()
    trackers.check(settings.trackers)
    quiet_libraries(settings.debug)

    found = grid(settings)
    announce(settings, found)
    if settings.dry_run:
        from dyndepth.sweep.estimate.report import print_estimate

        print_estimate(settings, found)
        return 0

    executor = executor_for(settings, found)
    listener = listener_for(settings, settings.executor != "inline")
    print(f"loading {settings.model}", flush=True)
    try:
        shared = executor.start()
        store.check_model(settings.model, shared["model_fingerprint"])
        with store.locked():
            store.sweep_up()
            identify = partial(cell_identity, shared=shared)
            return run(
                found.cells,
                executor,
                store,
                settings,
                listener,
                identify,
            )
    finally:
        executor.close()


def executor_for(settings: Settings, found: Grid) -> Executor:
    """The executor that ``settings`` name, not started.

    Raises:
        UserError: what it needs is not installed.
    """
    if settings.executor == "processes":
        return Processes(settings, found)
    if settings.executor == "ray":
        from dyndepth.sweep.ray import Ray

        return Ray(settings, found)
    return Inline(lambda: hired(settings, found.documents))


def run(
    cells: Sequence[CellSpec],
    executor: Executor,
    store: Store,
    settings: Settings,
    listener: Listener,
    identify: Callable[[CellSpec], Row],
) -> int:
    """Compute what is missing of ``cells`` and say what came of it; returns as ``sweep``."""
    started = time.monotonic()
    driver = Driver(cells, executor, store, settings, listener, identify)
    listener.start(len(cells), settings)
    place = str(store.path) if store.mirror is None else store.mirror.url
    summary: dict[str, Any] = {"output_path": place, "cells": len(cells)}
    try:
        driver.run()
    except KeyboardInterrupt:
        finished = driver.tally.done + driver.tally.reused
        print(
            f"\ninterrupted with {finished} of {len(cells)} cells finished; "
            "the same command resumes where it stopped",
            file=sys.stderr,
            flush=True,
        )
        return INTERRUPTED
    finally:
        summary |= outcome(driver.tally, store, started)
        listener.close(summary)
    show_results(driver.tally, store)
    print(json.dumps({"sweep": summary}), flush=True)
    return 1 if driver.tally.failed else 0


def announce(settings: Settings, found: Grid) -> None:
    """Say what is about to be done and how sharp the result will be."""
    from dyndepth.results.statistics.intervals import expected_margin

    print(
        f"{len(found.cells)} cells on {settings.model}; documents, and the most that the 95% margin"
    )
    print("of an accuracy over them can be (differences to dense are paired and sharper):")
    for task, documents in found.documents.items():
        margin = f"±{100 * expected_margin(documents):.1f} points" if documents else ""
        print(f"  {task}: {documents or 'all'} {margin}".rstrip())
    sys.stdout.flush()


def show_results(tally: Tally, store: Store) -> None:
    """Show the leaderboard of the sweep's cells and where the tables lie."""
    from dyndepth.cells.merging import check_comparable
    from dyndepth.results.console import show_leaderboard
    from dyndepth.results.leaderboard import leaderboard
    from dyndepth.results.tables import NAMES

    recorded = store.all()
    try:
        check_comparable(recorded)
    except UserError as fault:
        print(f"warning: {store.path}: {fault}", file=sys.stderr)
    keys = set(tally.keys)
    show_leaderboard([row for row in leaderboard(recorded) if row["cell"] in keys])
    print(f"tables in {store.path}: {', '.join(NAMES)}")


def outcome(tally: Tally, store: Store, started: float) -> dict[str, Any]:
    """Counts, seconds since ``started`` and the leaderboard's file, as the last line has them."""
    return {
        "done": tally.done,
        "reused": tally.reused,
        "failed": tally.failed,
        "seconds": round(time.monotonic() - started, 1),
        "leaderboard": str(store.path / "leaderboard.csv"),
    }
