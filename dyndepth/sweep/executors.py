"""Where cells are computed: in this process, in processes of this machine, or on a Ray cluster.

An executor has ``slots``, the number of cells that it takes at once, and gives a future for each. A
future yields the cell, or raises WorkerDied where a process ended without an answer, or
TimeoutError where one was ended because it would not stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.common.errors import RunFailed, UserError
from dyndepth.sweep.grid import Grid
from dyndepth.sweep.progress.interface import no_bars
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import Work, Worker, hired

GRACE = 60.0
"""Seconds beyond --cell_timeout after which a worker that does not stop by itself is ended: it may
still be loading the model, which does not count."""


SETTLED = 0.5
"""Seconds after which a stopped pool starts no more workers in place of those that ended."""
WORKER_NAME = "pebble_pool"


class WorkerDied(Exception):
    """A worker ended without an answer; the text says how."""


class Executor(Protocol):
    """See the module. ``start`` comes first, ``close`` always comes last."""

    @property
    def slots(self) -> int:
        """Cells that it takes at once; it may shrink when machines are lost."""

    def start(self) -> Row:
        """Bring a worker up and return what the identities of all cells share.

        Raises:
            UserError: as ``workbench.Workbench``, or what the executor itself lacks.
        """

    def submit(self, work: Work) -> Future[Cell]:
        """Have it done by the next free worker."""

    def close(self) -> None:
        """End the workers at once, whatever they do."""


class Inline:
    """In this process, one after the other."""

    slots = 1

    def __init__(self, hire: Callable[[], Worker]) -> None:
        self._hire = hire
        self._worker: Worker | None = None

    def start(self) -> Row:
        self._worker = self._hire()
        return shared(self._worker)

    def submit(self, work: Work) -> Future[Cell]:
        assert self._worker is not None
        done: Future[Cell] = Future()
        done.set_result(self._worker.do(work))
        return done

    def close(self) -> None:
        self._worker = None


class Processes:
    """Worker processes of this machine, each with a model of its own.

    With CUDA devices, workers take turns in choosing one. A process that dies is replaced.
    """

    def __init__(self, settings: Settings, found: Grid, grace: float = GRACE) -> None:
        self.settings, self._documents = settings, found.documents
        self._devices = gpu_count(settings.device)
        self._slots, self._threads = shares(settings, len(found.cells), self._devices)
        limit = settings.cell_timeout
        self._limit = None if limit is None else limit + grace
        self._pool: Any = None

    @property
    def slots(self) -> int:
        return self._slots

    def start(self) -> Row:
        from pebble import ProcessPool

        # A fresh interpreter: what this one has loaded must not be forked.
        context = multiprocessing.get_context("spawn")
        seats = context.Array("i", self._slots)
        self._pool = ProcessPool(
            max_workers=self._slots,
            context=context,
            initializer=_settle,
            initargs=(self.settings, self._documents, seats, self._threads, self._devices),
        )
        try:
            found: Row = self._pool.schedule(_shared).result()
            return found
        except UserError:
            raise
        except Exception as fault:
            raise RunFailed(f"no worker process came up: {fault}") from fault

    def submit(self, work: Work) -> Future[Cell]:
        from pebble import ProcessExpired

        done: Future[Cell] = Future()
        began = time.monotonic()

        def answer(future: Future[Cell]) -> None:
            fault = future.exception()
            if isinstance(fault, TimeoutError) and time.monotonic() - began < (self._limit or 0):
                # The pool looks at the wall clock, which anybody may set.
                fault = WorkerDied("the clock was set forward, which ended its worker process")
            if isinstance(fault, ProcessExpired):
                code = fault.exitcode
                how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
                fault = WorkerDied(f"its worker process ended by {how}")
            if fault is None:
                done.set_result(future.result())
            else:
                done.set_exception(fault)

        self._pool.schedule(_do, args=[work], timeout=self._limit).add_done_callback(answer)
        return done

    def close(self) -> None:
        if self._pool is None:
            return
        # The pool would ask its workers to stop and wait for them, for minutes if one that was
        # killed had held its channel. They have nothing to lose.
        self._pool.stop()
        until = time.monotonic() + SETTLED
        while time.monotonic() < until:
            for process in multiprocessing.active_children():
                if process.name.startswith(WORKER_NAME):
                    process.kill()
                    process.join()
            time.sleep(SETTLED / 5)


def shared(worker: Worker) -> Row:
    """What the identities of all cells on the worker's bench share."""
    return worker.bench.shared_identity


def gpu_count(device: str) -> int:
    """CUDA devices that workers can share out among themselves; 0 if the cells run elsewhere."""
    if device not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def shares(settings: Settings, cells: int, gpus: int) -> tuple[int, int]:
    """Workers, and threads of each: as asked for, else one worker a GPU, else two on a CPU."""
    asked, there = settings.cpus_per_cell, cores()
    usual = gpus or (max(1, int(there / asked)) if asked else min(2, there))
    workers = max(1, min(settings.workers or usual, cells))
    return workers, max(1, int(asked or there / workers))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- inside a worker process ----------------------------------------------------------------------

_hired: Worker | None = None
_hire: Callable[[], Worker] | None = None


def _settle(
    settings: Settings, documents: dict[str, int | None], seats: Any, threads: int, devices: int
) -> None:
    """Make this process a worker. The model is loaded with the first cell, so that a model that
    cannot be loaded is an answer and not a process that dies."""
    global _hire
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    seat = _seat(seats)
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(seat % devices)
    _hire = lambda: hired(settings, documents)  # noqa: E731


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _seat(seats: Any) -> int:
    """The first seat that no living process holds."""
    with seats.get_lock():
        for seat, process in enumerate(seats):
            if process == 0 or not _alive(process):
                seats[seat] = os.getpid()
                return seat
    return 0


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _visible(number: int) -> str:
    """The name of the ``number``-th of the devices that this process was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[number] if given else str(number)


def _own() -> Worker:
    global _hired
    if _hired is None:
        assert _hire is not None
        _hired = _hire()
    return _hired


def _shared() -> Row:
    with no_bars():
        return shared(_own())


def _do(work: Work) -> Cell:
    with no_bars():
        return _own().do(work)
