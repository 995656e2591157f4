"""Is a run what it says? ``python -m dyndepth.verify RUN...``

Everything stored is checked: files against their hashes and the manifest, rows against each other,
versions, and the tables against the cells. Then some cells, drawn at random, are computed again on
some of their documents. Every finding is a line; the exit status is 1 if one is a failure.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.commands import HELP, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.sweep.rerun import PLACEHOLDERS

if TYPE_CHECKING:
    import argparse

    from dyndepth.cells.cell import Cell
    from dyndepth.verify.findings import Finding


SAMPLE = 5
DOCUMENTS = 4
"""Cells of a run, and documents a task, that are computed again unless told otherwise."""
FLAGS = ("model", "device", "corpus", "include_path")
"""Flags of the sweep that a cell's identity does not hold, or that may be others here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if anything failed, 2 for wrong input, 130 after Ctrl-C."""
    return run("verify", _verify, arguments, "interrupted; nothing can be said")


def _parser() -> Parser:
    built = Parser(
        "verify",
        "Check a run against itself, and compute some of its cells again.",
        "Exit status: 0 all is well, 1 something failed, 2 wrong input. Wall-clock is not measured "
        "again.",
    )
    built.runs()
    add = built.add_argument
    built.whole("sample", 1, f"cells to compute again (default: {SAMPLE})")
    add("--all", action="store_true", help="compute all cells again")
    add(
        "--limit",
        default=str(DOCUMENTS),
        metavar="N",
        help=f"documents a task to compute again, 'none' for all of them (default: {DOCUMENTS})",
    )
    built.whole("seed", 0, "of the draw of cells and documents", 0)
    add("--only_stored", action="store_true", help="compute nothing again")
    add(
        "--write_manifest",
        action="store_true",
        help="check what is stored and, if nothing failed, write the run's manifest.json",
    )
    for name in FLAGS:
        told = (
            "needed if the run had its own" if name in PLACEHOLDERS else "default: as the cells say"
        )
        add(f"--{name}", metavar=name.upper(), help=f"{HELP[name]} ({told})")
    add("--trust_remote_code", action="store_true", help=HELP["trust_remote_code"])
    return built


def _verify(given: list[str]) -> int:
    from dyndepth.verify.again import drawn
    from dyndepth.verify.stored import check, write_manifest

    options = _parser().parse_args(given)
    sample, documents = _amounts(options)
    if options.include_path is not None and not path_of(options.include_path).is_dir():
        raise UserError(f"--include_path {options.include_path} is no folder")
    failures = 0
    for path in options.runs:
        cells, found = check(path, manifest=not options.write_manifest)
        chosen: list[Cell] = []
        if not (options.only_stored or options.write_manifest):
            chosen = drawn(cells, sample, options.seed)
            _check_devices(chosen, options)
            _check_given(path, chosen, options)
            found += _again(chosen, documents, options)
        show(path, found)
        failed = sum(each.failure for each in found)
        failures += failed
        _print_commands(cells, found)
        print(_sentence(path, len(cells), found, len(chosen)), flush=True)
        if options.write_manifest and not failed:
            print(f"written to {write_manifest(path)}")
        elif options.write_manifest:
            print("no manifest was written", file=sys.stderr)
    return 1 if failures else 0


def _amounts(options: argparse.Namespace) -> tuple[int | None, int | None]:
    """How many cells and documents to compute again; None: all."""
    if options.all and options.sample is not None:
        raise UserError("--all and --sample exclude each other")
    if options.only_stored and (options.all or options.sample is not None):
        raise UserError("--only_stored computes nothing again; leave --all and --sample out")
    sample = SAMPLE if options.sample is None else options.sample
    text = str(options.limit).strip().lower()
    documents = None if text in ("none", "all") else int(text) if text.isdecimal() else 0
    for name, amount in (("sample", sample), ("limit", documents)):
        if amount is not None and amount < 1:
            raise UserError(
                f"--{name} takes a whole number of at least 1, not {vars(options)[name]}"
            )
    return (None if options.all else sample), documents


def _check_devices(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Say before anything is computed that the cells' device is not here."""
    devices = {str(options.device or cell.identity["device"]) for cell in cells}
    if any(device.startswith("cuda") for device in devices):
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "cells were made on cuda, and there is none here: give --device cpu (compared with "
                "a coarse tolerance) or --only_stored"
            )
    if cells and options.device not in (None, "spread"):
        from dyndepth.models.loading import check_device

        check_device(options.device)


def _check_given(path: Path, cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Say before anything is computed that a path is needed which no cell holds."""
    from dyndepth.sweep.rerun import check_given

    for cell in cells:
        try:
            check_given(cell.identity, vars(options))
        except UserError as fault:
            raise UserError(f"{path}: {fault}, or --only_stored") from None


def _again(
    cells: Sequence[Cell], documents: int | None, options: argparse.Namespace
) -> list[Finding]:
    from tqdm import tqdm

    from dyndepth.sweep.worker import quiet_libraries
    from dyndepth.verify.again import How, again

    quiet_libraries(options.debug)
    flags: dict[str, Any] = {name: getattr(options, name) for name in FLAGS}
    how = How(documents, options.seed, flags, options.trust_remote_code, options.debug)
    found = []
    with tqdm(total=len(cells), desc="computing again", unit=" cells", file=sys.stderr) as bar:
        for cell, told in again(cells, how):
            found += told
            bar.set_postfix_str(cell.identity["method"], refresh=False)
            bar.update()
    return found


def show(path: Path, found: Sequence[Finding]) -> None:
    """Print findings as a table, failures first."""
    from dyndepth.common.printing import Column, print_columns

    if not found:
        return
    rows = [
        ("FAILED" if each.failure else "note", each.cell, each.what, each.stored, each.found)
        for each in sorted(found, key=lambda each: not each.failure)
    ]
    headings = ("", "cell", "what", "stored", "found")
    texts = zip(headings, zip(*rows, strict=True), strict=True)
    print_columns([Column(each, own, name=True) for each, own in texts], str(path))


def _print_commands(cells: Sequence[Cell], found: Sequence[Finding]) -> None:
    """For each cell that failed, the command that computes it again."""
    from dyndepth.sweep.rerun import OUTPUT, command

    failed = {each.cell for each in found if each.failure}
    for cell in cells:
        if cell.key in failed:
            print(f"cell {cell.key} again: ", end="")
            print(shlex.join(command(cell.identity, output_path=OUTPUT)))


def _sentence(path: Path, cells: int, found: Sequence[Finding], chosen: int) -> str:
    failed = sum(each.failure for each in found)
    notes = len(found) - failed
    again = f"{chosen} computed again" if chosen else "none computed again"
    verdict = f"{failed} failure{'s' * (failed != 1)}" if failed else "nothing failed"
    return f"{path}: {cells} cells read, {again}: {verdict}, {notes} note{'s' * (notes != 1)}."


if __name__ == "__main__":
    sys.exit(main())
