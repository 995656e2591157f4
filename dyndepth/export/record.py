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
_NAMED = 5
"""Files that a sentence names, before it counts them."""
_KEYS = ("kind", "model", "method", "fingerprint", "base", "job", "probe", "files")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file in ``folder`` that an export is made of. What hides behind a
    dot at the top, such as a repository's own folder, is no part of it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(".") and name not in _FREE:
            found[name] = _sha256(file)
    return found


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of what lies in ``folder``, the card included, which may be edited."""
    whole = {"layout": LAYOUT, **record, CARD: _sha256(folder / CARD), "files": hashes(folder)}
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


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless a new export may take the place of ``folder``: it is not there, is
    empty, or holds an older export as it was written and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    remedy = "give another --output_path"
    if not (folder / RECORD).is_file():
        raise UserError(f"{str(folder)!r} holds something other than an export; {remedy}")
    try:
        record = read_record(folder)
        kept = {**record["files"], CARD: record.get(CARD), RECORD: None}
        found = [*_foreign(folder, kept), *_changed(folder, kept)]
    except (RunFailed, TypeError) as fault:
        raise UserError(
            f"{str(folder)!r} holds an export whose {RECORD} can't be read; {remedy}, or remove "
            "that folder"
        ) from fault
    if found:
        named = found if len(found) <= _NAMED else [*found[:_NAMED], f"{len(found) - _NAMED} more"]
        said = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
        raise UserError(
            f"the export in {str(folder)!r} would be replaced, and with it what no export wrote: "
            f"{said}; {remedy}, or remove or move {'it' if len(found) == 1 else 'them'}"
        )


def _foreign(folder: Path, kept: dict[str, Any]) -> list[str]:
    """What lies in ``folder`` beside the files ``kept``; a folder without any of them by its name
    alone."""
    wanted = {Path(name) for name in kept}
    wanted |= {above for name in wanted for above in name.parents}
    found = []
    waiting = sorted(folder.iterdir(), reverse=True)
    while waiting:
        each = waiting.pop()
        inside = each.is_dir() and not each.is_symlink()
        if each.relative_to(folder) not in wanted:
            found.append(each.relative_to(folder).as_posix() + "/" * inside)
        elif inside:
            waiting += sorted(each.iterdir(), reverse=True)
    return found


def _changed(folder: Path, kept: dict[str, Any]) -> list[str]:
    """Files that are not as they were written."""
    files = [name for name in kept if name != RECORD and (folder / name).is_file()]
    return [f"{name} (changed)" for name in files if _sha256(folder / name) != kept[name]]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
