"""How many cells are computed at once, and how much sooner that is done."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyndepth.sweep.executors import cores, gpu_count, shares

if TYPE_CHECKING:
    from dyndepth.sweep.estimate.machines import Machine
    from dyndepth.sweep.settings import Settings


@dataclass(frozen=True)
class Workers:
    """The workers of a sweep.

    Attributes:
        count: how many.
        speed: how often as fast all together score and fit as one that has the machine alone.
        sharing: how many of them hold their model in one and the same memory.
        said: what was assumed for that; empty for cells one after the other.
    """

    count: int = 1
    speed: float = 1.0
    sharing: int = 1
    said: str = ""


def workers_of(settings: Settings, machine: Machine, cells: int, here: bool) -> Workers:
    """Those of the settings for so many cells; ``here``: on this machine."""
    if settings.executor == "inline" or cells < 2:
        return Workers()
    if settings.executor == "processes" and here:
        gpus = gpu_count(settings.device)
        count, threads = shares(settings, cells, gpus)
        if machine.kind == "cuda":
            speed = float(max(1, min(count, gpus)))
            said = f"{count} workers, {speed:g} of them at once on a GPU each"
            return Workers(count, speed, math.ceil(count / speed), said)
        return _on_cores(count, threads)
    count = min(settings.workers or 1, cells)
    if count == 1:
        return Workers(said="one cell at a time, for --workers does not say how many")
    if machine.kind == "cpu" and not here:
        said = f"{count} workers share the processor, and are as fast as one alone"
        return Workers(count, 1.0, count, said)
    return Workers(count, float(count), 1, f"each of {count} workers has such a machine to itself")


def _on_cores(count: int, threads: int) -> Workers:
    """Of processes with so many threads each; measured was one, with torch's number of them."""
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS") or threads)
    own = torch.get_num_threads()
    speed = max(1.0, min(count, min(count * threads, cores()) / own))
    said = (
        f"{count} workers with {threads} thread{'s' * (threads != 1)} each are {speed:.2g} times "
        f"as fast as one with {own}"
    )
    return Workers(count, speed, count, said)
