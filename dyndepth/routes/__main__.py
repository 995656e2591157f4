"""The command line ``python -m dyndepth.routes``: records routing traces.

With ``--methods`` it records them on some documents; with a sweep's output folder every cell of
that run, rebuilt from its identity, into ``RUN/routes/<cell>.safetensors``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import DENSE, method_identity
from dyndepth.cells.identity import cell_hash
from dyndepth.cells.store import Store
from dyndepth.common.commands import HELP, Parser, run, worded
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.routes.recorded import Loaded, Recording, documents
from dyndepth.sweep.grid import plans
from dyndepth.sweep.rerun import check_given, revision_of
from dyndepth.sweep.settings import Settings, settings

LISTS = ("methods", "speedups", "seed")
FREE = (*LISTS, "model", "phases", "dtype", "attn_implementation", "revision", "output_path")
"""Flags that a recorded run decides by itself."""
TEXTS = {
    "methods": HELP["methods"].replace("compare", "record"),
    "output_path": "folder for the recorded files; needed without RUN",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell could not be recorded, 2 for wrong input."""
    return run("routes", _routes, arguments, "interrupted; what was recorded is kept")


def _parser() -> Parser:
    built = Parser(
        "routes",
        "Record which sublayers each token executes, by method or by a sweep's cell.",
        "Without RUN, flags that are not given are as a sweep has them.",
    )
    add = built.add_argument
    add("run", nargs="?", metavar="RUN", help=f"{HELP['run']}: record its cells again")
    for name in FREE:
        text = worded(name, TEXTS.get(name, ""))
        add(f"--{name}", nargs="+" if name in LISTS else None, metavar=name.upper(), help=text)
    add("--corpus", help=f"{HELP['corpus']} (default: embedded)")
    add("--device", help=f"{HELP['device']} (default: auto)")
    add("--trust_remote_code", action="store_true", help=HELP["trust_remote_code"])
    built.whole("limit", 1, "evaluation passages to record", 8)
    built.whole("length", 1, "tokens; longer documents are cut", 256)
    built.whole(
        "prompt_length",
        0,
        "tokens of each document that count as prompt; the rest is generation, as when passages "
        "are scored",
        1,
    )
    add("--text", metavar="FILE", help="text file to record, an empty line between documents")
    return built


def _routes(given: list[str]) -> int:
    """Record; the last line printed is one JSON document."""
    options = vars(_parser().parse_args(given))
    started = time.monotonic()
    jobs, output = _cells(options) if options["run"] else _methods(options)
    texts = documents(options["text"], options["limit"])
    print(f"{len(jobs)} to record on {len(texts)} documents", flush=True)
    recorded = failed = 0
    loaded = Loaded(options)
    for index, job in enumerate(jobs, start=1):
        where = f"[{index}/{len(jobs)}] {job.label}"
        print(f"{where}: recording ({time.monotonic() - started:.0f} s)", flush=True)
        try:
            job.record(loaded, texts, options).save(output / f"{job.file}.safetensors")
            recorded += 1
        except UserError as fault:
            if not options["run"]:
                raise
            failed += 1
            print(f"{where}: failed: {fault}", file=sys.stderr, flush=True)
    summary = {
        "output_path": str(output),
        "recorded": recorded,
        "failed": failed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps({"routes": summary}), flush=True)
    return 1 if failed else 0


def _methods(options: dict[str, Any]) -> tuple[list[Recording], Path]:
    """Jobs of ``--methods``, and where they go."""
    from dyndepth.common.registry import parse_methods
    from dyndepth.models.loading import layer_count, longest_window

    if not options["methods"]:
        raise UserError("nothing to record: give --methods, or a sweep's output folder")
    if options["output_path"] is None:
        raise UserError("--output_path is missing; name a folder for the recorded files")
    chosen = _settings(options, FREE)
    model = (chosen.model, chosen.revision, chosen.trust_remote_code)
    named = {name for name, _ in parse_methods(chosen.methods)}
    jobs = []
    for plan in plans(chosen, layer_count(*model), longest_window(*model)):
        if plan.method == DENSE and DENSE not in named:
            continue
        name = f"{plan.method}-x{plan.target_speedup:g}-seed{plan.seed}"
        file = f"{name}-{cell_hash(method_identity(plan.build(), plan.recovery))}"
        jobs.append(Recording(plan.describe(), file, chosen, plan=plan))
    return jobs, chosen.output_path


def _cells(options: dict[str, Any]) -> tuple[list[Recording], Path]:
    """Jobs of a sweep's cells, and where they go; what can't be recorded is told and left out."""
    given = [f"--{name}" for name in FREE if options[name] is not None]
    if given:
        raise UserError(f"{given[0]} can't be given with a run's folder, which decides it")
    folder = path_of(options["run"])
    cells = Store(folder).all()
    if not cells:
        raise UserError(f"{options['run']} holds no cells; give the --output_path of a sweep")
    jobs = []
    for cell in cells:
        identity = cell.identity
        label = (
            f"{identity['method']} at {identity['target_speedup']:g}x, "
            f"seed {identity['seed']}, cell {cell.key}"
        )
        if cell.status != "done":
            print(f"{label}: left out, for it failed", file=sys.stderr)
        else:
            check_given(identity, options, ["corpus"])
            of_cell = {
                "model": identity["model"],
                "dtype": identity["dtype"],
                "attn_implementation": identity["attn_implementation"],
                "revision": revision_of(identity) or None,
            }
            wanted = _settings(options | of_cell, tuple(of_cell))
            jobs.append(Recording(label, cell.key, wanted, identity=identity))
    return jobs, folder / "routes"


def _settings(options: dict[str, Any], names: Sequence[str]) -> Settings:
    """Checked settings from some of the options, and those that both ways of calling share."""
    names = (*names, "corpus", "device", "trust_remote_code")
    return settings({name: options[name] for name in names if options[name] is not None})


if __name__ == "__main__":
    sys.exit(main())
