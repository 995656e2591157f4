"""How fast a machine is: measured on this one, or off a data sheet for one that is planned for.

A forward takes the arithmetic over the rate that is reached, and the bytes that it has to read
over the bandwidth that is reached; nothing is assumed to overlap. On a GPU it takes no less than
the host needs to launch it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.sweep.grid import planned
from dyndepth.sweep.settings import MACHINES

if TYPE_CHECKING:
    from dyndepth.sweep.settings import Settings

GIB = 2**30

COMPUTE_SHARE = 0.5
"""Share of the peak that prompts and training reach on a machine that is planned for. Measured on
an H200 in bfloat16: a block in the shape of an 8B model at 8 x 2048 tokens runs at 0.51 of
the peak."""
BANDWIDTH_SHARE = 0.5
"""Share of the bandwidth that decoding reaches. Measured on an H200 in bfloat16: 7.0 ms a step of
that shape from a CUDA graph, where the bytes allow 3.4."""
LAUNCH = 0.65e-3
"""Seconds that the host takes to launch a block on a GPU. Measured beside the H200, eagerly."""


@dataclass(frozen=True)
class Machine:
    """How fast forwards run.

    Attributes:
        what: the machine, in words.
        kind: ``cpu`` or ``cuda``.
        rate, bandwidth: FLOP/s and bytes/s that are reached.
        memory: bytes; None where nobody knows.
        launch: seconds of the host for a block.
        said: how the figures came about, in words, a line each.
    """

    what: str
    kind: str
    rate: float
    bandwidth: float
    memory: float | None
    launch: float
    said: tuple[str, ...]

    def seconds(self, flops: float, read: float, blocks: float) -> float:
        """Of a forward that does so many ``flops`` over ``read`` bytes, through so many blocks."""
        return max(flops / self.rate + read / self.bandwidth, self.launch * blocks)


def known() -> dict[str, dict[str, Any]]:
    """The machines that ``--assume`` names, with their data sheets' figures."""
    text = Path(__file__).with_name("machines.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    assert tuple(found) == MACHINES
    return found


def assumed(settings: Settings) -> Machine | None:
    """The machine that the settings describe; None where it is this one."""
    if settings.assume is None and settings.tflops is None:
        return None
    sheet = known()[settings.assume] if settings.assume else None
    half = settings.dtype != "float32"
    key = "half_tflops" if half else "single_tflops"
    peak = settings.tflops or (sheet or {})[key]
    bandwidth = settings.bandwidth or (sheet or {})["bandwidth"]
    gib = settings.memory_gib or (sheet or {}).get("memory_gib")
    kind = planned(settings) or "cuda"
    what = sheet["what"] if sheet else "the machine described"
    said = [f"{what}: {peak:g} TFLOP/s in {settings.dtype}, {bandwidth:g} GB/s"]
    if sheet and not (settings.tflops or settings.bandwidth):
        said[0] += f" ({sheet['source']})"
    said.append(
        f"{COMPUTE_SHARE:.0%} of that rate in prompts and training, {BANDWIDTH_SHARE:.0%} of that "
        "bandwidth in decoding"
    )
    launch = LAUNCH if kind == "cuda" else 0.0
    if launch:
        said.append(f"the host launches a block in {1e3 * launch:g} ms (eager mode)")
    return Machine(
        what,
        kind,
        COMPUTE_SHARE * peak * 1e12,
        BANDWIDTH_SHARE * bandwidth * 1e9,
        None if gib is None else gib * GIB,
        launch,
        tuple(said),
    )


FEW, MANY = 16, 256
"""Tokens of the two forwards that are timed: the difference is arithmetic, the rest is reading."""
ODD = 1.1
"""How much longer forwards of odd widths, with masks and caches, take than the two that are timed.
Measured on two cores with the embedded model, over cells of three methods: 1.0 to 1.2."""
BUSY = 1.3
"""From this ratio on of the clock's time to the processor's, other work is worth a word."""


def measured(device: str, flops: float, read: float, run: Any, what: str) -> Machine:
    """This machine, from two forwards, as it is when nothing else runs on it.

    ``run(tokens)`` runs one, ``flops`` it takes for each token, and ``read`` the bytes that it
    reads however few they are; ``what`` says what was run.
    """
    own, clock = zip(*(_least(run, tokens, device) for tokens in (FEW, MANY)), strict=True)
    few, many = (ODD * each for each in own)
    a_token = max((many - few) / (MANY - FEW), 0.1 * many / MANY)
    fixed = max(few - FEW * a_token, 0.05 * few)
    rate, bandwidth = flops / a_token, read / fixed
    said = [
        f"{what} on {device} at {rate / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.1f} GB/s "
        "(measured)"
    ]
    many = own[1]
    if clock[1] > BUSY * many:
        said.append(
            "nothing else runs on this machine; now other work does, and as long as that lasts it "
            f"takes about {clock[1] / many:.1f} times as long"
        )
    kind = device.partition(":")[0]
    # Measured with the launches that it took: there is nothing to add.
    return Machine(device, kind, rate, bandwidth, memory_of(device), 0.0, tuple(said))


def _least(run: Any, tokens: int, device: str, repeats: int = 4) -> tuple[float, float]:
    """Seconds that a run takes by itself, and by the clock, each the least of some.

    On a processor other programs stretch the clock's time and not the processor's, which is that of
    all threads together.
    """
    import torch

    run(tokens)
    own, clock = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        run(tokens)
        clock.append(time.perf_counter() - started)
        busy = (time.process_time() - used) / torch.get_num_threads()
        own.append(min(clock[-1], busy) if device == "cpu" else clock[-1])
    return min(own), min(clock)


def memory_of(device: str) -> float | None:
    """Bytes of a device here, all GPUs' together where a model is spread over them."""
    import torch

    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return None


def check_here(device: str) -> None:
    """Raises UserError for a device that is not here, and says how to plan for one."""
    from dyndepth.models.loading import check_device

    try:
        check_device(device)
    except UserError as fault:
        raise UserError(
            f"{fault}; to plan for another machine, give --assume {', '.join(MACHINES[:-1])} or "
            f"{MACHINES[-1]}, or --tflops and --bandwidth"
        ) from fault
