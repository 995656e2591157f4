"""What a sweep tells programs while it runs: one JSON object a line, appended and flushed at once.

Every line has ``time`` (ISO 8601, UTC) and ``event``; by event it has besides:

========  ==========================================================================================
event     keys
========  ==========================================================================================
start     ``cells`` (how many the sweep has), ``settings`` (by name, as ``Settings``)
kept      JOB, CELL
began     JOB
scored    JOB, CELL, ``seconds`` (so far: it begins again to be timed)
ended     JOB, CELL, ``seconds`` (in all)
note      ``level`` (``info`` or ``warning``), ``text``
close     ``summary`` (the object in the sweep's last line of output)
========  ==========================================================================================

JOB stands for ``index`` (from 1), ``name``, ``what`` (``running`` or ``timing``) and ``worker``
(empty where cells are computed in the sweep's own process). CELL stands for ``cell`` (its hash),
``method`` (its short name), ``target_speedup``, ``seed``, ``recovery``, ``status`` (``done`` or
``error``), ``error`` (one line; empty when done), ``block_speedup`` and ``total_speedup``
(achieved, FLOPs; null where unknown) and ``scores``: a list of objects with ``task``, ``metric``,
``filter``, ``value`` and ``stderr``. A number that is not finite is null. Keys may be added; none
of these is taken away.

A killed sweep leaves no ``close``; the next one appends a ``start`` of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import IO, Any

from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.identity import plain
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.sweep.progress.interface import STDERR, Job, Listener, no_bars
from dyndepth.sweep.settings import Settings


class JsonLog(Listener):
    """Appends events to the file ``target``, or writes them to stderr where it is ``-``.

    On stderr it keeps tqdm's bars away from ``start`` to ``close``: they would stand between the
    lines. Libraries may still write there; a line that is an event begins with ``{"time"``. A log
    that cannot be written any more costs one call of ``warn`` with a sentence, and is left alone.

    Raises:
        UserError: the file cannot be opened for appending.
    """

    def __init__(self, target: str, warn: Callable[[str], None]) -> None:
        self.target, self.warn = target, warn
        self._broken = False
        self._open = ExitStack()
        self._file: IO[str] | None = None
        if target != STDERR:
            self._file = self._open.enter_context(_append(target))

    def start(self, total: int, settings: Settings) -> None:
        if self.target == STDERR:
            self._open.enter_context(no_bars())
        values = {field.name: getattr(settings, field.name) for field in fields(settings)}
        self._write("start", cells=total, settings=values)

    def kept(self, job: Job, cell: Cell) -> None:
        self._write("kept", **asdict(job), **_entries(cell))

    def began(self, job: Job) -> None:
        self._write("began", **asdict(job))

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        self._write("scored", **asdict(job), **_entries(cell), seconds=round(seconds, 3))

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        self._write("ended", **asdict(job), **_entries(cell), seconds=round(seconds, 3))

    def note(self, text: str, level: str = "info") -> None:
        self._write("note", level=level, text=text)

    def close(self, summary: dict[str, Any]) -> None:
        self._write("close", summary=summary)
        try:
            self._open.close()
        except OSError as fault:
            self._give_up(fault)

    def _write(self, event: str, **entries: Any) -> None:
        if self._broken:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(plain({"time": now, "event": event, **entries}), allow_nan=False)
        try:
            # One call a line, so that lines of several writers do not mix.
            stream = sys.stderr if self._file is None else self._file
            stream.write(f"{line}\n")
            stream.flush()
        except (OSError, ValueError) as fault:
            self._give_up(fault)

    def _give_up(self, fault: Exception) -> None:
        if not self._broken:
            self._broken = True
            self.warn(f"--log_json {self.target} cannot be written any more and ends here: {fault}")


def _append(target: str) -> IO[str]:
    path = path_of(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        with file:
            # A killed process may have left half a line.
            torn = file.tell() > 0 and (file.seek(-1, 2), file.read())[1] != b"\n"
            file.write(b"\n" if torn else b"")
        return path.open("a", encoding="utf-8")
    except OSError as fault:
        raise UserError(
            f"--log_json {target} cannot be written: {fault.strerror}; give a file, or - for stderr"
        ) from None


def _entries(cell: Cell) -> dict[str, Any]:
    """What CELL stands for in the table of keys."""
    from dyndepth.cells.naming import label
    from dyndepth.results.leaderboard import speedups

    row = identity_columns(cell)
    kept = ("task", "metric", "filter", "value", "stderr")
    return {
        "cell": cell.key,
        "method": label(row),
        **{key: row[key] for key in ("target_speedup", "seed", "recovery")},
        "status": cell.status,
        "error": cell.error,
        **speedups(cell),
        "scores": [{key: score.get(key) for key in kept} for score in cell.accuracy],
    }
