"""Studies: the sweeps that a set of claims needs, and what they show, from one command.

``python -m dyndepth.studies NAME`` runs the study's sweeps into one output path (finished cells are
kept, as in every sweep), then compares what was measured at equal achieved block FLOPs and writes
``claims.csv`` and ``claims.md``. A study is plain data and lies with the methods: a ``Study`` that
a distribution names in the entry-point group ``dyndepth.studies``.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from dyndepth.cells.recipe import NONE, parse_recoveries
from dyndepth.common import commands
from dyndepth.common.commands import INTERRUPTED
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_path, slug
from dyndepth.data.wheels import EMBEDDED
from dyndepth.sweep import settings as options
from dyndepth.sweep.settings import OTHERS, Settings

GROUP = "dyndepth.studies"
SWEEP_KEYS = frozenset({"methods", "speedups", "seed", "recovery", "timing"})
"""What a study's sweeps may differ in; all else is shared, so that their cells compare."""

FLAGS = (
    *("model", "output_path", "limit", "speedups", "sample_seed", "num_fewshot", "batch_size"),
    *("device", "dtype", "attn_implementation", "revision", "trust_remote_code", "corpus"),
    *("timing", "resume", "dry_run", "debug"),
)
"""Settings of the sweep that may be given on a study's command line."""


@dataclass(frozen=True)
class Pick:
    """The cells of one method: ``method`` as ``--methods`` takes it, ``recovery`` as --recovery."""

    method: str
    recovery: str = NONE

    @property
    def recipe(self) -> str:
        """The recovery as a cell's identity writes it."""
        return parse_recoveries([self.recovery])[0]

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.method if self.recovery == NONE else f"{self.method} + {self.recovery}"


Kind = Literal[
    "equal_flops", "equal_modules", "full_depth", "similarity", "reach", "sublayers", "position"
]


@dataclass(frozen=True)
class Claim:
    """One claim, and the comparisons that speak for or against it.

    Attributes:
        name: a word for file columns.
        text: the claim in one sentence, as its source makes it.
        source: where it is made.
        a, b: the method it is about, and those that it is compared to one by one.
        kind: ``equal_flops``: at each of A's budgets, with B interpolated to it.
            ``equal_modules``: the same at equal shares of executed sublayers, an attention and an
            MLP counting alike. ``full_depth``: at each of A's budgets, with B as it is, whatever
            it executes. ``similarity``: as ``equal_flops``, by the cosine of the final hidden
            states with dense's, over evaluation passages. ``reach``: the least share of dense's
            block FLOPs at which A, and each B, is as good as dense. ``sublayers``: A's attention
            with A's MLPs, by executed fraction; ``position``: the second half of each document
            with its first, by executed fraction. The last two use no B, and like ``similarity``
            no metrics.
        metrics: pairs of task and metric.
        published: the number that the source gives, in a few words.
    """

    name: str
    text: str
    source: str
    a: Pick
    b: tuple[Pick, ...] = ()
    kind: Kind = "equal_flops"
    metrics: tuple[tuple[str, str], ...] = ()
    published: str = ""


@dataclass(frozen=True)
class Study:
    """Sweeps and claims.

    Attributes:
        name, title: for the command line; for people.
        sweeps: settings of each sweep, of the keys ``SWEEP_KEYS``.
        claims: in the order of the report; none: its sweeps are all there is.
        limit: documents by task; the tasks are its keys. For the embedded model only: every other
            model is scored on all documents unless --limit says otherwise.
    """

    name: str
    title: str
    sweeps: tuple[dict[str, Any], ...]
    claims: tuple[Claim, ...]
    limit: dict[str, int | None]

    def __post_init__(self) -> None:
        for sweep in self.sweeps:
            if not sweep.keys() <= SWEEP_KEYS:
                wrong = ", ".join(sorted(sweep.keys() - SWEEP_KEYS))
                raise ValueError(f"study {self.name}: its sweeps must not differ in {wrong}")

    def settings(self, flags: dict[str, Any]) -> list[Settings]:
        """The settings of each sweep; ``flags`` are what the command line adds or overrides.

        Raises:
            UserError: a value that is not what its setting takes.
        """
        model = flags.get("model", EMBEDDED)
        check_path("model", model)
        folder = f"study-{self.name}" + ("" if model == EMBEDDED else f"-{slug(model)}")
        shared: dict[str, Any] = {
            "tasks": list(self.limit),
            "timing": "off",
            "output_path": Path("runs") / folder,
        }
        if model == EMBEDDED:
            shared["limit"] = {OTHERS: None} | self.limit
        return [options.settings(shared | sweep | flags) for sweep in self.sweeps]


def studies() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed study; nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP))}


def load_study(name: str) -> Study:
    """The study of that name. Raises UserError, with the names that there are, if none is."""
    found = studies()
    if name not in found:
        raise UserError(f"unknown study {name!r}; there is {', '.join(found) or 'none installed'}")
    loaded: Study = found[name].load()
    return loaded


def parser() -> argparse.ArgumentParser:
    """The command line; values are checked as the sweep checks them."""
    built = commands.Parser(
        prog="python -m dyndepth.studies",
        description="Run the sweeps of a study; print its claims with verdicts and intervals.",
        epilog="Dashes and underscores in flags are the same.",
        allow_abbrev=False,
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
        text = commands.HELP[flag].replace("%", "%%")
        if isinstance(defaults[flag], bool):
            built.add_argument(f"--{flag}", action="store_true", default=None, help=text)
        else:
            several = "+" if isinstance(defaults[flag], tuple) else None
            built.add_argument(f"--{flag}", nargs=several, metavar=flag.upper(), help=text)
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell failed, 2 for wrong input, 130 after Ctrl-C."""
    debug = False
    # A scheduler's polite kill is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        flags = vars(parser().parse_args([commands.underscored(word) for word in given]))
        name, only_report = flags.pop("name"), flags.pop("only_report")
        flags = {key: value for key, value in flags.items() if value is not None}
        debug = bool(flags.get("debug"))
        return run(load_study(name), flags, only_report)
    except UserError as fault:
        if debug:
            traceback.print_exc()
        print(f"dyndepth.studies: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes where it stopped", file=sys.stderr)
        return INTERRUPTED


def run(study: Study, flags: dict[str, Any], only_report: bool = False) -> int:
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
    from dyndepth import similarity
    from dyndepth.cells.store import Store
    from dyndepth.claims import comparable, failures, likened, report, traced
    from dyndepth.report import show, write
    from dyndepth.routed import position_table, record

    store = Store(sweeps[0].output_path)
    store.check_model(sweeps[0].model)
    cells = comparable(store, sweeps[0])
    phases = sweeps[0].phases
    needed = traced(study, cells, phases)
    if not only_report:
        record(needed, sweeps[0], store.path)
        similarity.record(likened(study, cells, phases), sweeps[0], store.path)
    failed = failures(study, cells, phases)
    rows = report(study, cells, phases, store.path)
    paths = write(study, rows, cells, position_table(needed, store.path), store.path)
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
