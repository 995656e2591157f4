"""What can be wrong with a stored run, seen without a model: files, rows, versions and tables.

Every cell is looked at. A cell's rows must agree with each other, its file with the manifest, all
cells with one version of everything, and the tables with the cells. ``write_manifest`` writes what
later checks hold the files against.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row, today
from dyndepth.cells.recipe import NONE
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import path_of
from dyndepth.results.leaderboard_pages import PAGES
from dyndepth.results.schema import COMPARED, TABLES
from dyndepth.sweep.rerun import MADE_WITH, commands
from dyndepth.verify.findings import Finding, means, of_cell
from dyndepth.verify.tables import tables

HERE = ("harness_code", "torch", "transformers", "lm_eval", "dyndepth")
"""What may differ between the cells and the program that verifies them: it is noted."""
ONE = (
    *("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "corpus_fingerprint"),
    *HERE,
)
"""Keys of the identity that must be the same in all cells of a run."""
ONE_A_METHOD = ("method_code", "fit_version")
"""And in all cells of one method, with recovery and without."""


def check(run: Path, manifest: bool = True) -> tuple[list[Cell], list[Finding]]:
    """The readable cells of a run, and everything found. ``manifest``: compare with it.

    Raises:
        UserError: the folder is no run.
    """
    if not (run / "cells").is_dir():
        raise UserError(f"{run} is no run: it has no folder cells; give a sweep's --output_path")
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


NAME = "manifest.json"
FILES = (*TABLES, *COMPARED, *PAGES)
"""What a run may hold beside its cells; all of it is a function of them."""
FORMAT = 1


def write_manifest(path: str | Path, lines: Sequence[str] | None = None) -> Path:
    """Write the manifest of the run in ``path``; return where. Equal cells give equal bytes.

    ``lines`` are the commands that made the run; by default those that make it again. What the
    cells hold is not looked at here: ``python -m dyndepth.verify RUN --write_manifest`` does.

    Raises:
        UserError: the run has no cells, or a file of a cell that cannot be read.
    """
    store = Store(path)
    cells = store.all()
    if not cells:
        raise UserError(f"{path} holds no cells; give the --output_path of a sweep")
    files = store.files()
    if len(files) != len(cells):
        raise UserError(f"{len(files) - len(cells)} files in {store.folder} are no readable cells")
    body = {
        "format": FORMAT,
        "commands": list(lines or commands(cell.identity for cell in cells)),
        "made_with": {
            key: sorted({str(cell.identity[key]) for cell in cells}) for key in MADE_WITH
        },
        "files": [name for name in FILES if (store.path / name).is_file()],
        "cells": {
            cell.key: {"file": store.file(cell.identity).name, "sha256": sha256(file)}
            for cell in cells
            for file in [store.file(cell.identity)]
        },
    }
    place = store.path / NAME
    write_atomically(place, json.dumps(body, indent=1) + "\n")
    return place


class Manifest(NamedTuple):
    """What a manifest lists: ``cells`` (hash -> ``file`` and ``sha256``), and names of ``files``
    beside them (none in manifests from before they were listed)."""

    cells: dict[str, Row]
    files: tuple[str, ...]


def read_manifest(path: str | Path) -> Manifest | None:
    """A run's manifest; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    place = path_of(path) / NAME
    if not place.is_file():
        return None
    try:
        body: Any = json.loads(place.read_text(encoding="utf-8-sig"))
        if body["format"] != FORMAT:
            raise ValueError(f"it has format {body['format']}, not {FORMAT}")
        cells = {
            str(key): {"file": str(entry["file"]), "sha256": str(entry["sha256"])}
            for key, entry in body["cells"].items()
        }
        return Manifest(cells, tuple(map(str, body.get("files", ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"{place} cannot be read as a manifest: {fault}") from None


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
