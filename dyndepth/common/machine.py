"""The conditions that a clock was read under: recorded beside every time, and never changed,
but for the memory allocator.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

import torch

from dyndepth.common.provenance import processor
from dyndepth.timing.measure import _gather_limits

# glibc's mallopt: no block is mapped by itself, the heap is never trimmed, it grows in large steps.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GLIBC = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20}
_STEADY = "mallopt(mmap_max=0, trim_threshold=2147483647, top_pad=268435456)"
_ALLOCATOR_VARIABLES = ("LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


@cache
def steady_allocator() -> str:
    """Make the C allocator keep freed memory, for good; returns what was set, "" if nothing was.

    glibc gives large blocks back to the system and pays with page faults when it maps them again.
    That slows the larger forward more and so flatters skipping (up to 18%, measured). Settings by
    ``MALLOC_*`` variables or another allocator (``LD_PRELOAD``) are left alone, and so is a
    system without glibc.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "LD_PRELOAD" in os.environ or sys.platform != "linux":
        return ""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return ""
    return _STEADY if all(library.mallopt(key, value) for key, value in _GLIBC.items()) else ""


def conditions(model: torch.nn.Module) -> dict[str, Any]:
    """What a time of ``model`` depends on, as columns; nothing of it enters a cell's identity.

    ``load_average`` is the system's over the last minute, a hint at neighbours; ``gpu`` holds
    clocks (MHz), power limit (W) and temperature as the driver tells them, None on a CPU.
    """
    parameter = next(model.parameters())
    device = parameter.device
    on_gpu = device.type == "cuda"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "allocator": _allocator(on_gpu),
        "gather_limits": _gather_limits(model),
        "load_average": None if load is None else round(load, 2),
        "gpu": _gpu_state(device) if on_gpu else None,
    }


def _allocator(on_gpu: bool) -> str:
    """Settings of the memory allocators that were in force."""
    names = {name for name in os.environ if name.startswith("MALLOC_")}
    names |= set(_ALLOCATOR_VARIABLES) & set(os.environ)
    found = [f"{name}={os.environ[name]}" for name in sorted(names)]
    if not on_gpu and steady_allocator():
        found.append(steady_allocator())
    return " ".join(found) or "default"


def _gpu_state(device: torch.device) -> str | None:
    """Clocks and power of the GPU by its driver's own tool; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [tool, f"--id={identity}", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # nosec B603  # the driver's own tool, found on the PATH
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return ", ".join(f"{k} {v}" for k, v in zip(_CLOCKS.split(","), values, strict=False))
