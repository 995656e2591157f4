"""What a run must contain: ``manifest.json`` beside its tables.

It lists every cell with the SHA-256 of its file, the commands that compute them all, and what they
were made with. The tables are not in it: they are a function of the cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.errors import UserError
from dyndepth.records import Row
from dyndepth.rerun import MADE_WITH, commands
from dyndepth.store import Store, write_atomically

NAME = "manifest.json"
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
        "cells": {
            cell.key: {"file": store.file(cell.identity).name, "sha256": sha256(file)}
            for cell in cells
            for file in [store.file(cell.identity)]
        },
    }
    place = store.path / NAME
    write_atomically(place, json.dumps(body, indent=1) + "\n")
    return place


def read_manifest(path: str | Path) -> dict[str, Row] | None:
    """The cells of a run's manifest: hash -> ``file`` and ``sha256``; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    place = Path(path) / NAME
    if not place.is_file():
        return None
    try:
        body: Any = json.loads(place.read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise ValueError(f"it has format {body['format']}, not {FORMAT}")
        return {
            str(key): {"file": str(entry["file"]), "sha256": str(entry["sha256"])}
            for key, entry in body["cells"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"{place} cannot be read as a manifest: {fault}") from None


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
