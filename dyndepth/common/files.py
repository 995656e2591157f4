"""Files that appear whole or not at all, folders that are built once, and users' text files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dyndepth.common.errors import RunFailed, UserError

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte-order marks of UTF-16, and of UTF-32 behind the first."""


class Readable(Protocol):
    """A path, or a file inside a package."""

    def read_bytes(self) -> bytes: ...


def read_text(file: Readable, what: str = "") -> str:
    """The text of ``file`` without byte-order mark, each line ended by one line feed.

    Raises OSError as reading does, and UserError in the name of ``what`` (default: the path) for
    another encoding than UTF-8.
    """
    content, name = file.read_bytes(), what or repr(str(file))
    # Latin text in UTF-16 is valid UTF-8 with a null beside each letter.
    if content.startswith(_UTF_16) or 4 * content.count(0) > len(content):
        raise UserError(f"{name} is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{name} is not UTF-8 text: byte {fault.start} is {content[fault.start]:#04x}; "
            "save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def paragraphs(text: str) -> list[str]:
    """The parts of ``text`` between blank lines; a line of white space alone is one."""
    lines = ("" if line.isspace() else line for line in text.split("\n"))
    return "\n".join(lines).split("\n\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a disk that takes no more into RunFailed."""
    try:
        yield
    except OSError as fault:
        raise RunFailed(
            f"{path} cannot be written to ({fault.strerror or fault}); what was finished is kept, "
            "and the same command resumes once it can be"
        ) from fault


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file so that readers, and crashes, see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are meant to be shared.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_root() -> Path:
    """The folder of everything that is kept between runs; it is not created here.

    ``DYNDEPTH_CACHE`` if set, else the platform's cache folder (``~/.cache/dyndepth`` or what
    ``XDG_CACHE_HOME`` says, on Linux).
    """
    chosen = os.environ.get("DYNDEPTH_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("dyndepth", appauthor=False)


def build_once(
    folder: Path, build: Callable[[Path], None], is_whole: Callable[[], bool] | None = None
) -> Path:
    """Make ``folder`` by ``build(work)`` unless it is there; returns it.

    ``build`` writes into an empty folder that takes its final name only when complete, so a
    reader never sees a part, whenever the process dies. Other processes wait meanwhile.
    ``is_whole`` says whether the folder is there and complete (default: it exists). Raises
    UserError if the cache can't be written.
    """
    from filelock import FileLock

    whole = is_whole or folder.is_dir
    if whole():
        return folder
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with writing_to(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if whole():
            return folder
        # Under the lock nobody else builds: such folders are what killed processes left.
        for leftover in folder.parent.glob(f".{folder.name}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        with writing_to(folder.parent):
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(work)
            with writing_to(folder.parent):
                open_to_readers(work)
                replace_folder(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    return folder


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a failure to write there (no permission, no room) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} can't be written ({error}); "
            "set DYNDEPTH_CACHE to a folder with room and write permission"
        ) from error


def open_to_readers(folder: Path) -> None:
    """Lift the private modes of temporary folders and files: a cache may be shared."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def replace_folder(work: Path, folder: Path) -> None:
    """Give the finished ``work`` the name ``folder``; what was there before is deleted."""
    if folder.exists():
        grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, grave)
        os.replace(work, folder)
        shutil.rmtree(grave, ignore_errors=True)
    else:
        os.replace(work, folder)
