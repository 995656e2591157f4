"""What a worker does with one cell, in whatever process it lives: score it, or time it.

A worker keeps its workbench (model, tokenizer, corpus, evaluation data) between cells. Nothing that
a method does gets out of here: it becomes the cell's error.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from dyndepth.cells.cell import ROWS, Cell, CellSpec
from dyndepth.cells.identity import UNHASHED, Row
from dyndepth.cells.times import Shape
from dyndepth.common.culprits import told
from dyndepth.common.errors import UserError
from dyndepth.common.pipes import outlive_readers
from dyndepth.sweep.grid import wanted
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.workbench import free_memory


class Bench(Protocol):
    """What computes cells: a ``workbench.Workbench``, or a stand-in in tests."""

    @property
    def shared_identity(self) -> Row: ...
    def identity(self, plan: CellSpec) -> Row: ...
    def provenance(self, plan: CellSpec) -> Row: ...
    def evaluate(self, plan: CellSpec) -> Any: ...
    def measure(
        self, plan: CellSpec, samples: list[Row], mode: str, shapes: Sequence[Shape] = ()
    ) -> list[Row]: ...


@dataclass(frozen=True)
class Work:
    """One thing to do to one cell.

    Attributes:
        plan: which cell.
        identity: its identity, which the worker's own must equal.
        scored: the cell with its scores if it is to be timed; None if it is to be scored.
    """

    plan: CellSpec
    identity: Row
    scored: Cell | None = None


class Worker:
    """Does one ``Work`` after the other on its bench."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self.bench, self.settings = bench, settings

    def do(self, work: Work) -> Cell:
        """The cell, scored or timed; a failure is its error. Raises nothing but KeyboardInterrupt
        and what ends the process."""
        cell = work.scored or Cell(work.identity)
        try:
            with deadline(self.settings.cell_timeout):
                self._check(work)
                if work.scored is None:
                    self._score(work.plan, cell)
                else:
                    self._time(work.plan, cell)
            cell.status, cell.error, cell.traceback = "done", "", ""
        except TimeIsUp:
            failed(cell, timeout_text(self.settings.cell_timeout), traceback.format_exc())
        except Exception as fault:  # noqa: BLE001 - whatever a method does, the sweep goes on
            failed(cell, told(fault), traceback.format_exc())
        if cell.status == "error":
            free_memory()
        return cell

    def _check(self, work: Work) -> None:
        own = self.bench.identity(work.plan)
        hashed = work.identity.keys() - UNHASHED
        other = sorted(key for key in hashed if own.get(key) != work.identity[key])
        if other:
            raise UserError(
                f"this worker has another {', '.join(other)} than the process that started it: "
                "install the same versions everywhere"
            )

    def _score(self, plan: CellSpec, cell: Cell) -> None:
        started = time.monotonic()
        evaluation = self.bench.evaluate(plan)
        for name in ROWS:
            if name != "timing":
                setattr(cell, name, getattr(evaluation, name))
        cell.provenance = self.bench.provenance(plan) | {
            "evaluation_seconds": round(time.monotonic() - started, 3)
        }

    def _time(self, plan: CellSpec, cell: Cell) -> None:
        """Time what the cell lacks, mode by mode: each is kept, whatever becomes of the next."""
        from dyndepth.timing.measure import in_modes

        level = self.settings.timing
        if level == "off":
            return
        started = time.monotonic()

        def timed(mode: str) -> list[Row]:
            rows = self.bench.measure(plan, cell.samples, mode, todo[mode])
            cell.take_times(mode, rows, level)
            return rows

        todo = cell.untimed(wanted(self.settings, cell))
        in_modes(list(todo), self.settings.mode, timed, stands=bool(cell.timing))
        cell.provenance["timing_seconds"] = round(time.monotonic() - started, 3)


def failed(cell: Cell, error: str, trace: str = "") -> Cell:
    """``cell`` with that error; scores that it has stay."""
    cell.status, cell.error, cell.traceback = "error", error, trace
    return cell


def timeout_text(seconds: float | None) -> str:
    """What a cell says that was given up."""
    return f"given up after {seconds:g} s (--cell_timeout)"


def quiet_libraries(debug: bool) -> None:
    """Keep the libraries' chatter out of the progress lines, unless --debug asks for it."""
    # Forking after the tokenizers' threads started would deadlock; the library warns at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lm-eval", "lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hired(settings: Settings, documents: dict[str, int | None]) -> Worker:
    """A worker with a workbench of its own, for so many ``documents`` of each task.

    Raises:
        UserError: as ``workbench.Workbench``.
    """
    outlive_readers()  # in a process of its own, too
    quiet_libraries(settings.debug)
    from dyndepth.sweep.workbench import Workbench

    return Worker(Workbench(settings, documents), settings)


AGAIN = 1.0
"""Seconds after which the limit is enforced again, should something have swallowed it."""


class TimeIsUp(BaseException):
    """The limit is over. No Exception, so that code which catches all of them lets it pass."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeIsUp inside the block once ``seconds`` are over; None: never.

    It reaches Python code only: a call into a library that hangs goes on hanging, and whoever holds
    the process has to end it. Outside of a main thread, or without POSIX timers, it does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _up)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _up(number: int, frame: Any) -> None:
    raise TimeIsUp
