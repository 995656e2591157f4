"""Where a number comes from: package versions, git commit, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dyndepth.common import digests


@cache
def versions() -> dict[str, str]:
    """Installed version by distribution; ``unknown`` where there is no metadata."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@cache
def git_commit() -> str:
    """The commit that the running code was checked out from, with ``+changes`` if it was edited.

    Empty where the package does not run from its own repository (an installed wheel).
    """
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "dyndepth" != digests.PACKAGE:
        return ""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "dyndepth", "methods", at=Path(top))
    return f"{commit}+changes" if commit and changed else commit


def _git(*arguments: str, at: Path | None = None) -> str:
    command = ["git", "-C", str(at or digests.PACKAGE), *arguments]
    try:
        done = subprocess.run(  # nosec B603  # git, constant words and the package's own path
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def conditions(device: str) -> dict[str, Any]:
    """Hardware and run-time conditions of a cell: recorded, never hashed."""
    import torch

    on_gpu = device.startswith("cuda")
    return {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "remote_code": remote_code(),
    }


def remote_code() -> bool:
    """Whether this process has loaded code that came with a model, as ``trust_remote_code`` lets
    it."""
    return any(name.partition(".")[0] == "transformers_modules" for name in sys.modules)


@cache
def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


VERSIONS = ("torch", "transformers", "lm_eval", "dyndepth")
"""Packages whose version is a part of the identity, by the name they are installed by."""
