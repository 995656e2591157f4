"""A run that is kept behind a URL: a folder here that is filled from there and copied back.

Any file system that fsspec knows (``s3://``, ``gs://``, ``hf://``, ``sftp://``, ...), its package
being installed. Nothing locks the far end: let one sweep, or the shards of one, write there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dyndepth.common.errors import RunFailed, UserError

_SUFFIX = ".writing"
_URL = ".url"
"""File of a mirrored folder that holds its URL."""


def is_url(text: str) -> bool:
    """True for ``protocol://...``."""
    return "://" in text


def mirrored(url: str) -> Path:
    """The folder on this machine of the run behind ``url``, the same each time.

    Raises:
        UserError: no file system of that protocol, or its package is missing.
    """
    from dyndepth.common.files import cache_root, write_atomically, writing_to

    url = url.rstrip("/")
    folder = cache_root() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:16]
    Mirror(url, folder)
    with writing_to(folder):
        write_atomically(folder / _URL, url)
    return folder


def mirror_of(folder: Path) -> Mirror | None:
    """The far end of a folder that ``mirrored`` gave; None of any other."""
    file = folder / _URL
    return Mirror(file.read_text(encoding="utf-8"), folder) if file.is_file() else None


class Mirror:
    """The far end of ``folder``. Raises UserError as ``mirrored`` does."""

    def __init__(self, url: str, folder: Path) -> None:
        import fsspec

        self.url, self.folder = url, folder
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as fault:
            raise UserError(f"--output_path {url} cannot be used: {_said(fault)}") from None
        self._root = str(root).rstrip("/")

    def pull(self) -> None:
        """Bring the cells that lie there and not here.

        Raises:
            UserError: it cannot be read.
        """
        cells = self.folder / "cells"
        try:
            self._files.invalidate_cache()
            if not self._files.exists(f"{self._root}/cells"):
                return
            for remote in self._files.ls(f"{self._root}/cells", detail=False):
                name = str(remote).rpartition("/")[2]
                if name.endswith((".json", ".json.gz")) and not (cells / name).exists():
                    cells.mkdir(parents=True, exist_ok=True)
                    part = cells / f".writing-{name}"
                    self._files.get_file(remote, str(part))
                    part.rename(cells / name)
        except Exception as fault:  # what a file system raises is its own affair
            raise UserError(f"--output_path {self.url} cannot be read: {_said(fault)}") from fault

    def push(self, path: Path) -> None:
        """Copy a file of the folder there; readers see it whole or not at all.

        Raises:
            RunFailed: it cannot be written.
        """
        target = f"{self._root}/{path.relative_to(self.folder).as_posix()}"
        try:
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target + _SUFFIX)
            self._files.mv(target + _SUFFIX, target)
        except Exception as fault:  # as above
            raise RunFailed(
                f"{target} cannot be written to ({_said(fault)}); what was finished is kept in "
                f"{self.folder}, and the same command resumes"
            ) from fault


def _said(fault: Any) -> str:
    return " ".join(str(fault).split()) or type(fault).__name__
