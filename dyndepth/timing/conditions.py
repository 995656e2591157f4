"""The conditions that a clock was read under: recorded beside every time, part of no identity."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import torch

from dyndepth.common.digests import timing_code
from dyndepth.common.machine import steady_allocator
from dyndepth.common.provenance import processor

_ALLOCATOR_VARIABLES = ("LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def conditions(model: torch.nn.Module) -> dict[str, Any]:
    """What a time of ``model`` depends on, as columns; nothing of it enters a cell's identity.

    ``load_average`` is the system's over the last minute, a hint at neighbours; ``gpu`` holds
    clocks (MHz), power limit (W) and temperature as the driver tells them, and the kernels that
    torch may choose of for attention, None on a CPU;
    ``timing_code`` is a digest of the procedure.
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
        "gpu": ", ".join(filter(None, (_gpu_state(device), _kernels()))) if on_gpu else None,
        "timing_code": timing_code(),
    }


def _kernels() -> str:
    """The kernels that torch may choose of for attention."""
    allowed = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return f"attention {' '.join(kernel for kernel, on in allowed.items() if on)}"


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


def _gather_limits(model: torch.nn.Module) -> str:
    """When the runtime gathers, see ``dyndepth.runtime.gates``: attention, MLP, least tokens."""
    from dyndepth.runtime.limits import limits_of

    limits = limits_of(model)
    return f"{limits.attention:g} {limits.mlp:g} {limits.tokens}"
