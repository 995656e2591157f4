"""Paths and names of files: what a user means, whether it can be used, said before anything is
computed for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dyndepth.common.errors import UserError

EMBEDDED = "embedded"
"""What stands in place of a path for the model, or the text, that comes with the project."""

_LONGEST = 255
"""Bytes in one part of a path, on the usual file systems."""


def expanded(text: str | Path) -> str:
    """``text`` with the home folder in place of a leading ``~``: what every path that a user gives
    becomes before anything else is done with it, in flags, YAML and Python, and what a cell's
    identity then holds. A hub id or a URL stays as it is."""
    return os.path.expanduser(text)


def path_of(text: str | Path) -> Path:
    """The path that a user means by ``text``; see ``expanded``."""
    return Path(expanded(text))


def check_path(flag: str, text: str | Path) -> None:
    """Raises UserError, in the name of ``--flag``, for a text that no path can be: with a null
    character, of no encoding, with a part that is too long, or in the home of an unknown user."""
    try:
        encoded = os.fsencode(text)
        Path(text).expanduser()
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"--{flag} {str(text)!r} can't be a path: {fault}") from None
    if b"\0" in encoded:
        raise UserError(f"--{flag} {str(text)!r} holds a null character; give a path without one")
    longest = max(map(len, encoded.split(os.sep.encode())))
    if longest > _LONGEST:
        raise UserError(
            f"--{flag} has a part of {longest} bytes, and no file has a name of more than "
            f"{_LONGEST}; give a shorter one"
        )


def check_folder(flag: str, path: Path) -> Path:
    """``path``, with ``~`` expanded, if it is a folder or can be made into one.

    Raises UserError, in the name of ``--flag``, where a file is in its place or on the way there,
    or the folder that it would lie in is not to be written to.
    """
    check_path(flag, path)
    path = path.expanduser()
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        raise UserError(
            f"--{flag} {str(path)!r} can't be a folder: {str(there)!r} is a file; give a folder, "
            "or a name that is free"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--{flag} {str(path)!r} can't be written to: {str(there)!r} is closed to you; give "
            "another folder"
        )
    return path


def made_folder(flag: str, path: Path) -> Path:
    """``check_folder``, and the folder is there. Raises UserError where it cannot be made."""
    path = check_folder(flag, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(
            f"--{flag} {str(path)!r} cannot be written: {fault.strerror}; give another"
        ) from None
    return path


def check_file(flag: str, path: Path, what: str) -> Path:
    """``path``, with ``~`` expanded, if it can be a file; the folder that it lies in is there.

    Raises UserError, in the name of ``--flag``, for a folder, and where the file could not be
    written; ``what`` is to be named in place of a folder.
    """
    check_path(flag, path)
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"--{flag} {str(path)!r} is a folder; name the {what} to write")
    made_folder(flag, path.parent)
    return path


_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def file_part(text: str) -> str:
    """``text`` as (a part of) a file name, at most 120 characters, on any system: no separator, no
    leading dot, no name that Windows gives to a device."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", text)[:120].strip("_.")
    return f"id-{plain}" if _DEVICE.match(plain) else plain


def slug(model: str) -> str:
    """A folder name for a model: the last part of a local path, a hub id with ``--`` for ``/``."""
    path = path_of(model)
    local = path.exists() or model.startswith((".", "/", "~"))
    return file_part(path.resolve().name if local else model.replace("/", "--")) or "model"
