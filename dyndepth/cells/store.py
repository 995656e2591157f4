"""The cells of a run on the disk: one atomic JSON file each.

A file appears whole or not at all: it is written beside its place, flushed to the disk and renamed.
What cannot be read counts as absent, with a warning. One sweep at a time holds an output path, or
the shards of one sweep. A run that is to be kept can be packed: each file compressed by gzip, and
read all the same.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dyndepth.cells.cell import ROWS, TIMING_LEVELS, Cell, order, readable_name
from dyndepth.cells.identity import ADDED, IDENTITY, Row, agrees, cell_hash, plain
from dyndepth.cells.mirror import mirror_of
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically, writing
from dyndepth.common.paths import path_of

FORMAT = 1
"""Version of the file layout; a file of another version counts as absent."""


class Store:
    """The cells under ``path/cells``. Reading never fails on a bad file: it warns, once a file.

    No cell is kept in memory. ``shard`` is (which, of how many) of the sweep that writes here.
    """

    def __init__(self, path: str | Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.path = path_of(path)
        self.folder = self.path / "cells"
        self.shard = shard
        self._warned: set[Path] = set()
        self._held = False
        self.mirror = mirror_of(self.path)

    def pull(self) -> None:
        """Bring the cells of a run behind a URL that are not here yet."""
        if self.mirror is not None:
            self.mirror.pull()

    def file(self, identity: Row) -> Path:
        """Where the cell of ``identity`` is kept: a readable name, then the hash."""
        plain = self.folder / f"{readable_name(identity)}-{cell_hash(identity)}.json"
        packed = _packed(plain)
        return packed if packed.is_file() and not plain.is_file() else plain

    def files(self) -> list[Path]:
        """The files of all cells, readable or not, in the order of their names."""
        plain = sorted(self.folder.glob("*.json"))
        packed = self.folder.glob("*.json.gz")
        return sorted([*plain, *(path for path in packed if not path.with_suffix("").is_file())])

    def write(self, cell: Cell) -> Cell:
        """Put ``cell`` on the disk, whole or not at all; return it as it will be read again.

        Raises:
            RunFailed: the disk does not take it.
        """
        body = plain({"format": FORMAT, "cell": cell.key, **asdict(cell)})
        old = self.file(cell.identity)
        path = old.with_suffix("") if old.suffix == ".gz" else old
        with writing(self.path):
            write_atomically(path, json.dumps(body, indent=1, sort_keys=True))
            if old != path:
                old.unlink()
        if self.mirror is not None:
            self.mirror.push(path)
        return _cell(body)

    def pack(self) -> None:
        """Compress the files of all cells; equal files give equal bytes. Call it under the lock."""
        for path in self.files():
            if path.suffix != ".gz":
                write_atomically(_packed(path), gzip.compress(path.read_bytes(), 9, mtime=0))
                path.unlink()

    def read(self, identity: Row) -> Cell | None:
        """The recorded cell of ``identity``, or None where there is none that can be read."""
        path = self.file(identity)
        return self._load(path) if path.is_file() else None

    def all(self) -> list[Cell]:
        """Every readable cell, in the stable order of the tables."""
        if not self.folder.is_dir():
            return []
        cells = [self._load(path) for path in self.files()]
        return sorted((cell for cell in cells if cell is not None), key=order)

    def check_model(self, name: str, fingerprint: str | None = None) -> None:
        """Refuse to mix models; ``fingerprint`` is None as long as no weights were read.

        Raises:
            UserError: a recorded cell is of another model.
        """
        for cell in self.all():
            recorded, other = cell.identity["model"], cell.identity["model_fingerprint"]
            if fingerprint is None:
                same = same_model(name, recorded)
            else:
                same = agrees("model_fingerprint", other, fingerprint)
            if not same:
                raise UserError(
                    f"{self.path} holds cells of the model {recorded} (fingerprint {other}), not "
                    f"of {name}{f' ({fingerprint})' if fingerprint else ''}: "
                    "choose another --output_path"
                )

    def _load(self, path: Path) -> Cell | None:
        try:
            content = path.read_bytes()
            body = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
            if body["format"] != FORMAT:
                raise ValueError(f"it has format {body['format']}, not {FORMAT}")
            cell = _cell(body)
            cell.identity = ADDED | cell.identity
            if set(cell.identity) != set(IDENTITY):
                raise ValueError("its identity has other keys than this version's")
            name = path.name.removesuffix(".gz").removesuffix(".json")
            if not name.endswith(cell.key) or body["cell"] != cell.key:
                raise ValueError("its identity does not match its hash")
            return cell
        except (
            OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError,
            RecursionError,
        ) as fault:  # fmt: skip
            if path not in self._warned:
                self._warned.add(path)
                print(
                    f"warning: {path} cannot be read as a cell and counts as absent: {fault}",
                    file=sys.stderr,
                )
            return None

    def sweep_up(self) -> None:
        """Remove what killed writers left behind, unless other shards may be writing. Call it under
        the lock only."""
        if self.shard[1] > 1:
            return
        for folder in (self.path, self.folder):
            for leftover in folder.glob(".writing-*"):
                leftover.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output path for one sweep, or for one shard of it beside the others; the system
        lets go of it if the process dies.

        Raises:
            UserError: another process holds it, or it cannot be written to.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock(*self.shard))
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(self._busy()) from None
        except OSError as fault:
            raise UserError(
                f"--output_path {self.path} cannot be written to ({fault.strerror}): "
                "choose another one"
            ) from None
        self._held = True
        try:
            self.check_free()
            yield
        finally:
            self._held = False
            lock.release()

    @contextmanager
    def tables(self) -> Iterator[None]:
        """Hold the tables, so that shards write them one after the other.

        Raises:
            RunFailed: inside the block, the disk took no more.
        """
        from filelock import FileLock

        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / ".tables.lock"):
                self.pull()
                yield
                if self.mirror is not None:
                    for path in sorted([*self.path.glob("*.csv"), *self.path.glob("*.parquet")]):
                        self.mirror.push(path)

    def check_free(self) -> None:
        """Say early, and without writing anything, that another sweep holds the output path: any
        but this one and the other shards of the same number.

        Raises:
            UserError: another process holds it.
        """
        from filelock import FileLock, Timeout

        which, count = self.shard
        ours = {self._lock(number, count) for number in range(1, count + 1)}
        if not self._held:
            ours.remove(self._lock(which, count))
        for path in sorted(set(self.path.glob(".lock*")) - ours):
            try:
                FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                raise UserError(self._busy()) from None

    def _lock(self, which: int, count: int) -> Path:
        return self.path / (".lock" if count == 1 else f".lock-{which}-of-{count}")

    def _busy(self) -> str:
        return (
            f"another sweep is writing to {self.path}: wait for it, or choose another --output_path"
        )


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def same_model(one: str, other: str) -> bool:
    """True if two names are the same, or two paths of one folder."""
    if one == other:
        return True
    paths = [path_of(name) for name in (one, other)]
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def _cell(body: Row) -> Cell:
    cell = Cell(**{key: body[key] for key in Cell.__dataclass_fields__})
    if cell.status not in ("done", "error") or cell.timing_level not in TIMING_LEVELS:
        raise ValueError(f"it has status {cell.status!r} and timing level {cell.timing_level!r}")
    if not isinstance(cell.provenance, dict) or not isinstance(cell.error, str):
        raise ValueError("its provenance is no mapping or its error no text")
    if not isinstance(cell.identity.get("model"), str):
        raise ValueError("its model has no name")
    if not all(isinstance(row, dict) for name in ROWS for row in getattr(cell, name)):
        raise ValueError("its rows are no mappings")
    return cell
