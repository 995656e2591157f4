"""``export.json``: what an export is, what was measured of it, and the hashes of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dyndepth.common.errors import RunFailed, UserError

RECORD, CARD = "export.json", "README.md"
MODEL = "model"
"""Folder of the merged model inside of an export whose method no plain checkpoint can hold."""
LAYOUT = 1
_FREE = (RECORD, CARD, ".gitattributes", ".gitignore")
"""Files that are not hashed: the record itself, the card, which people edit, and what a repository
needs."""
_KEYS = ("kind", "model", "method", "fingerprint", "base", "job", "probe", "files")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file in ``folder`` that an export is made of. What hides behind a
    dot at the top, such as a repository's own folder, is no part of it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(".") and name not in _FREE:
            with file.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of what lies in ``folder``."""
    whole = {"layout": LAYOUT, **record, "files": hashes(folder)}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items())
    (folder / RECORD).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in ``folder``. Raises UserError where there is none, RunFailed if it is
    garbled."""
    file = folder / RECORD
    if not file.is_file():
        raise UserError(f"{str(folder)!r} holds no {RECORD}, so it is no export; give one's folder")
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
        if record["layout"] != LAYOUT:
            raise ValueError(f"its layout is {record['layout']}, this version reads {LAYOUT}")
        for key in _KEYS:
            record[key]
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise RunFailed(f"{str(file)!r} can't be read ({fault}); export again") from fault
    return dict(record)


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Raises RunFailed for a file that was changed, is missing, or was not exported."""
    here, kept = hashes(folder), record["files"]
    for name, digest in kept.items():
        if name not in here:
            raise RunFailed(f"{name} is missing")
        if here[name] != digest:
            raise RunFailed(f"{name} does not have the content that was exported")
    for name in here:
        if name not in kept:
            raise RunFailed(f"{name} was not exported")


def is_export_or_empty(folder: Path) -> bool:
    """Whether a new export may take the place of ``folder``."""
    return not folder.exists() or (folder / RECORD).is_file() or not any(folder.iterdir())
