"""The command line ``python -m dyndepth.studies NAME``: run a study's sweeps, test its claims.

The sweeps run into one output path (finished cells are kept, as in every sweep); what was measured
is compared at equal achieved block FLOPs and written to ``claims.csv`` and ``claims.md``.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dyndepth.common.commands import INTERRUPTED, Parser, run, worded
from dyndepth.common.errors import UserError
from dyndepth.studies.study import FLAGS, Study, load_study, studies
from dyndepth.sweep.settings import Settings


def parser() -> Parser:
    """The command line; values are checked as the sweep checks them."""
    built = Parser(
        "studies",
        "Run the sweeps of a study; print its claims with verdicts and intervals.",
        debug=False,
    )
    names = ", ".join(studies()) or "none installed"
    built.add_argument("name", metavar="NAME", help=f"the study: {names}")
    built.add_argument(
        "--only_report",
        action="store_true",
        help="run nothing: report on the cells that are there, scored with the same --limit",
    )
    defaults = {setting.name: setting.default for setting in fields(Settings)}
    for flag in FLAGS:
        text = worded(flag)
        if isinstance(defaults[flag], bool):
            built.add_argument(f"--{flag}", action="store_true", default=None, help=text)
        else:
            several = "+" if isinstance(defaults[flag], tuple) else None
            built.add_argument(f"--{flag}", nargs=several, metavar=flag.upper(), help=text)
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell failed, 2 for wrong input, 130 after Ctrl-C."""
    # A scheduler's polite kill is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resumes = "interrupted; the same command resumes where it stopped"
    return run("studies", _studies, arguments, resumes)


def _studies(given: list[str]) -> int:
    flags = vars(parser().parse_args(given))
    name, only_report = flags.pop("name"), flags.pop("only_report")
    flags = {key: value for key, value in flags.items() if value is not None}
    return work_through(load_study(name), flags, only_report)


def work_through(study: Study, flags: dict[str, Any], only_report: bool = False) -> int:
    """Run the study's sweeps, then report; see ``main`` for the status returned.

    Raises:
        UserError: wrong input, or cells that must not be compared.
    """
    started = time.monotonic()
    sweeps = study.settings(flags)
    status = 0
    if not only_report:
        # Before the first cell is computed, every later sweep's methods have been looked at too.
        check(sweeps)
        status = run_sweeps(study, sweeps)
        if status == INTERRUPTED or sweeps[0].dry_run or not study.claims:
            return status
    if not study.claims:
        raise UserError(f"the study {study.name} makes no claims, so there is no report of its own")
    # numpy and scipy come late: --help must be instant.
    from dyndepth.cells.store import Store
    from dyndepth.studies import acceptance, similarity
    from dyndepth.studies.recordings import position_table, record
    from dyndepth.studies.report import show, write
    from dyndepth.studies.verdicts import comparable, drafting, failures, likened, report, traced

    store = Store(sweeps[0].output_path)
    store.check_model(sweeps[0].model)
    cells = comparable(store, sweeps[0])
    phases = sweeps[0].phases
    needed = traced(study, cells, phases)
    if not only_report:
        record(needed, sweeps[0], store.path)
        similarity.record(likened(study, cells, phases), sweeps[0], store.path)
        asked = drafting(study, cells, phases, "acceptance", "transfer", "identical")
        acceptance.record(asked, sweeps[0], store.path)
        asked = drafting(study, cells, phases, "transfer")
        acceptance.record_transfer(asked, sweeps[0], store.path)
    failed = failures(study, cells, phases)
    rows = report(study, cells, phases, store.path)
    accepted = acceptance.table(drafting(study, cells, phases, "acceptance"), store.path)
    positions = position_table(needed, store.path)
    paths = write(study, rows, cells, positions, accepted, store.path)
    show(study, rows)
    for cell in failed:
        print(f"failed: {cell.identity['method']} {cell.key}: {cell.error}", file=sys.stderr)
    print(f"written to {', '.join(map(str, paths))}")
    verdicts: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = verdicts.setdefault(row["claim"], {})
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    summary = {
        "name": study.name,
        "output_path": str(store.path),
        "cells": len(cells),
        "failed": len(failed),
        "verdicts": verdicts,
        "seconds": round(time.monotonic() - started, 1),
        "claims": str(paths[0]),
    }
    print(json.dumps({"study": summary}), flush=True)
    return 1 if failed or status else 0


def check(sweeps: Sequence[Settings]) -> None:
    """Raise UserError if a sweep names a method or a speedup that the model cannot have."""
    from dyndepth.models.loading import layer_count, longest_window
    from dyndepth.sweep.grid import plans

    one = sweeps[0]
    model = (one.model, one.revision, one.trust_remote_code)
    layers, longest = layer_count(*model), longest_window(*model)
    for settings in sweeps:
        plans(settings, layers, longest)


def run_sweeps(study: Study, sweeps: Sequence[Settings]) -> int:
    """Run the sweeps one after another; the worst of their statuses. Ctrl-C ends them all."""
    from dyndepth.sweep.run import sweep

    worst = 0
    print(f"{study.title}: {len(sweeps)} sweeps into {sweeps[0].output_path}")
    for index, settings in enumerate(sweeps, start=1):
        print(f"\nsweep {index} of {len(sweeps)}: {settings.methods}", flush=True)
        status = sweep(settings)
        if status == INTERRUPTED:
            return status
        worst = max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main())
