"""What goes wrong in a sweep on purpose: changes to its process, and methods that misbehave.

The functions of the first part are called in a sweep's own process before it begins (``before`` of
``sweeping.start``); ``both`` and ``functools.partial`` put them together.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

METHODS = '''
"""Methods that misbehave, each in a way of its own."""

import os
import signal
import time
from dataclasses import dataclass

import torch

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Faulty(DynamicDepthMethod):
    granularity = "token"
    paper = "none"


@dataclass(kw_only=True)
class Raising(Faulty):
    name = "raising"

    def gates(self, layer, hidden):
        raise LookupError("no such\\nlayer")


@dataclass(kw_only=True)
class Misshapen(Faulty):
    name = "misshapen"

    def gates(self, layer, hidden):
        return torch.ones(hidden.shape[0], hidden.shape[1] + 1, dtype=torch.bool), True


@dataclass(kw_only=True)
class Misplanned(Faulty):
    name = "misplanned"

    def start(self, context):
        return torch.ones(context.layers + 1, 2, dtype=torch.bool)


@dataclass(kw_only=True)
class NotANumber(Faulty):
    name = "not_a_number"

    def gates(self, layer, hidden):
        return torch.full(hidden.shape[:2], float("nan")), True


@dataclass(kw_only=True)
class Hanging(Faulty):
    name = "hanging"

    def gates(self, layer, hidden):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue


@dataclass(kw_only=True)
class Deaf(Faulty):
    name = "deaf"

    def gates(self, layer, hidden):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(3600)


@dataclass(kw_only=True)
class Deadly(Faulty):
    name = "deadly"

    def gates(self, layer, hidden):
        os._exit(3)
'''

ENTRY_POINTS = """[dyndepth.methods]
raising = faulty_methods:Raising
misshapen = faulty_methods:Misshapen
misplanned = faulty_methods:Misplanned
not_a_number = faulty_methods:NotANumber
hanging = faulty_methods:Hanging
deaf = faulty_methods:Deaf
deadly = faulty_methods:Deadly
"""


def faulty_distribution(folder: Path) -> Path:
    """Fill ``folder`` with a distribution that adds the methods of ``METHODS``."""
    info = folder / "faulty_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "faulty_methods.py").write_text(METHODS)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-methods\nVersion: 1.0\n")
    return folder


# --- in the sweep's process -----------------------------------------------------------------------


def both(one: Callable[[], object], other: Callable[[], object]) -> None:
    """One after the other."""
    one()
    other()


def with_distribution(folder: str) -> None:
    """Put a folder with distributions on the path, also of processes that are spawned from here."""
    import importlib

    sys.path.insert(0, folder)
    importlib.invalidate_caches()


def slow_disk(log: str, seconds: float) -> None:
    """Each flush takes ``seconds`` longer; ``log`` gets a line as a file is begun (``begin NAME``),
    and as it is whole (``end NAME``) or was given up (``cut NAME``)."""
    from dyndepth.common import files
    from dyndepth.common import files as store

    written, flush = store.write_atomically, os.fsync
    lines = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def fsync(file: int) -> None:
        time.sleep(seconds)
        flush(file)

    def write(path: Path, data: Any) -> None:
        os.write(lines, f"begin {path.name}\n".encode())
        try:
            written(path, data)
        except BaseException:
            os.write(lines, f"cut {path.name}\n".encode())
            raise
        os.write(lines, f"end {path.name}\n".encode())

    os.fsync = fsync
    store.write_atomically = files.write_atomically = write


def small_files(size: int) -> None:
    """No file of this process may grow beyond ``size`` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def jumping_clock(seed: int) -> None:
    """Each look at the clocks finds them hours or years away from where they were."""
    draw = random.Random(seed)
    real = {"time": time.time, "monotonic": time.monotonic}

    def jumping(clock: str) -> float:
        return real[clock]() + draw.choice((-1.0, 1.0)) * draw.choice((0.0, 1.0, 4e3, 1e8))

    time.time = partial(jumping, "time")  # type: ignore[assignment]
    time.monotonic = partial(jumping, "monotonic")  # type: ignore[assignment]


def wall_clock_set_forward(seconds: float, flag: str) -> None:
    """The wall clock is found ``seconds`` ahead once the file ``flag`` exists."""
    real = time.time
    time.time = lambda: real() + (seconds if os.path.exists(flag) else 0.0)


def short_grace(seconds: float) -> None:
    """Workers that will not stop get ``seconds`` less patience than usual."""
    from dyndepth.sweep import executors
    from dyndepth.sweep.executors import Processes

    executors.Processes = partial(Processes, grace=seconds)  # type: ignore[misc]
