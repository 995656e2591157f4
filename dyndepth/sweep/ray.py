"""Cells on a Ray cluster: one that is there already, or one started for the run.

A worker is an actor with a model of its own, which stays between cells. One that is lost, with its
machine or alone, is replaced where the cluster has room; where it has none any more, the run goes
on with fewer.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.common.errors import RunFailed, UserError
from dyndepth.sweep.executors import GRACE, WorkerDied, shared
from dyndepth.sweep.grid import Grid
from dyndepth.sweep.progress.interface import no_bars
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import Work, Worker, hired

CPUS_PER_CELL = 1.0


class Ray:
    """See ``executors.Executor``. ``grace`` as there."""

    def __init__(self, settings: Settings, found: Grid, grace: float = GRACE) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(
                "--executor ray needs Ray: pip install 'dyndepth[ray]', or choose processes"
            ) from None
        self._ray: Any = ray
        self.settings, self._documents = settings, found.documents
        self._cells = len(found.cells)
        limit = settings.cell_timeout
        self._limit = None if limit is None else limit + grace
        self._idle: list[Any] = []
        self._hired = 0
        self._started_here = False

    @property
    def slots(self) -> int:
        asked = self.settings.workers or self._cells
        return max(1, min(asked, self._cells, self._room()))

    def _room(self) -> int:
        """Workers that the cluster as it is now can hold."""
        there = self._ray.cluster_resources()
        room = there.get("CPU", 0) / self._cpus
        if self._gpus:
            room = min(room, there.get("GPU", 0) / self._gpus)
        return int(room)

    def start(self) -> Row:
        ray = self._ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            _check_address(self.settings.ray_address)
            # Its own messages would run through the progress lines.
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # A busy machine needs longer than the 30 s that Ray gives it.
            os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
            try:
                ray.init(
                    address=self.settings.ray_address,
                    log_to_driver=self.settings.debug,
                    logging_level="info" if self.settings.debug else "error",
                )
            except ConnectionError as fault:
                raise UserError(
                    f"no Ray cluster answers at --ray_address {self.settings.ray_address} "
                    f"({' '.join(str(fault).split())}): start one, or leave the flag out to have "
                    "one for this run"
                ) from None
        self._cpus = self.settings.cpus_per_cell or CPUS_PER_CELL
        gpus = ray.cluster_resources().get("GPU", 0)
        usual = 1.0 if gpus and self.settings.device in ("auto", "cuda") else 0.0
        self._gpus = self.settings.gpus_per_cell or usual
        if self._room() < 1:
            raise UserError(
                f"no machine of the Ray cluster has the {self._cpus:g} CPUs and {self._gpus:g} "
                "GPUs of a cell: change --cpus_per_cell or --gpus_per_cell"
            )
        worker = self._hire()
        try:
            found: Row = ray.get(worker.shared.remote())
        except ray.exceptions.RayTaskError as fault:
            if isinstance(fault.cause, UserError):
                raise fault.cause from None
            raise RunFailed(f"no Ray worker came up: {fault.cause}") from fault
        except ray.exceptions.RayError as fault:
            raise RunFailed(f"no Ray worker came up: {fault}") from fault
        self._idle.append(worker)
        return found

    def _hire(self) -> Any:
        threads = str(max(1, int(self._cpus)))
        actor = self._ray.remote(_Actor).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        return actor.remote(self.settings, self._documents)

    def submit(self, work: Work) -> Future[Cell]:
        worker = self._idle.pop() if self._idle else self._hire()
        done: Future[Cell] = Future()
        stopped = threading.Event()
        watch = None
        if self._limit is not None:
            watch = threading.Timer(self._limit, self._stop, (worker, stopped))
            watch.daemon = True
            watch.start()

        def answer(future: Future[Cell]) -> None:
            if watch is not None:
                watch.cancel()
            fault = future.exception()
            if fault is None:
                self._idle.append(worker)
                done.set_result(future.result())
            elif stopped.is_set():
                done.set_exception(TimeoutError())
            elif isinstance(fault, self._ray.exceptions.RayActorError):
                done.set_exception(WorkerDied("its Ray worker was lost"))
            elif isinstance(fault, self._ray.exceptions.RayTaskError):
                # Its text would be the traceback of another process.
                done.set_exception(fault.cause)
            else:
                done.set_exception(fault)

        worker.do.remote(work).future().add_done_callback(answer)
        return done

    def _stop(self, worker: Any, stopped: threading.Event) -> None:
        stopped.set()
        self._ray.kill(worker)

    def close(self) -> None:
        if self._ray.is_initialized():
            for worker in self._idle:
                self._ray.kill(worker)
            if self._started_here:
                self._ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raises UserError where nothing listens at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as fault:
        raise UserError(
            f"no Ray cluster answers at --ray_address {address} ({fault}): start one, or leave the "
            "flag out to have one for this run"
        ) from None


class _Actor:
    """Lives in a process of the cluster; the model is loaded with the first call."""

    def __init__(self, settings: Settings, documents: dict[str, int | None]) -> None:
        self._settings, self._documents = settings, documents
        self._worker: Worker | None = None

    def _own(self) -> Worker:
        if self._worker is None:
            self._worker = hired(self._settings, self._documents)
        return self._worker

    def shared(self) -> Row:
        """What the identities of all cells share."""
        with no_bars():
            return shared(self._own())

    def do(self, work: Work) -> Cell:
        """The cell, scored or timed."""
        with no_bars():
            return self._own().do(work)
