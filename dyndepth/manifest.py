"""What a run must contain: ``manifest.json`` beside its tables.

It lists every cell with the SHA-256 of its file, the commands that compute them all, what they were
made with, and the names of the files beside them. Of those no hash is kept: they are a function of
the cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dyndepth.cells.identity import Row
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import path_of
from dyndepth.results.leaderboard_pages import PAGES
from dyndepth.results.schema import COMPARED, TABLES
from dyndepth.sweep.rerun import MADE_WITH, commands

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
